"""A real coordinator's edge over real TLS: both ports, real interceptors, real certificates; what gets in
and what does not.
"""

import asyncio
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest

from fedagent.enroll import enroll
from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.audit_store import AuditLog
from fedcore.channel import (
    CALLS,
    SERVER_OPTIONS,
    CallPolicy,
    client_options,
    open_channel,
    open_sync_channel,
    server_credentials,
)
from fedcore.credential import load_credential, write_credential
from fedcore.database import Database, open_database
from fedcore.enrollment_token import decode_token
from fedcore.errors import (
    CallTimeoutError,
    ConfigError,
    ConflictError,
    FedimpresError,
    FingerprintError,
    IdentityError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    ProtocolError,
    TokenError,
    UnreachableError,
)
from fedcore.identity import Caller, Subject
from fedcore.pki import (
    certificates_to_pem,
    fingerprint,
    key_to_pem,
    make_issuing_ca,
    make_leaf,
    make_root,
    new_key,
)
from fedcore.status import exit_code_of, from_rpc_error
from fedserver.authorisation import ANY_OPERATOR, ANYONE, GRANTABLE, OPERATOR, OWNER, ROLES, SITE
from fedserver.authority import Authority, load_authority
from fedserver.call_audit import CallAudit
from fedserver.certificates import Certificates
from fedserver.config import LimitsConfig, ServerHome
from fedserver.enrollment_requests import EnrollmentRequests
from fedserver.grants import Grants, grant
from fedserver.initialise import initialise
from fedserver.interceptors import caller_of, edge_interceptors
from fedserver.limits import Limits
from fedserver.registry import Registry, record_certificate
from fedserver.schema import MIGRATIONS
from fedserver.services.access import AccessService
from fedserver.services.audit import AuditService
from fedserver.services.certificates import CertificatesService
from fedserver.services.enrollment import EnrollmentService
from fedserver.services.health import HealthService
from fedserver.services.membership import MembershipService
from fedserver.tokens import Tokens
from tests.federation_fixture import wait_until

# isort: split
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedcore.v1 import (
    access_pb2_grpc,
    admin_pb2,
    admin_pb2_grpc,
    audit_pb2_grpc,
    certificates_pb2_grpc,
    enrollment_pb2,
    enrollment_pb2_grpc,
    federation_pb2,
    federation_pb2_grpc,
    membership_pb2_grpc,
)

OPEN_STREAMS = 10
# Services that take a whole coordinator: the edge is the same without what is behind it.
BEHIND_THE_EDGE = ("backup", "federation", "impressions", "operations", "sites")
UNIMPLEMENTED = [
    (import_module(f"fedcore.v1.{name}_pb2_grpc"), f"{name.capitalize()}Servicer") for name in BEHIND_THE_EDGE
]


class AdminProbe(admin_pb2_grpc.AdminServicer):
    """The generated service, with three methods that show how handlers see the edge; the rest is
    UNIMPLEMENTED.
    """

    attempts = 0

    async def WhoAmI(self, request, context):
        caller = caller_of(context)
        return admin_pb2.WhoAmIReply(
            federation=caller.federation, role=caller.role, id=caller.id, serial=caller.serial
        )

    async def GetRun(self, request, context):
        if request.run == "slow":
            await asyncio.Event().wait()
        if request.run == "flaky":
            raise self._attempt()
        if request.run == "bug":
            raise ZeroDivisionError("secret inner words")
        raise NotFoundError(f"no run {request.run!r}", hint="fedctl run list – zeigt alle")

    async def PauseRun(self, request, context):
        raise self._attempt()

    def _attempt(self) -> UnreachableError:
        self.attempts += 1
        return UnreachableError(f"attempt {self.attempts}")

    async def WatchRun(self, request, context):
        yield admin_pb2.Run(run="r1", round=1)
        raise ConflictError("the run was removed")

    async def UploadModel(self, request_iterator, context):
        count = 0
        async for _ in request_iterator:
            count += 1
        return admin_pb2.UploadModelReply(digest=f"{caller_of(context).id}:{count}")


@dataclass
class Edge:
    """A coordinator's two ports, served from a thread with its own event loop."""

    home: ServerHome
    authority: Authority
    database: Database
    main_port: int = 0
    enroll_port: int = 0
    offset: timedelta = timedelta(0)

    def clock(self) -> datetime:
        return datetime.now(UTC) + self.offset

    @property
    def coordinator(self) -> str:
        return f"localhost:{self.main_port}"

    def start(self) -> None:
        started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(started)))
        self._thread.start()
        assert started.wait(60)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(60)
        self._loop.close()

    async def _serve(self, started: threading.Event) -> None:
        self._stopped = asyncio.Event()
        credential = load_credential(self.home.credential, datetime.now(UTC))
        certificates = self.certificates = Certificates(self.database, lambda: self.authority, self.clock)
        # Tests share one address, and few callers.
        limits = Limits(LimitsConfig(failed_enrolments_per_min=200, open_streams=OPEN_STREAMS))
        interceptors = edge_interceptors(
            "lab",
            certificates.check,
            self.clock,
            roles_of=Grants(self.database).roles_of,
            audit=CallAudit(AuditLog(self.database)),
            limits=limits,
        )
        main = grpc.aio.server(interceptors=interceptors, options=SERVER_OPTIONS)
        self.probe = AdminProbe()
        admin_pb2_grpc.add_AdminServicer_to_server(self.probe, main)
        for module, service in UNIMPLEMENTED:
            getattr(module, f"add_{service}_to_server")(getattr(module, service)(), main)
        certificates_pb2_grpc.add_CertificatesServicer_to_server(
            CertificatesService(certificates, 1, cast(Any, None)), main
        )
        grants, audit = Grants(self.database), AuditLog(self.database)
        access_pb2_grpc.add_AccessServicer_to_server(AccessService(grants), main)
        audit_pb2_grpc.add_AuditServicer_to_server(AuditService(audit, grants), main)
        requests = self.requests = EnrollmentRequests(
            self.database, lambda: self.authority, LimitsConfig(), self.clock
        )
        self.health = HealthService()
        self.health.set("fedcore.v1.Federation", True)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, main)
        self.main_port = main.add_secure_port(
            "localhost:0", server_credentials(credential, require_client_certificate=True)
        )
        enrolment = grpc.aio.server(interceptors=interceptors, options=SERVER_OPTIONS)
        self.enroll_port = enrolment.add_secure_port(
            "localhost:0", server_credentials(credential, require_client_certificate=False)
        )
        self.tokens = Tokens(
            self.database,
            lambda: self.authority,
            coordinator=self.coordinator,
            enroll_port=self.enroll_port,
            clock=self.clock,
        )
        enrollment_pb2_grpc.add_EnrollmentServicer_to_server(
            EnrollmentService(
                self.tokens, certificates, requests, limits, self.coordinator, self.enroll_port
            ),
            enrolment,
        )
        membership_pb2_grpc.add_MembershipServicer_to_server(MembershipService(self.tokens, requests), main)
        # A mistake on purpose: even served on the port that asks for no certificate, Admin stays closed.
        admin_pb2_grpc.add_AdminServicer_to_server(AdminProbe(), enrolment)
        await main.start()
        await enrolment.start()
        started.set()
        await self._stopped.wait()
        self.health.shut_down()
        await main.stop(0)
        await enrolment.stop(0)

    def token(self, site: str, ttl_s: float = 900.0) -> str:
        return asyncio.run(self.tokens.create(site, ttl_s)).token

    def sites(self) -> list[str]:
        return [row.id for row in Registry(self.database).sites()]

    def credential(self, folder: Path, subject: Subject, authority: Authority | None = None, **more) -> Path:
        key = new_key()
        signer = authority or self.authority
        now = more.pop("now", datetime.now(UTC))
        chain = signer.issue(subject, key.public_key(), now)
        self.database.write_now(lambda c: record_certificate(c, chain[0], subject, now))
        write_credential(
            folder,
            coordinator=self.coordinator,
            subject=subject,
            key=key,
            chain=chain,
            roots=[more.pop("root", signer.root)],
        )
        return folder


@pytest.fixture(scope="module")
def edge(tmp_path_factory) -> Iterator[Edge]:
    home = tmp_path_factory.mktemp("coordinator") / "home"
    initialise(home, name="lab", host="localhost", port=8443, enroll_port=8444, now=datetime.now(UTC))
    paths = ServerHome(home)
    database = open_database(paths.database, MIGRATIONS)
    edge = Edge(paths, load_authority(paths.pki, "lab"), database)
    for role in (OPERATOR, OWNER):
        database.write_now(lambda c, role=role: grant(c, "ann", role, datetime.now(UTC), "test"))
    edge.start()
    yield edge
    edge.stop()
    database.close()


@pytest.fixture(scope="module")
def operator(edge, tmp_path_factory) -> Path:
    return edge.credential(
        tmp_path_factory.mktemp("operator") / "credential", Subject("lab", "operator", "ann")
    )


@pytest.fixture(scope="module")
def site(edge, tmp_path_factory) -> Path:
    return edge.credential(tmp_path_factory.mktemp("site") / "credential", Subject("lab", "site", "clinic-a"))


@pytest.fixture(scope="module")
def members(edge, site, tmp_path_factory) -> dict[str, Path]:
    """A credential for each role a caller may be let in as; the operator without a grant is ANY_OPERATOR."""
    folders = {SITE: site}
    for number, role in enumerate((ANY_OPERATOR, *GRANTABLE)):
        name = f"member-{number}"
        folders[role] = edge.credential(
            tmp_path_factory.mktemp(name) / "credential", Subject("lab", "operator", name)
        )
        if role != ANY_OPERATOR:
            edge.database.write_now(lambda c, n=name, r=role: grant(c, n, r, datetime.now(UTC), "test"))
    return folders


def admin_error(
    channel: grpc.Channel, call=lambda stub: stub.WhoAmI(admin_pb2.WhoAmIRequest())
) -> FedimpresError:
    with channel, pytest.raises(grpc.RpcError) as caught:
        call(admin_pb2_grpc.AdminStub(channel))
    return from_rpc_error(caught.value, "coordinator")


def handshake(port: int, version: ssl.TLSVersion, credential: Path) -> str:
    context = ssl.create_default_context(cafile=str(credential / "ca.crt"))
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(credential / "tls.crt", credential / "tls.key")
    with socket.create_connection(("localhost", port), 60) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as connection:
            return connection.version() or ""


@pytest.mark.parametrize("port", ["main_port", "enroll_port"])
def test_tls_1_3_is_accepted_and_tls_1_2_refused_on_both_ports(edge, operator, port):
    assert handshake(getattr(edge, port), ssl.TLSVersion.TLSv1_3, operator) == "TLSv1.3"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(getattr(edge, port), ssl.TLSVersion.TLSv1_2, operator)


def test_the_caller_is_who_the_certificate_says(edge, operator):
    with open_sync_channel(operator) as channel:
        reply = admin_pb2_grpc.AdminStub(channel).WhoAmI(admin_pb2.WhoAmIRequest())
    certificate = load_credential(operator, datetime.now(UTC)).certificate
    assert (reply.federation, reply.role, reply.id) == ("lab", "operator", "ann")
    assert reply.serial == f"{certificate.serial_number:x}"


def test_no_client_certificate_is_refused_by_tls(edge):
    anonymous = grpc.secure_channel(
        edge.coordinator,
        grpc.ssl_channel_credentials(edge.authority.root_pem.encode()),
        client_options(),
    )
    error = admin_error(anonymous)
    assert isinstance(error, UnreachableError)
    assert exit_code_of(error) == 3
    assert "refuses this certificate" in error.hint


def test_a_certificate_of_another_ca_is_refused_by_tls(edge, tmp_path):
    now = datetime.now(UTC)
    root = make_root("lab", now)
    foreign = Authority("lab", root.certificate, make_issuing_ca(root, "lab", now))
    folder = edge.credential(tmp_path / "forged", Subject("lab", "operator", "ann"), foreign)
    # It knows the real root, so that only its own certificate is wrong.
    forged = load_credential(folder, now)
    channel = grpc.secure_channel(
        edge.coordinator,
        grpc.ssl_channel_credentials(edge.authority.root_pem.encode(), forged.key_pem, forged.chain_pem),
        client_options(),
    )
    error = admin_error(channel)
    assert isinstance(error, UnreachableError)
    assert "refuses this certificate" in error.hint
    # And a member that trusts another root refuses the coordinator.
    error = admin_error(open_sync_channel(folder))
    assert isinstance(error, UnreachableError)
    assert "CERTIFICATE_VERIFY_FAILED" in error.message
    assert "not of this federation" in error.hint


def test_the_coordinator_must_be_called_by_a_name_in_its_certificate(edge, operator):
    loaded = load_credential(operator, datetime.now(UTC))
    channel = grpc.secure_channel(
        edge.coordinator,
        grpc.ssl_channel_credentials(loaded.ca_pem, loaded.key_pem, loaded.chain_pem),
        [*client_options(), ("grpc.ssl_target_name_override", "elsewhere.example.org")],
    )
    error = admin_error(channel)
    assert isinstance(error, UnreachableError)
    assert "does not name this host" in error.hint


@pytest.mark.parametrize("subject", [Subject("lab", "coordinator", ""), Subject("lab", "site", "x")])
def test_site_and_coordinator_certificates_do_not_open_admin(edge, tmp_path, subject):
    folder = edge.credential(tmp_path / "credential", subject)
    error = admin_error(open_sync_channel(folder))
    if subject.role == "coordinator":  # a server certificate makes no calls: TLS refuses it already
        assert isinstance(error, UnreachableError | IdentityError)
        return
    assert isinstance(error, PermissionDeniedError)
    assert exit_code_of(error) == 4
    assert "site/x may not call Admin/WhoAmI: it is granted to any operator" in error.message


def test_an_operator_may_not_speak_for_a_site(edge, operator):
    with open_sync_channel(operator) as channel, pytest.raises(grpc.RpcError) as caught:
        federation_pb2_grpc.FederationStub(channel).Hello(federation_pb2.HelloRequest())
    error = from_rpc_error(caught.value, "coordinator")
    assert isinstance(error, PermissionDeniedError)
    assert "granted to site" in error.message


def test_an_ended_certificate_is_refused_on_an_open_connection(edge, operator):
    with open_sync_channel(operator) as channel:
        stub = admin_pb2_grpc.AdminStub(channel)
        assert stub.WhoAmI(admin_pb2.WhoAmIRequest()).id == "ann"
        edge.offset = timedelta(days=31)
        try:
            with pytest.raises(grpc.RpcError) as caught:
                stub.WhoAmI(admin_pb2.WhoAmIRequest())
        finally:
            edge.offset = timedelta(0)
        error = from_rpc_error(caught.value, "coordinator")
        assert isinstance(error, IdentityError)
        assert "certificate ended at" in error.message
        assert stub.WhoAmI(admin_pb2.WhoAmIRequest()).id == "ann"


def test_errors_keep_class_message_and_hint_across_the_wire(edge, operator):
    error = admin_error(
        open_sync_channel(operator), lambda stub: stub.GetRun(admin_pb2.GetRunRequest(run="r9"))
    )
    assert type(error) is NotFoundError
    assert error.message == "no run 'r9'"
    assert error.hint == "fedctl run list – zeigt alle"


def test_a_bug_tells_the_caller_nothing_of_its_inside(edge, operator, capfd):
    error = admin_error(
        open_sync_channel(operator), lambda stub: stub.GetRun(admin_pb2.GetRunRequest(run="bug"))
    )
    assert error.code == "internal"
    assert "secret" not in error.message
    assert exit_code_of(error) == 70


def test_an_error_inside_a_stream_is_translated_after_the_messages_before_it(edge, operator):
    with open_sync_channel(operator) as channel:
        stream = admin_pb2_grpc.AdminStub(channel).WatchRun(admin_pb2.GetRunRequest(run="r1"))
        assert next(stream).run == "r1"
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
    assert isinstance(from_rpc_error(caught.value, "coordinator"), ConflictError)


def test_a_call_without_a_deadline_of_its_own_has_the_table_s(edge, operator, monkeypatch):
    monkeypatch.setitem(CALLS, "/fedcore.v1.Admin/GetRun", CallPolicy(0.3))
    error = admin_error(
        open_sync_channel(operator), lambda stub: stub.GetRun(admin_pb2.GetRunRequest(run="slow"))
    )
    assert isinstance(error, CallTimeoutError)
    assert exit_code_of(error) == 5


def test_only_idempotent_calls_are_repeated(edge, operator):
    edge.probe.attempts = 0
    error = admin_error(
        open_sync_channel(operator), lambda stub: stub.GetRun(admin_pb2.GetRunRequest(run="flaky"))
    )
    assert error.message == "attempt 3"
    edge.probe.attempts = 0
    error = admin_error(
        open_sync_channel(operator), lambda stub: stub.PauseRun(admin_pb2.ControlRunRequest(run="r"))
    )
    assert error.message == "attempt 1"


def test_client_streams_pass_with_their_caller(edge, operator):
    from fedcore.v1 import tensor_pb2

    parts = (tensor_pb2.ArtifactPart(chunk=tensor_pb2.Chunk(offset=i, data=b"x" * 2**21)) for i in range(3))
    with open_sync_channel(operator) as channel:
        assert admin_pb2_grpc.AdminStub(channel).UploadModel(parts).digest == "ann:3"


def test_the_asyncio_channel_meets_the_same_edge(edge, site):
    async def call() -> FedimpresError:
        async with open_channel(site) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            reply = await health.Check(health_pb2.HealthCheckRequest(service="fedcore.v1.Federation"))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health.Check(health_pb2.HealthCheckRequest(service="nothing"))
            return from_rpc_error(caught.value, "coordinator")

    assert isinstance(asyncio.run(call()), NotFoundError)


def test_health_is_watched_through_the_edge(edge, operator):
    statuses = health_pb2.HealthCheckResponse
    with open_sync_channel(operator) as channel:
        stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert next(stream).status == statuses.SERVING
        edge._loop.call_soon_threadsafe(edge.health.set, "fedcore.v1.Admin", False)
        assert next(stream).status == statuses.NOT_SERVING
        edge._loop.call_soon_threadsafe(edge.health.set, "fedcore.v1.Admin", True)
        assert next(stream).status == statuses.SERVING
        stream.cancel()


def test_a_caller_with_too_many_open_calls_is_refused_and_nobody_else(edge, operator, site):
    watch = health_pb2.HealthCheckRequest(service="")

    def refused(channel: grpc.Channel) -> FedimpresError | None:
        call = health_pb2_grpc.HealthStub(channel).Watch(watch)
        try:
            next(call)
        except grpc.RpcError as error:
            return from_rpc_error(error, "coordinator")
        finally:
            call.cancel()
        return None

    with open_sync_channel(operator) as channel, open_sync_channel(site) as other:
        stub = health_pb2_grpc.HealthStub(channel)
        held = [stub.Watch(watch) for _ in range(OPEN_STREAMS)]
        assert all(next(call).status for call in held)
        error = refused(channel)
        assert isinstance(error, OverloadedError)
        assert (
            error.message == f"operator/ann has {OPEN_STREAMS} open calls already, the limit for one member"
        )
        assert "open_streams of [limits]" in error.hint
        assert refused(other) is None
        for call in held:
            call.cancel()
        wait_until(lambda: refused(channel) is None, "calls that ended count no longer", every_s=0.1)


def outcome(channel: grpc.Channel, method: str) -> FedimpresError | None:
    """Call any method with an empty message, as a raw stream in both directions."""
    call = channel.stream_stream(method)(iter([b""]), timeout=270)
    try:
        next(call, None)
    except grpc.RpcError as error:
        return from_rpc_error(error, "coordinator")
    finally:
        call.cancel()
    return None


@pytest.mark.parametrize("method", sorted(ROLES))
def test_every_method_lets_in_the_roles_of_the_table_and_nobody_else(edge, members, method):
    for role, folder in members.items():
        with open_sync_channel(folder) as channel:
            error = outcome(channel, method)
        if ANYONE in ROLES[method]:  # not served on this port at all
            assert isinstance(error, ProtocolError)
        elif ROLES[method] & {role, role if role == SITE else ANY_OPERATOR}:
            assert not isinstance(error, PermissionDeniedError)
            # Renew's handler found its empty request wanting; the caller had been let in.
            assert not isinstance(error, IdentityError) or "certificate request" in error.message
        else:
            assert isinstance(error, PermissionDeniedError), (role, error)
    root = grpc.ssl_channel_credentials(edge.authority.root_pem.encode())
    for port in (edge.main_port, edge.enroll_port):
        options = [*client_options(), ("grpc.enable_retries", 0)]
        with grpc.secure_channel(f"localhost:{port}", root, options) as channel:
            error = outcome(channel, method)
        if port == edge.main_port:
            assert isinstance(error, UnreachableError)
        elif ANYONE in ROLES[method]:
            # Its empty request is found wanting: nobody was asked for a certificate.
            assert "no client certificate" not in str(error)
            assert isinstance(error, IdentityError | ConfigError | NotFoundError | OverloadedError)
        elif "Admin" in method:  # served there by mistake: identity refuses
            assert type(error) is IdentityError
            assert "no client certificate" in error.message
        else:
            assert isinstance(error, ProtocolError)


# What is wrong with a certificate, and what finds it: the handshake, or the look at the caller of each call.
FOUND_BY_TLS, FOUND_BY_IDENTITY = ("foreign CA", "expired"), ("revoked", "wrong SAN")


@pytest.fixture(scope="module")
def outsiders(edge) -> Iterator[dict[tuple[str, str], grpc.Channel]]:
    """A channel for each wrong certificate of each role that would be let in with a right one."""
    now = datetime.now(UTC)
    root = make_root("lab", now)
    foreign = Authority("lab", root.certificate, make_issuing_ca(root, "lab", now))
    admin = Caller("lab", "operator", "admin", "0", now)
    with ExitStack() as opened:
        channels = {}
        for number, role in enumerate((SITE, ANY_OPERATOR, *GRANTABLE)):
            kind, name = (SITE if role == SITE else "operator"), f"outsider-{number}"
            if role in GRANTABLE:
                edge.database.write_now(lambda c, n=name, r=role: grant(c, n, r, now, "test"))
            for wrong in (*FOUND_BY_TLS, *FOUND_BY_IDENTITY):
                subject = Subject("elsewhere" if wrong == "wrong SAN" else "lab", kind, name)
                signer = foreign if wrong == "foreign CA" else edge.authority
                key = new_key()
                life = timedelta(minutes=-1 if wrong == "expired" else 60)
                leaf = make_leaf(
                    signer.issuing, key.public_key(), federation="lab", spiffe_id=subject.spiffe_id,
                    hosts=(), server=False, now=now, lifetime=life,
                )  # fmt: skip
                chain = [leaf, signer.issuing.certificate]
                edge.database.write_now(lambda c, x=chain, s=subject: record_certificate(c, x[0], s, now))
                if wrong == "revoked":
                    serial = f"{chain[0].serial_number:x}"
                    asyncio.run(edge.certificates.revoke(serial, by=admin, reason="matrix"))
                credentials = grpc.ssl_channel_credentials(
                    edge.authority.root_pem.encode(), key_to_pem(key), certificates_to_pem(chain)
                )
                options = [*client_options(), ("grpc.enable_retries", 0)]
                channel = grpc.secure_channel(edge.coordinator, credentials, options)
                channels[wrong, role] = opened.enter_context(channel)
        yield channels


@pytest.mark.parametrize("method", sorted(ROLES))
def test_every_method_is_closed_to_every_wrong_certificate_whatever_its_role(edge, outsiders, method):
    for (wrong, role), channel in outsiders.items():
        error = outcome(channel, method)
        if wrong in FOUND_BY_TLS:
            assert isinstance(error, UnreachableError), (wrong, role, error)
        elif ANYONE in ROLES[method]:  # not served on this port at all
            assert isinstance(error, ProtocolError), (wrong, role, error)
        else:
            assert type(error) is IdentityError, (wrong, role, error)
            assert ("was revoked" if wrong == "revoked" else "elsewhere") in error.message


def test_no_role_is_let_in_over_tls_1_2(edge, members):
    for folder in members.values():
        for port in (edge.main_port, edge.enroll_port):
            assert handshake(port, ssl.TLSVersion.TLSv1_3, folder) == "TLSv1.3"
            with pytest.raises((ssl.SSLError, ConnectionError)):
                handshake(port, ssl.TLSVersion.TLSv1_2, folder)


def test_enrolment_gives_a_credential_that_the_main_port_accepts(edge, tmp_path):
    pinned = ":".join(edge.authority.root_fingerprint.upper()[i : i + 2] for i in range(0, 64, 2))
    enrolled = enroll(
        tmp_path / "home", coordinator=edge.coordinator, token=edge.token("clinic-b"), ca_fingerprint=pinned
    )
    assert (enrolled.site, enrolled.federation) == ("clinic-b", "lab")
    credential = load_credential(tmp_path / "home" / "credential", datetime.now(UTC))
    assert credential.subject == Subject("lab", "site", "clinic-b")
    assert credential.coordinator == edge.coordinator
    assert (credential.folder / "tls.key").stat().st_mode & 0o777 == 0o600
    assert "clinic-b" in edge.sites()
    row = Registry(edge.database).site("clinic-b")
    assert row.enabled
    assert row.certificate_not_after.startswith(
        f"{credential.certificate.not_valid_after_utc:%Y-%m-%dT%H:%M}"
    )
    with open_sync_channel(credential) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    from fedagent.config import AgentConfig
    from fedcore.config import load_config

    assert load_config(tmp_path / "home" / "agent.toml", AgentConfig) == AgentConfig()


def test_a_home_is_enrolled_once_unless_forced(edge, tmp_path):
    pinned = edge.authority.root_fingerprint
    terms = {"coordinator": edge.coordinator, "ca_fingerprint": pinned}
    enroll(tmp_path / "home", token=edge.token("clinic-c"), **terms)
    key = (tmp_path / "home/credential/tls.key").read_bytes()
    (tmp_path / "home/agent.toml").write_text("log_level = 'debug'\n")
    token = edge.token("clinic-c")
    with pytest.raises(ConflictError, match="enrolled already"):
        enroll(tmp_path / "home", token=token, **terms)
    assert (tmp_path / "home/credential/tls.key").read_bytes() == key
    enroll(tmp_path / "home", token=token, force=True, **terms)
    assert (tmp_path / "home/credential/tls.key").read_bytes() != key
    assert (tmp_path / "home/agent.toml").read_text() == "log_level = 'debug'\n"
    assert sorted(p.name for p in (tmp_path / "home").iterdir()) == ["agent.toml", "credential"]


def refused(edge: Edge, home: Path, kind: type[FedimpresError], **changes) -> FedimpresError:
    terms = {"coordinator": edge.coordinator, "ca_fingerprint": edge.authority.root_fingerprint, **changes}
    before = edge.sites()
    with pytest.raises(kind) as caught:
        enroll(home, **terms)
    assert edge.sites() == before
    assert not home.exists()
    return caught.value


def test_a_used_token_is_refused(edge, tmp_path):
    token = edge.token("clinic-d")
    enroll(
        tmp_path / "1",
        coordinator=edge.coordinator,
        token=token,
        ca_fingerprint=edge.authority.root_fingerprint,
    )
    error = refused(edge, tmp_path / "2", TokenError, token=token)
    assert "was used at" in error.message
    assert exit_code_of(error) == 4


def test_an_expired_token_is_refused(edge, tmp_path):
    token = edge.token("clinic-e", ttl_s=60)
    edge.offset = timedelta(seconds=61)
    try:
        error = refused(edge, tmp_path / "1", TokenError, token=token)
    finally:
        edge.offset = timedelta(0)
    assert "expired at" in error.message
    assert "new token" in error.hint


def test_unknown_id_and_wrong_secret_look_alike_and_use_nothing_up(edge, tmp_path):
    token = edge.token("clinic-f")
    good = decode_token(token)
    wrong = [
        type(good)(good.id, "x" * 43, good.site, good.port, good.ca_pem),
        type(good)("0" * 16, good.secret, good.site, good.port, good.ca_pem),
    ]
    errors = [refused(edge, tmp_path / "1", TokenError, token=one.encode()) for one in wrong]
    assert errors[0].message == errors[1].message
    pinned = edge.authority.root_fingerprint
    assert (
        enroll(tmp_path / "2", coordinator=edge.coordinator, token=token, ca_fingerprint=pinned).site
        == "clinic-f"
    )


def test_a_token_for_another_site_can_not_be_redirected(edge, tmp_path):
    good = decode_token(edge.token("clinic-g"))
    bent = type(good)(good.id, good.secret, "clinic-h", good.port, good.ca_pem)
    with pytest.raises(IdentityError, match=r"enrolled 'clinic-g', but the token is for 'clinic-h'"):
        enroll(
            tmp_path / "1",
            coordinator=edge.coordinator,
            token=bent.encode(),
            ca_fingerprint=edge.authority.root_fingerprint,
        )
    assert not (tmp_path / "1").exists()
    assert "clinic-h" not in edge.sites()


@pytest.mark.parametrize("pinned", ["0" * 64, "1234", ""])
def test_a_wrong_fingerprint_is_refused_before_anything_is_sent(edge, tmp_path, pinned):
    token = edge.token("clinic-i")
    error = refused(edge, tmp_path / "1", FingerprintError, token=token, ca_fingerprint=pinned)
    assert error.hint
    pinned = edge.authority.root_fingerprint
    assert (
        enroll(tmp_path / "2", coordinator=edge.coordinator, token=token, ca_fingerprint=pinned).site
        == "clinic-i"
    )


def test_a_token_with_another_root_does_not_reach_the_coordinator(edge, tmp_path):
    other = make_root("lab", datetime.now(UTC))
    good = decode_token(edge.token("clinic-j"))
    from fedcore.pki import certificates_to_pem

    bent = type(good)(
        good.id, good.secret, good.site, good.port, certificates_to_pem([other.certificate]).decode()
    )
    refused(edge, tmp_path / "1", FingerprintError, token=bent.encode())
    error = refused(
        edge,
        tmp_path / "1",
        UnreachableError,
        token=bent.encode(),
        ca_fingerprint=fingerprint(other.certificate),
    )
    assert "not of this federation" in error.hint


def test_a_coordinator_that_is_not_there_is_told(edge, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        good = decode_token(edge.token("clinic-k"))
        away = type(good)(good.id, good.secret, good.site, probe.getsockname()[1], good.ca_pem)
    error = refused(edge, tmp_path / "1", UnreachableError, token=away.encode())
    assert "nothing listens there" in error.hint


def test_credential_folders_do_not_survive_a_missing_file(edge, site, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(site, copy)
    (copy / "tls.key").unlink()
    with pytest.raises(FedimpresError, match=r"tls\.key"):
        open_sync_channel(copy)


def rows(edge: Edge) -> int:
    return edge.database.read(lambda c: c.execute("SELECT count(*) FROM tokens").fetchone()[0])


def test_ten_thousand_guesses_leave_enrolment_answering_others(edge, tmp_path):
    token = decode_token(edge.token("clinic-guessed"))
    tokens = iter([edge.token(f"clinic-g{number}") for number in range(4)])
    root = grpc.ssl_channel_credentials(edge.authority.root_pem.encode())
    refused: list[FedimpresError] = []
    before = AuditLog(edge.database).head().sequence
    tables = rows(edge)
    with grpc.secure_channel(f"localhost:{edge.enroll_port}", root, client_options()) as channel:
        enroll_call = enrollment_pb2_grpc.EnrollmentStub(channel).Enroll
        for batch in range(40):
            guesses = [
                enroll_call.future(
                    enrollment_pb2.EnrollRequest(
                        token_id=token.id if number % 2 else f"{number:016x}",
                        token_secret=f"guess-{batch}-{number}",
                        csr_pem="x" * 1000,
                    )
                )
                for number in range(250)
            ]
            if batch % 10 == 5:  # in the midst of them, somebody enrols
                home = tmp_path / f"home-{batch}"
                enroll(
                    home,
                    coordinator=edge.coordinator,
                    token=next(tokens),
                    ca_fingerprint=edge.authority.root_fingerprint,
                )
            refused += [from_rpc_error(guess.exception(), "coordinator") for guess in guesses]
    assert len(refused) == 10_000
    assert {type(error) for error in refused} == {TokenError, OverloadedError}
    told = [error for error in refused if isinstance(error, TokenError)]
    hushed = [error for error in refused if isinstance(error, OverloadedError)]
    assert {error.message for error in told} == {"the enrolment token is not known here"}
    assert len(told) < 1000, "the others were only told to stop"
    assert "refused enrolments a minute from" in hushed[0].message
    assert (rows(edge), edge.requests.rows()) == (tables, []), "guesses leave nothing behind"
    assert {f"clinic-g{number}" for number in range(4)} <= set(edge.sites())
    assert "clinic-guessed" not in edge.sites()
    # The log says that it happened and how often, without being flooded.
    found = [entry.document for entry in AuditLog(edge.database).walk(before)]
    guesses_seen = [one for one in found if one["result"] in ("token_refused", "overloaded")]
    assert 1 <= len(guesses_seen) <= 40  # earlier tests have used some of the twenty
    assert len([one for one in found if one["result"] == "ok"]) == 4
