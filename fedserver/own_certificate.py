"""The coordinator's own certificate: renewed in this process after two thirds of its life, served without a restart."""

import asyncio
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import structlog

from fedcore.credential import Credential, load_credential, write_credential
from fedcore.errors import FedimpresError
from fedcore.pki import LOOPBACK_NAMES, issuer_key_id, key_id, new_key, serial_text
from fedcore.renewal import renew_at, retry_s
from fedserver.certificates import Certificates
from fedserver.registry import utc_now

_LONGEST_SLEEP_S = 60.0  # the wall clock may be set
log = structlog.get_logger(__name__)


class OwnCertificate:
    """Keeps the credential folder of the coordinator current. `host` is the name that members dial.

    An ended certificate is no obstacle: the issuing CA lies beside it, and `prepare` makes a new one at start.
    """

    def __init__(
        self, folder: Path, host: str, certificates: Certificates, clock: Callable[[], datetime] = utc_now
    ) -> None:
        self._folder = folder
        self._hosts = (host, *LOOPBACK_NAMES)
        self._certificates = certificates
        self._clock = clock
        self._current = load_credential(folder, clock(), allow_expired=True)

    def current(self) -> Credential:
        """The newest credential. Any thread may ask."""
        return self._current

    async def prepare(self) -> None:
        """Renew before anything is served, if the certificate has ended meanwhile or a change of the CA was cut short.

        Raises as `renew`.
        """
        authority = self._certificates.authority
        ended = self._clock() > self._current.certificate.not_valid_after_utc
        signer = key_id(authority.signer_of("coordinator").certificate)
        moved = issuer_key_id(self._current.certificate) != signer
        if ended or moved or self._current.ca_pem != authority.roots_pem.encode():
            await self.renew()

    async def renew(self) -> None:
        """Make a new key and certificate now.

        Raises IdentityError if the issuing CA has ended, StorageError if the database fails, OSError if the folder
        can't be written: the old credential then stands.
        """
        old, key = self._current, new_key()
        chain = await self._certificates.issue(
            old.subject, key.public_key(), renews=serial_text(old.certificate), hosts=self._hosts
        )
        write_credential(
            self._folder,
            coordinator=old.coordinator,
            subject=old.subject,
            key=key,
            chain=chain,
            roots=self._certificates.authority.roots,
            replace=True,
        )
        self._current = load_credential(self._folder, self._clock())
        log.info(
            "the coordinator's certificate was renewed",
            serial=serial_text(chain[0]),
            until=chain[0].not_valid_after_utc.isoformat(),
        )

    async def serve(self) -> None:
        """Renew whenever it is due, until cancelled. A failure is logged and tried again."""
        while True:
            wait_s = (renew_at(self._current.certificate) - self._clock()).total_seconds()
            if wait_s > 0:
                await asyncio.sleep(min(wait_s, _LONGEST_SLEEP_S))
                continue
            try:
                await self.renew()
            except (FedimpresError, OSError) as error:
                again_s = retry_s(self._current.certificate)
                log.error(
                    "the coordinator's certificate can't be renewed",
                    until=self._current.certificate.not_valid_after_utc.isoformat(),
                    error=str(error),
                    again_in_s=again_s,
                )
                await asyncio.sleep(again_s)
