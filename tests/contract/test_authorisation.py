"""The tables that name every method are held to the services themselves: a new RPC can't be forgotten."""

import ast
import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2

from fedcore import tls
from fedcore.channel import CALLS, call_policy, service_config
from fedcore.errors import PermissionDeniedError
from fedcore.identity import Caller
from fedcore.v1 import (
    access_pb2,
    admin_pb2,
    audit_pb2,
    backup_pb2,
    certificates_pb2,
    enrollment_pb2,
    federation_pb2,
    impressions_pb2,
    membership_pb2,
    operations_pb2,
    sites_pb2,
    tensor_pb2,
)
from fedserver.audit_policy import ACTIONS, Recorded
from fedserver.authorisation import (
    ANY_OPERATOR,
    ANYONE,
    AUDITOR,
    GRANTABLE,
    OPERATOR,
    OWNER,
    ROLES,
    SITE,
    VIEWER,
    authorise,
    is_public,
)

ROOT = Path(__file__).parents[2]
FILES: list[FileDescriptor] = [
    module.DESCRIPTOR
    for module in (
        access_pb2,
        admin_pb2,
        audit_pb2,
        backup_pb2,
        certificates_pb2,
        enrollment_pb2,
        federation_pb2,
        operations_pb2,
        sites_pb2,
        impressions_pb2,
        membership_pb2,
        tensor_pb2,
        health_pb2,
    )
]
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
}


# Service (or method) -> roles, written down a second time on purpose: who changes the one table looks at the other.
READERS = {VIEWER, OPERATOR, AUDITOR, OWNER}
EXPECTED = {
    "fedcore.v1.Federation": {SITE},
    "fedcore.v1.Admin": READERS,
    "fedcore.v1.Admin/WhoAmI": {ANY_OPERATOR},
    "fedcore.v1.Admin/CreateToken": {OPERATOR, OWNER},
    "fedcore.v1.Admin/SubmitRun": {OPERATOR},
    "fedcore.v1.Admin/PauseRun": {OPERATOR},
    "fedcore.v1.Admin/ResumeRun": {OPERATOR},
    "fedcore.v1.Admin/AbortRun": {OPERATOR},
    "fedcore.v1.Admin/UploadModel": {OPERATOR},
    "fedcore.v1.Enrollment": {ANYONE},
    # Every member renews its own; what changes others' is for those who may let them in.
    "fedcore.v1.Certificates/Renew": {SITE, ANY_OPERATOR},
    "fedcore.v1.Certificates/ListCertificates": READERS,
    "fedcore.v1.Certificates/RevokeCertificates": {OPERATOR, OWNER},
    "fedcore.v1.Certificates/GetAuthority": READERS,
    "fedcore.v1.Certificates/RotateAuthority": {OWNER},
    "fedcore.v1.Sites": {OPERATOR, OWNER},
    "fedcore.v1.Sites/PingSite": READERS,
    "fedcore.v1.Audit": {AUDITOR, OWNER},
    "fedcore.v1.Operations": READERS,
    "fedcore.v1.Operations/SetDrain": {OPERATOR, OWNER},
    "fedcore.v1.Operations/CheckPlan": {VIEWER, OPERATOR},
    "fedcore.v1.Operations/CollectBundle": {OWNER},
    "fedcore.v1.Membership/CreateOperatorToken": {OWNER},
    "fedcore.v1.Membership/ListEnrollments": READERS,
    "fedcore.v1.Membership/ApproveEnrollment": {OPERATOR, OWNER},
    "fedcore.v1.Membership/DenyEnrollment": {OPERATOR, OWNER},
    "fedcore.v1.Backup": {OWNER},
    "fedcore.v1.Access": {OWNER},
    "fedcore.v1.Access/ListRoles": READERS,
    "fedcore.v1.Access/CanI": {ANY_OPERATOR},
    # Counts are for everybody who reads; pictures are not.
    "fedcore.v1.Impressions": READERS,
    "fedcore.v1.Impressions/PreviewImpressions": {AUDITOR, OWNER},
    "fedcore.v1.Impressions/PurgeImpressions": {OWNER},
    "grpc.health.v1.Health": {SITE, ANY_OPERATOR},
}
# What a caller may be let in as; an operator without a grant is "any operator" alone.
ALL_ROLES = (SITE, ANY_OPERATOR, *GRANTABLE)


def caller(role: str) -> Caller:
    from datetime import UTC, datetime

    return Caller("lab", SITE if role == SITE else "operator", "x", "1", datetime.now(UTC))


def test_every_proto_of_the_contract_is_looked_at():
    names = {path.name for path in (ROOT / "protos/fedcore/v1").glob("*.proto")}
    assert names == {Path(file.name).name for file in FILES if file.name.startswith("fedcore/")}


def test_the_authorisation_table_names_exactly_the_methods_there_are():
    assert set(ROLES) == set(METHODS)


def test_the_call_table_names_exactly_the_methods_there_are():
    assert set(CALLS) == set(METHODS)


def test_only_known_roles_are_granted_anything_and_only_enrolment_is_public():
    assert {role for roles in ROLES.values() for role in roles} == {*ALL_ROLES, ANYONE}
    assert {method for method in ROLES if is_public(method)} == {
        "/fedcore.v1.Enrollment/Enroll",
        "/fedcore.v1.Enrollment/RenewEnded",
        "/fedcore.v1.Enrollment/RequestEnrollment",
        "/fedcore.v1.Enrollment/CheckEnrollment",
    }


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_role_may_call_exactly_what_it_should(method):
    expected = EXPECTED.get(method[1:]) or EXPECTED[METHODS[method].containing_service.full_name]
    for role in ALL_ROLES:
        mine = frozenset({role} if role == SITE else {role, ANY_OPERATOR})
        if mine & expected or ANYONE in expected:
            assert authorise(method, caller(role), mine) in {role, ANY_OPERATOR, ANYONE}
        else:
            with pytest.raises(PermissionDeniedError, match="may not call"):
                authorise(method, caller(role), mine)
    if ANYONE not in expected:
        with pytest.raises(PermissionDeniedError, match="may not call"):
            authorise(method, caller("nobody"), frozenset())


def test_a_caller_with_several_roles_is_let_in_by_the_least():
    everything = frozenset({ANY_OPERATOR, *GRANTABLE})
    assert authorise("/fedcore.v1.Admin/GetRun", caller("x"), everything) == VIEWER
    assert authorise("/fedcore.v1.Admin/CreateToken", caller("x"), everything) == OPERATOR
    assert authorise("/fedcore.v1.Admin/WhoAmI", caller("x"), everything) == ANY_OPERATOR


def test_a_refusal_names_what_it_takes_and_what_the_caller_has():
    roles = frozenset({ANY_OPERATOR, VIEWER})
    with pytest.raises(PermissionDeniedError) as caught:
        authorise("/fedcore.v1.Admin/SubmitRun", caller("x"), roles)
    assert caught.value.message == (
        "operator/x may not call Admin/SubmitRun: it is granted to operator; operator/x has viewer"
    )
    assert "fedctl auth can-i" in caught.value.hint


def test_the_audit_table_names_exactly_the_methods_there_are():
    assert set(ACTIONS) == set(METHODS)


def test_every_method_that_changes_something_is_recorded():
    """By the word it begins with, so that a new one can't be forgotten."""
    reading = ("Get", "List", "Watch", "Check", "WhoAmI", "CanI", "Directives", "DeliveryOffset")
    for method, rule in ACTIONS.items():
        assert re.fullmatch(r"[a-z]+\.[a-z-]+", rule.action)
        assert (rule.recorded is Recorded.NO) == method.rpartition("/")[2].startswith(reading), method


def test_a_method_outside_the_table_is_denied_to_everybody():
    with pytest.raises(PermissionDeniedError, match="granted to no role"):
        authorise("/fedcore.v1.Admin/Forgotten", caller("x"), frozenset({*ALL_ROLES, ANYONE}))
    assert not is_public("/fedcore.v1.Admin/Forgotten")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_calls_have_deadlines_and_only_unary_ones_are_repeated_by_themselves(method):
    policy, descriptor = call_policy(method), METHODS[method]
    streaming = descriptor.client_streaming or descriptor.server_streaming
    if not streaming:
        assert policy.deadline_s is not None
        assert policy.deadline_s <= 60
    assert not (streaming and policy.idempotent)
    assert (f'"method": "{descriptor.name}"' in service_config()) == policy.idempotent
    assert "timeout" not in service_config()


def _sources() -> list[Path]:
    folders = ("fedcore", "fedserver", "fedagent", "fedctl", "fedsim", "tests", "benchmarks", "examples")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if "fedcore/v1" not in path.as_posix()]


def _imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of all imports outside `if TYPE_CHECKING`, in order of lines."""
    found: list[tuple[int, str]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.extend((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return sorted(found)


def _loads_grpc(name: str) -> bool:
    return name == "grpc" or name.startswith("grpc.") or "_pb2_grpc" in name


def _sets_environment(name: str) -> bool:
    # These import fedcore.tls before grpc themselves (they are held to it by this very test).
    names = ("fedcore.tls", "fedcore.channel", "fedcore.status", "fedserver.interceptors")
    return any(name == one or name.startswith(f"{one}.") for one in names)


@pytest.mark.parametrize("path", _sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_tls_environment_is_set_before_grpc_is_imported(path):
    seen = False
    for line, name in _imports(path):
        seen = seen or _sets_environment(name)
        assert seen or not _loads_grpc(name), (
            f"{path}:{line}: {name} before 'from fedcore import tls as _tls'"
        )


def test_this_process_enforces_tls_1_3():
    assert tls.is_enforced()
