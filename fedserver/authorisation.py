"""Which role may call which method: one table, default deny.

A test holds it to the services' own method sets, so that a new method can't be forgotten. The certificate says who is
calling; a site is let in as a site, an operator as what it was granted (fedserver.grants).
"""

from fedcore.errors import PermissionDeniedError
from fedcore.identity import Caller

ANYONE = "anyone"
SITE = "site"
# Whoever has an operator's certificate, without any grant.
ANY_OPERATOR = "any operator"
# Reads; submits and controls; reads the audit log and impressions; grants roles and changes the CA.
VIEWER, OPERATOR, AUDITOR, OWNER = "viewer", "operator", "auditor", "owner"
GRANTABLE = (VIEWER, OPERATOR, AUDITOR, OWNER)

_PUBLIC = frozenset({ANYONE})
_SITES = frozenset({SITE})
_MEMBERS = frozenset({SITE, ANY_OPERATOR})
_KNOWN = frozenset({ANY_OPERATOR})
_READERS = frozenset(GRANTABLE)
_OPERATORS = frozenset({OPERATOR})
_PLANNERS = frozenset({VIEWER, OPERATOR})
_ADMITTING = frozenset({OPERATOR, OWNER})
_AUDITORS = frozenset({AUDITOR, OWNER})
_OWNERS = frozenset({OWNER})
# Impressions are sensitive: they show what the model has learnt of the sites' images.
IMPRESSION_ROLES = _AUDITORS

ROLES: dict[str, frozenset[str]] = {
    # The token is the proof; served on the enrolment port only.
    "/fedcore.v1.Enrollment/Enroll": _PUBLIC,
    # The ended certificate's key is the proof; served on the enrolment port only.
    "/fedcore.v1.Enrollment/RenewEnded": _PUBLIC,
    # The operator's approval is what counts; served on the enrolment port only.
    "/fedcore.v1.Enrollment/RequestEnrollment": _PUBLIC,
    "/fedcore.v1.Enrollment/CheckEnrollment": _PUBLIC,
    "/fedcore.v1.Membership/CreateOperatorToken": _OWNERS,
    "/fedcore.v1.Membership/ListEnrollments": _READERS,
    "/fedcore.v1.Membership/ApproveEnrollment": _ADMITTING,
    "/fedcore.v1.Membership/DenyEnrollment": _ADMITTING,
    "/fedcore.v1.Certificates/Renew": _MEMBERS,
    "/fedcore.v1.Certificates/ListCertificates": _READERS,
    "/fedcore.v1.Certificates/RevokeCertificates": _ADMITTING,
    "/fedcore.v1.Certificates/GetAuthority": _READERS,
    "/fedcore.v1.Certificates/RotateAuthority": _OWNERS,
    "/fedcore.v1.Federation/Hello": _SITES,
    "/fedcore.v1.Federation/Directives": _SITES,
    "/fedcore.v1.Federation/Fetch": _SITES,
    "/fedcore.v1.Federation/DeliveryOffset": _SITES,
    "/fedcore.v1.Federation/Deliver": _SITES,
    "/fedcore.v1.Admin/WhoAmI": _KNOWN,
    "/fedcore.v1.Admin/GetStatus": _READERS,
    "/fedcore.v1.Admin/CreateToken": _ADMITTING,
    "/fedcore.v1.Admin/ListSites": _READERS,
    "/fedcore.v1.Admin/SubmitRun": _OPERATORS,
    "/fedcore.v1.Admin/ListRuns": _READERS,
    "/fedcore.v1.Admin/GetRun": _READERS,
    "/fedcore.v1.Admin/WatchRun": _READERS,
    "/fedcore.v1.Admin/PauseRun": _OPERATORS,
    "/fedcore.v1.Admin/ResumeRun": _OPERATORS,
    "/fedcore.v1.Admin/AbortRun": _OPERATORS,
    "/fedcore.v1.Admin/ListRounds": _READERS,
    "/fedcore.v1.Admin/ListModels": _READERS,
    "/fedcore.v1.Admin/Download": _READERS,
    "/fedcore.v1.Admin/UploadModel": _OPERATORS,
    "/fedcore.v1.Sites/EnableSite": _ADMITTING,
    "/fedcore.v1.Sites/DrainSite": _ADMITTING,
    "/fedcore.v1.Sites/DisableSite": _ADMITTING,
    "/fedcore.v1.Sites/RemoveSite": _ADMITTING,
    "/fedcore.v1.Sites/PingSite": _READERS,
    "/fedcore.v1.Sites/ReadSiteLog": _ADMITTING,
    "/fedcore.v1.Audit/ReadAudit": _AUDITORS,
    "/fedcore.v1.Operations/GetHealth": _READERS,
    "/fedcore.v1.Operations/GetConfig": _READERS,
    "/fedcore.v1.Operations/SetDrain": _ADMITTING,
    "/fedcore.v1.Operations/GetSoftware": _READERS,
    "/fedcore.v1.Operations/CheckPlan": _PLANNERS,
    "/fedcore.v1.Operations/WatchEvents": _READERS,
    "/fedcore.v1.Operations/CollectBundle": _OWNERS,
    "/fedcore.v1.Impressions/ListImpressions": _READERS,
    "/fedcore.v1.Impressions/GetImpressions": _READERS,
    "/fedcore.v1.Impressions/PreviewImpressions": IMPRESSION_ROLES,
    "/fedcore.v1.Impressions/PurgeImpressions": _OWNERS,
    # It holds the federation's signing key.
    "/fedcore.v1.Backup/CreateBackup": _OWNERS,
    "/fedcore.v1.Access/GrantRole": _OWNERS,
    "/fedcore.v1.Access/RevokeRole": _OWNERS,
    "/fedcore.v1.Access/ListRoles": _READERS,
    "/fedcore.v1.Access/CanI": _KNOWN,
    "/grpc.health.v1.Health/Check": _MEMBERS,
    "/grpc.health.v1.Health/List": _MEMBERS,
    "/grpc.health.v1.Health/Watch": _MEMBERS,
}


def is_public(method: str) -> bool:
    """Whether a method is granted to callers without a certificate."""
    return ANYONE in ROLES.get(method, ())


def authorise(method: str, caller: Caller, roles: frozenset[str]) -> str:
    """The role that `method` is granted to and `caller` is let in by, of its `roles`; the lesser one of several.

    Raises PermissionDeniedError that names the roles it takes.
    """
    allowed = ROLES.get(method, frozenset())
    for role in (ANYONE, SITE, ANY_OPERATOR, *GRANTABLE):
        if role in allowed and (role in roles or role == ANYONE):
            return role
    name = method.rpartition(".")[2]
    raise denied(caller, f"may not call {name}", allowed, roles)


def denied(
    caller: Caller, what: str, allowed: frozenset[str], roles: frozenset[str]
) -> PermissionDeniedError:
    """The refusal of what is granted to `allowed` roles only."""
    has = ", ".join(sorted(roles - {ANY_OPERATOR, SITE})) or "no role"
    mine = f"; {caller} has {has}" if ANY_OPERATOR in roles else ""
    hint = "'fedctl auth can-i' shows what you may do; an owner grants roles: fedctl role grant OPERATOR ROLE"
    return PermissionDeniedError(
        f"{caller} {what}: it is granted to {' or '.join(sorted(allowed)) or 'no role'}{mine}",
        hint=hint if ANY_OPERATOR in roles else "use a credential folder of that role",
    )
