"""Which role may call which method: one table, default deny.

A test holds it to the services' own method sets, so that a new method can't be forgotten.
"""

from fedcore.errors import PermissionDeniedError
from fedcore.identity import Caller

ANYONE = "anyone"
SITE = "site"
OPERATOR = "operator"

_SITES = frozenset({SITE})
_OPERATORS = frozenset({OPERATOR})
_MEMBERS = frozenset({SITE, OPERATOR})

ROLES: dict[str, frozenset[str]] = {
    # The token is the proof; served on the enrolment port only.
    "/fedcore.v1.Enrollment/Enroll": frozenset({ANYONE}),
    "/fedcore.v1.Federation/Hello": _SITES,
    "/fedcore.v1.Federation/Directives": _SITES,
    "/fedcore.v1.Federation/Fetch": _SITES,
    "/fedcore.v1.Federation/DeliveryOffset": _SITES,
    "/fedcore.v1.Federation/Deliver": _SITES,
    "/fedcore.v1.Admin/WhoAmI": _OPERATORS,
    "/fedcore.v1.Admin/GetStatus": _OPERATORS,
    "/fedcore.v1.Admin/CreateToken": _OPERATORS,
    "/fedcore.v1.Admin/ListSites": _OPERATORS,
    "/fedcore.v1.Admin/SubmitRun": _OPERATORS,
    "/fedcore.v1.Admin/ListRuns": _OPERATORS,
    "/fedcore.v1.Admin/GetRun": _OPERATORS,
    "/fedcore.v1.Admin/WatchRun": _OPERATORS,
    "/fedcore.v1.Admin/PauseRun": _OPERATORS,
    "/fedcore.v1.Admin/ResumeRun": _OPERATORS,
    "/fedcore.v1.Admin/AbortRun": _OPERATORS,
    "/fedcore.v1.Admin/ListRounds": _OPERATORS,
    "/fedcore.v1.Admin/ListModels": _OPERATORS,
    "/fedcore.v1.Admin/Download": _OPERATORS,
    "/fedcore.v1.Admin/UploadModel": _OPERATORS,
    "/grpc.health.v1.Health/Check": _MEMBERS,
    "/grpc.health.v1.Health/List": _MEMBERS,
    "/grpc.health.v1.Health/Watch": _MEMBERS,
}


def is_public(method: str) -> bool:
    """Whether a method is granted to callers without a certificate."""
    return ANYONE in ROLES.get(method, ())


def authorise(method: str, caller: Caller) -> None:
    """Raise PermissionDeniedError unless the table grants `method` to the caller's role."""
    allowed = ROLES.get(method, frozenset())
    if caller.role in allowed or ANYONE in allowed:
        return
    roles = " or ".join(sorted(allowed)) or "no role"
    raise PermissionDeniedError(
        f"{caller} may not call {method.rpartition('.')[2]}: it is granted to {roles}",
        hint="use a credential folder of that role",
    )
