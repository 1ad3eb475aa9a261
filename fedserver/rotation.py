"""The move of a federation to a new root and issuing CA, on disk and in the running coordinator.

    install   pki/ gets an issuing CA that an offline root signed (fedserver.offline_ca); the old one goes to
              pki/previous/ and is trusted on. Below the same root the coordinator's certificate is of the new one at once.
    rotate    pki/ gets a new root and issuing CA; the old ones go to pki/previous/. Both are trusted; members are asked
              to renew, and get certificates of the new CA and both roots. The coordinator's certificate stays below the
              old root, which every member still knows.
    finish    ends either: pki/previous/ goes. The coordinator's certificate is of the new CA; those of the old one are
              refused.

Each step replaces the folder pki/ in one step, so a crash leaves the state before it or after it.
"""

import asyncio
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import structlog
from cryptography import x509

from fedcore.errors import ConflictError, FedimpresError, StorageError
from fedcore.identity import Caller
from fedcore.pki import Signer, make_issuing_ca, make_root
from fedcore.private_files import exchange, make_folder, sync_folder
from fedcore.v1 import federation_pb2
from fedserver.authority import PREVIOUS, Authority, load_authority, write_certificate, write_signer
from fedserver.certificates import CertificateRow, Certificates
from fedserver.own_certificate import OwnCertificate
from fedserver.registry import utc_now
from fedserver.roster import Roster

RENEW_OFFLINE = (
    "renew the issuing CA by files: 'fedserver ca request' here, 'fedserver ca sign' where the root's key is, "
    "'fedserver ca install' here"
)
# Members renew up to a month ahead, and somebody has to fetch the root's key.
ISSUING_WARNING = timedelta(days=60)
# An issuing CA lives a year, but no longer than its root.
ROOT_WARNING = timedelta(days=425)
_WARN_EVERY = timedelta(days=1)
_LOOK_EVERY_S = 2.0
log = structlog.get_logger(__name__)


class AuthorityKeeper:
    """The authority of a running coordinator: `current` gives it as it stands."""

    def __init__(
        self,
        folder: Path,
        federation: str,
        lifetimes: Mapping[str, timedelta],
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._folder = folder
        self._federation = federation
        self._lifetimes = lifetimes
        self._clock = clock
        self._stamp = _stamp(folder)
        self._current = load_authority(folder, federation, lifetimes)

    @property
    def offline(self) -> bool:
        """Whether the root's key is kept elsewhere."""
        return not (self._folder / "root.key").exists()

    def reload(self) -> bool:
        """Take over what another process put into the folder (`fedserver ca install`); whether there was something.

        Raises as `load_authority`; what is current then stays so, until the folder changes again.
        """
        if (stamp := _stamp(self._folder)) == self._stamp:
            return False
        self._stamp = stamp
        before = self._current
        self._current = load_authority(self._folder, self._federation, self._lifetimes)
        return (before.issuers, before.roots) != (self._current.issuers, self._current.roots)

    def current(self) -> Authority:
        """Who signs now, and under which roots."""
        return self._current

    def rotate(self) -> None:
        """Make a new root and issuing CA; the present ones become the previous.

        Raises ConflictError if a rotation is under way or the root is kept offline, StorageError if the folder can't be
        replaced: nothing is changed then.
        """
        self._refuse_under_way()
        if self.offline:
            raise ConflictError(
                "this federation's root is kept offline: its key is not on the coordinator, and no new root is made here",
                hint=f"{RENEW_OFFLINE}; to replace the root itself, begin with 'fedserver ca root' on the offline machine",
            )
        now = self._clock()
        root = make_root(self._federation, now)
        issuing = make_issuing_ca(root, self._federation, now)

        def fill(folder: Path) -> None:
            write_signer(folder, "root", root)
            write_signer(folder, "issuing", issuing)
            self._keep_as_previous(folder)

        self._replace(fill)

    def install(self, issuing: Signer, root: x509.Certificate) -> None:
        """Sign with another issuing CA from now on, below the present root or another one; the present CA becomes the
        previous. Raises as `rotate`.
        """
        self._refuse_under_way()

        def fill(folder: Path) -> None:
            write_certificate(folder / "root.crt", root)
            write_signer(folder, "issuing", issuing)
            if root == self._current.root and not self.offline:
                _copy(self._folder / "root.key", folder / "root.key")
            self._keep_as_previous(folder)

        self._replace(fill)

    def _refuse_under_way(self) -> None:
        if self._current.previous is not None:
            raise ConflictError(
                "a rotation of the CA is under way already",
                hint="finish it first: fedctl cert ca rotate --finish; 'fedctl cert ca show' says who it waits for",
            )

    def _keep_as_previous(self, folder: Path) -> None:
        make_folder(folder / PREVIOUS)
        for name in ("root.crt", "root.key", "issuing.crt", "issuing.key"):
            if (self._folder / name).exists():  # root.key may be kept elsewhere
                _copy(self._folder / name, folder / PREVIOUS / name)

    def finish(self) -> None:
        """Drop the previous root and issuing CA. Raises ConflictError if there is none, StorageError as `rotate`."""
        if self._current.previous is None:
            raise ConflictError("no rotation of the CA is under way", hint="begin one: fedctl cert ca rotate")

        def fill(folder: Path) -> None:
            for path in self._folder.iterdir():
                if path.is_file():
                    _copy(path, folder / path.name)

        self._replace(fill)

    def _replace(self, fill: Callable[[Path], None]) -> None:
        staged = Path(tempfile.mkdtemp(prefix=f".{self._folder.name}.", dir=self._folder.parent))
        try:
            fill(staged)
            sync_folder(staged)
            loaded = load_authority(staged, self._federation, self._lifetimes)
            with _alone(self._folder.parent):
                if _stamp(self._folder) != self._stamp:
                    raise ConflictError("the CA was changed meanwhile", hint="look at it, then try again")
                exchange(staged, self._folder)
        except OSError as error:
            raise StorageError(
                f"{self._folder}: can't be replaced, nothing was changed: {error}",
                hint="the home needs a local file system (ext4, xfs, btrfs) with room, owned by the service's user",
            ) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        sync_folder(self._folder.parent)
        self._stamp = _stamp(self._folder)
        self._current = loaded


class Rotation:
    """The move to a new CA, in a coordinator that serves: the CA, the coordinator's certificate, the agents' notice."""

    def __init__(
        self, certificates: Certificates, keeper: AuthorityKeeper, own: OwnCertificate, roster: Roster
    ) -> None:
        self._certificates = certificates
        self._keeper = keeper
        self._own = own
        self._roster = roster

    async def begin(self) -> None:
        """Make the new CA, trust both, ask the agents to renew. Raises ConflictError, StorageError, OSError."""
        self._keeper.rotate()
        await self._take_over()

    async def _take_over(self) -> None:
        await self._own.renew()  # so that new connections of both CAs are let in
        self._ask_agents()

    async def watch(self) -> None:
        """Take over what `fedserver ca install` puts beside this process, and warn of a CA whose end is near, once a day;
        until cancelled. A failure is logged.
        """
        warned_at = None
        while True:
            try:
                if self._keeper.reload():
                    log.warning("another CA was installed", issuer=self._keeper.current().issuer)
                    await self._take_over()
            except (FedimpresError, OSError) as error:
                log.error("the CA that was installed can't be used", error=str(error))
            now = utc_now()
            if warned_at is None or now - warned_at >= _WARN_EVERY:
                warned_at = now
                for problem in self.problems():
                    log.warning("CA", problem=problem)
            await asyncio.sleep(_LOOK_EVERY_S)

    def problems(self) -> list[str]:
        """What will go wrong with the CA, in words; nothing if its end is far."""
        return ends_soon(self._keeper.current(), utc_now(), offline=self._keeper.offline)

    @property
    def offline(self) -> bool:
        """Whether the root's key is kept elsewhere."""
        return self._keeper.offline

    async def finish(self, by: Caller, *, force: bool) -> None:
        """Drop the old CA. Raises ConflictError while members depend on it (unless `force`), or the caller does."""
        waiting = self.waiting()
        if by.issuer != self._keeper.current().issuer:
            raise ConflictError(
                f"{by}: your own certificate is of the old CA: dropping it would lock you out",
                hint="renew it first: fedctl cert renew",
            )
        if waiting and not force:
            names = sorted({f"{row.role}/{row.subject_id}" for row in waiting})
            raise ConflictError(
                f"certificates of the old CA are still in use: {', '.join(names)}",
                hint="agents renew when they are connected, operators by fedctl cert renew; --force locks out those left",
            )
        self._keeper.finish()
        await self._take_over()  # the agents get roots without the old one

    def waiting(self) -> list[CertificateRow]:
        """Members' certificates of the old CA that count and have no successor. None unless a rotation is under way."""
        authority, now = self._keeper.current(), utc_now()
        if authority.previous is None:
            return []
        return [
            row
            for row in self._certificates.rows()
            if row.role != "coordinator" and row.issuer != authority.issuer and row.state(now) == "valid"
        ]

    def _ask_agents(self) -> None:
        for session in list(self._roster.sessions.values()):
            session.send(federation_pb2.Directive(renew_certificate=federation_pb2.RenewCertificate()))


def ends_soon(authority: Authority, now: datetime, *, offline: bool) -> list[str]:
    """A line for the issuing CA and for the root, if it ends soon: certificates end with their CA, at the latest."""
    found = []
    issuing, root = authority.issuing.certificate.not_valid_after_utc, authority.root.not_valid_after_utc
    if issuing - now < ISSUING_WARNING:
        todo = RENEW_OFFLINE if offline else "replace it: fedctl cert ca rotate"
        found.append(f"the issuing CA {_until(issuing, now)}, and every certificate with it; {todo}")
    if root - now < ROOT_WARNING:
        begin = "fedserver ca root on the offline machine" if offline else "fedctl cert ca rotate"
        found.append(f"the root {_until(root, now)}; replace it: {begin}")
    return found


def _until(end: datetime, now: datetime) -> str:
    days = (end - now).days
    return f"ends on {end:%Y-%m-%d}, in {days} days" if days >= 0 else f"ended on {end:%Y-%m-%d}"


def _stamp(folder: Path) -> tuple[int, int]:
    """What differs once the folder was replaced or files in it were."""
    found = folder.stat()
    return found.st_ino, found.st_mtime_ns


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Keep other processes that change the CA out."""
    descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _copy(source: Path, target: Path) -> None:
    """Copy a file with its mode, durably."""
    shutil.copy2(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
