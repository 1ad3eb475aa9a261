"""The move of a federation to a new root and issuing CA, on disk and in the running coordinator.

    rotate    pki/ gets a new root and issuing CA; the old ones go to pki/previous/. Both are trusted; members are asked
              to renew, and get certificates of the new CA and both roots. The coordinator's certificate stays below the
              old root, which every member still knows.
    finish    pki/previous/ goes. The coordinator's certificate is of the new CA; certificates of the old one are refused.

Each step replaces the folder pki/ in one step, so a crash leaves the state before it or after it.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path

from fedcore.errors import ConflictError, StorageError
from fedcore.identity import Caller
from fedcore.pki import make_issuing_ca, make_root
from fedcore.private_files import exchange, make_folder, sync_folder
from fedcore.v1 import federation_pb2
from fedserver.authority import PREVIOUS, Authority, load_authority, write_signers
from fedserver.certificates import CertificateRow, Certificates
from fedserver.own_certificate import OwnCertificate
from fedserver.registry import utc_now
from fedserver.roster import Roster


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
        self._current = load_authority(folder, federation, lifetimes)

    def current(self) -> Authority:
        """Who signs now, and under which roots."""
        return self._current

    def rotate(self) -> None:
        """Make a new root and issuing CA; the present ones become the previous.

        Raises ConflictError if a rotation is under way, StorageError if the folder can't be replaced: nothing is changed
        then.
        """
        if self._current.previous is not None:
            raise ConflictError(
                "a rotation of the CA is under way already",
                hint="finish it first: fedctl cert ca rotate --finish; 'fedctl cert ca show' says who it waits for",
            )
        now = self._clock()
        root = make_root(self._federation, now)
        issuing = make_issuing_ca(root, self._federation, now)

        def fill(folder: Path) -> None:
            write_signers(folder, root, issuing)
            make_folder(folder / PREVIOUS)
            for name in ("root.crt", "root.key", "issuing.crt", "issuing.key"):
                if (self._folder / name).exists():  # root.key may be kept elsewhere
                    _copy(self._folder / name, folder / PREVIOUS / name)

        self._replace(fill)

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
            exchange(staged, self._folder)
        except OSError as error:
            raise StorageError(
                f"{self._folder}: can't be replaced, nothing was changed: {error}",
                hint="the home needs a local file system (ext4, xfs, btrfs) with room, owned by the service's user",
            ) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        sync_folder(self._folder.parent)
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
        await self._own.renew()  # so that new connections of both CAs are let in
        self._ask_agents()

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
        await self._own.renew()
        self._ask_agents()  # for roots without the old one

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


def _copy(source: Path, target: Path) -> None:
    """Copy a file with its mode, durably."""
    shutil.copy2(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
