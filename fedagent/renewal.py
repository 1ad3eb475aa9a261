"""Keeps the site's certificate current: renewed after two thirds of its life over the running connection, or, once it
has ended, on the enrolment port by a signature with the old key.

Work goes on: the credential folder is replaced in one step, then the driver opens its connection anew, as after a
short cut.
"""

import asyncio
import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import structlog

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.channel import open_enrollment_channel
from fedcore.credential import Credential, accept_renewal, join_address, load_credential, split_address
from fedcore.errors import FedimpresError, IdentityError, code_of
from fedcore.pki import certificates_to_pem, key_from_pem, make_request, new_key, serial_text
from fedcore.renewal import ended_statement, renew_at, retry_s, sign_statement
from fedcore.status import from_rpc_error
from fedcore.v1 import certificates_pb2, certificates_pb2_grpc, enrollment_pb2, enrollment_pb2_grpc

# isort: split
import grpc

_LONGEST_SLEEP_S = 60.0  # the wall clock may be set, and the folder replaced by `fedagent enroll --force`
log = structlog.get_logger(__name__)


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


class Renewal:
    """Renews the credential in `folder`. `stub` gives the Certificates service over the present connection (it raises
    UnreachableError while there is none); `renewed` is called after the folder was replaced.
    """

    def __init__(
        self,
        folder: Path,
        proxy: str | None,
        stub: "Callable[[], certificates_pb2_grpc.CertificatesAsyncStub]",
        renewed: Callable[[], None],
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._folder = folder
        self._proxy = proxy
        self._stub = stub
        self._renewed = renewed
        self._clock = clock
        self._asked = asyncio.Event()

    def hurry(self) -> None:
        """Renew now, whatever the certificate's age."""
        self._asked.set()

    async def serve(self) -> None:
        """Renew whenever it is due or asked for, until cancelled. A failure is logged and tried again."""
        while True:
            try:
                credential = load_credential(self._folder, self._clock(), allow_expired=True)
            except FedimpresError as error:
                log.error("the site's credential can't be read", code=error.code, error=str(error))
                await asyncio.sleep(_LONGEST_SLEEP_S)
                continue
            wait_s = (renew_at(credential.certificate) - self._clock()).total_seconds()
            if wait_s > 0 and not self._asked.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._asked.wait(), min(wait_s, _LONGEST_SLEEP_S))
            elif await self._try(credential):
                self._asked.clear()
            else:
                await asyncio.sleep(retry_s(credential.certificate))

    async def _try(self, credential: Credential) -> bool:
        try:
            await self.renew(credential)
        except grpc.RpcError as error:
            failure: Exception = from_rpc_error(error, "coordinator")
        except (FedimpresError, OSError) as error:
            failure = error
        else:
            self._renewed()
            return True
        log.warning(
            "the site's certificate can't be renewed yet",
            until=credential.certificate.not_valid_after_utc.isoformat(),
            code=code_of(failure),
            error=str(failure),
            again_in_s=round(retry_s(credential.certificate), 1),
        )
        return False

    async def renew(self, credential: Credential) -> None:
        """Renew now, with a new key, and replace the folder.

        Raises FedimpresError, grpc.RpcError or OSError; the folder is then as it was.
        """
        ended = self._clock() > credential.certificate.not_valid_after_utc
        key = new_key()
        csr_pem = make_request(key, credential.subject.id).decode()
        if ended:
            reply = await asyncio.to_thread(self._ask_enrolment_port, credential, csr_pem)
        else:
            reply = await self._stub().Renew(certificates_pb2.RenewRequest(csr_pem=csr_pem))
        accept_renewal(
            credential,
            key,
            reply.certificate_chain_pem,
            reply.ca_pem,
            self._clock(),
            enroll_port=reply.enroll_port or None,
        )
        log.info(
            "the site's certificate was renewed", replaced=serial_text(credential.certificate), ended=ended
        )

    def _ask_enrolment_port(self, credential: Credential, csr_pem: str) -> certificates_pb2.RenewReply:
        if credential.enroll_port is None:
            raise IdentityError(
                f"credential {self._folder}: the certificate has ended, and the enrolment port is not known",
                hint="enrol again with a new token: fedagent enroll --force",
            )
        host, _ = split_address(credential.coordinator)
        address = join_address(host, credential.enroll_port)
        serial = serial_text(credential.certificate)
        statement = ended_statement(credential.federation, serial, csr_pem)
        old_key = key_from_pem(credential.key_pem, str(self._folder / "tls.key"))
        request = enrollment_pb2.RenewEndedRequest(
            certificate_pem=certificates_to_pem([credential.certificate]).decode(),
            csr_pem=csr_pem,
            signature=sign_statement(old_key, statement),
        )
        with open_enrollment_channel(address, credential.ca_pem, proxy=self._proxy) as channel:
            return enrollment_pb2_grpc.EnrollmentStub(channel).RenewEnded(request)
