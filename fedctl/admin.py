"""The operator's connection to a coordinator: every call mapped to our errors, with a deadline."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from fedctl.contexts import check_complete, load_contexts
from fedctl.invocation import Invocation

if TYPE_CHECKING:
    import grpc

    from fedcore.v1.access_pb2_grpc import AccessStub
    from fedcore.v1.admin_pb2_grpc import AdminStub
    from fedcore.v1.audit_pb2_grpc import AuditStub
    from fedcore.v1.backup_pb2_grpc import BackupStub
    from fedcore.v1.certificates_pb2_grpc import CertificatesStub
    from fedcore.v1.impressions_pb2_grpc import ImpressionsStub
    from fedcore.v1.membership_pb2_grpc import MembershipStub
    from fedcore.v1.operations_pb2_grpc import OperationsStub
    from fedcore.v1.sites_pb2_grpc import SitesStub

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")


class Admin:
    """Calls of the Admin service. Build with `open_admin`. Every call raises FedimpresError, nothing of
    gRPC's.

    Deadlines and retries are those of `fedcore.channel`.
    """

    def __init__(self, stub: "AdminStub", who: str, channel: "grpc.Channel | None" = None) -> None:
        self.stub = stub
        self.who = who
        self._channel = channel

    @property
    def certificates(self) -> "CertificatesStub":
        """The Certificates service of the same connection: `admin.call(lambda _: admin.certificates.Renew, ...)`."""
        from fedcore import tls as _tls  # noqa: F401 - before grpc

        # isort: split
        from fedcore.v1.certificates_pb2_grpc import CertificatesStub

        assert self._channel is not None, "opened by open_credential"
        return CertificatesStub(self._channel)

    @property
    def access(self) -> "AccessStub":
        """The Access service of the same connection."""
        from fedcore import tls as _tls  # noqa: F401 - before grpc

        # isort: split
        from fedcore.v1.access_pb2_grpc import AccessStub

        assert self._channel is not None, "opened by open_credential"
        return AccessStub(self._channel)

    @property
    def sites(self) -> "SitesStub":
        """The Sites service of the same connection."""
        from fedcore import tls as _tls  # noqa: F401 - before grpc

        # isort: split
        from fedcore.v1.sites_pb2_grpc import SitesStub

        assert self._channel is not None, "opened by open_credential"
        return SitesStub(self._channel)

    @property
    def membership(self) -> "MembershipStub":
        """The Membership service of the same connection."""
        from fedcore import tls as _tls  # noqa: F401 - before grpc

        # isort: split
        from fedcore.v1.membership_pb2_grpc import MembershipStub

        assert self._channel is not None, "opened by open_credential"
        return MembershipStub(self._channel)

    @property
    def audit(self) -> "AuditStub":
        """The Audit service of the same connection."""
        from fedcore import tls as _tls  # noqa: F401 - before grpc

        # isort: split
        from fedcore.v1.audit_pb2_grpc import AuditStub

        assert self._channel is not None, "opened by open_credential"
        return AuditStub(self._channel)

    @property
    def operations(self) -> "OperationsStub":
        """The Operations service of the same connection."""
        from fedcore import tls as _tls  # noqa: F401 - before grpc

        # isort: split
        from fedcore.v1.operations_pb2_grpc import OperationsStub

        assert self._channel is not None, "opened by open_credential"
        return OperationsStub(self._channel)

    @property
    def impressions(self) -> "ImpressionsStub":
        """The Impressions service of the same connection."""
        from fedcore import tls as _tls  # noqa: F401 - before grpc

        # isort: split
        from fedcore.v1.impressions_pb2_grpc import ImpressionsStub

        assert self._channel is not None, "opened by open_credential"
        return ImpressionsStub(self._channel)

    @property
    def backup(self) -> "BackupStub":
        """The Backup service of the same connection."""
        from fedcore import tls as _tls  # noqa: F401 - before grpc

        # isort: split
        from fedcore.v1.backup_pb2_grpc import BackupStub

        assert self._channel is not None, "opened by open_credential"
        return BackupStub(self._channel)

    def call(
        self,
        method: Callable[["AdminStub"], "grpc.UnaryUnaryMultiCallable[RequestT, ReplyT]"],
        request: RequestT,
    ) -> ReplyT:
        """One question, one answer: `admin.call(lambda stub: stub.GetRun, request)`."""
        with self.errors():
            return method(self.stub)(request)

    def stream(
        self,
        method: Callable[["AdminStub"], "grpc.UnaryStreamMultiCallable[RequestT, ReplyT]"],
        request: RequestT,
        timeout_s: float | None = None,
    ) -> Generator[ReplyT, None, None]:
        """One question, many answers. Closing the generator cancels the call."""
        with self.errors():
            call = method(self.stub)(request, timeout=timeout_s)
            try:
                yield from call
            finally:
                call.cancel()

    def upload(
        self,
        method: Callable[["AdminStub"], "grpc.StreamUnaryMultiCallable[RequestT, ReplyT]"],
        parts: Iterator[RequestT],
    ) -> ReplyT:
        """Many parts, one answer."""
        with self.errors():
            return method(self.stub)(parts)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn gRPC's errors into ours."""
        from fedcore.status import from_rpc_error

        # isort: split
        import grpc

        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.who) from error


@contextlib.contextmanager
def open_credential(folder: Path) -> Iterator[Admin]:
    """Connect with the credential in a folder. Raises ConfigError, IdentityError; the calls raise what they
    find.
    """
    from fedcore.channel import open_sync_channel
    from fedcore.credential import load_credential
    from fedcore.v1.admin_pb2_grpc import AdminStub

    check_complete(folder)
    credential = load_credential(folder, datetime.now(UTC))
    channel = open_sync_channel(credential)
    try:
        yield Admin(AdminStub(channel), f"coordinator {credential.coordinator}", channel)
    finally:
        channel.close()


@contextlib.contextmanager
def open_admin(ctx: typer.Context) -> Iterator[Admin]:
    """Connect to the coordinator of the context that the command line chose. Raises ConfigError,
    NotFoundError.
    """
    invocation: Invocation = ctx.obj
    with open_credential(load_contexts(invocation.config_dir).folder(invocation.context)) as admin:
        yield admin


def get_run(admin: Admin, run: str) -> Any:
    """A run by its id or a unique beginning of one. Raises NotFoundError."""
    from fedcore.v1 import admin_pb2

    return admin.call(lambda stub: stub.GetRun, admin_pb2.GetRunRequest(run=run))


def list_records(admin: Admin, run: str) -> list[dict[str, Any]]:
    """The records of a run's finished rounds, oldest first. Raises NotFoundError."""
    import json

    from fedcore.v1 import admin_pb2

    records, token = [], None
    while token != "":
        request = admin_pb2.ListRoundsRequest(run=run, page_token=token or "")
        reply = admin.call(lambda stub: stub.ListRounds, request)
        records += [json.loads(text) for text in reply.records_json]
        token = reply.next_page_token
    return records
