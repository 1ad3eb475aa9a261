"""Content-addressed files: a digest names a tensor file.

Written by temp, fsync, rename, so a file that is there is whole.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from fedcore.digest import is_intact
from fedcore.durability import sync_file
from fedcore.errors import DiskError, NotFoundError
from fedcore.tensor_stream import check_digest_form


class ArtifactStore:
    """A folder of tensor files, `ROOT/ab/abcdef....safetensors`, and of temporary files that are not yet whole."""

    def __init__(self, root: Path) -> None:
        """Open the store, creating its folders. What an earlier process left half-written is deleted."""
        self.root = root
        self._temporary = root / "tmp"
        self._temporary.mkdir(parents=True, exist_ok=True)
        for path in self._temporary.iterdir():
            path.unlink()

    def path(self, digest: str) -> Path:
        """Where the artifact lies or would lie. Raises TransferError if `digest` is none."""
        return artifact_path(self.root, digest)

    def find(self, digest: str) -> Path:
        """Path of an artifact that is there. Raises NotFoundError."""
        path = self.path(digest)
        if not path.is_file():
            raise NotFoundError(f"no artifact {digest}")
        return path

    def __contains__(self, digest: str) -> bool:
        """Whether the artifact is there."""
        return self.path(digest).is_file()

    def new_path(self) -> Path:
        """A path in the temporary folder that no file has."""
        return self._temporary / f"{secrets.token_hex(8)}.safetensors"

    def adopt(self, path: Path, digest: str, *, durable: bool = True) -> Path:
        """Move a whole file into the store under its digest; with `durable`, it survives a power cut.

        The digest is the caller's word: whoever wrote the file hashed it. Raises DiskError.
        """
        target = self.path(digest)
        try:
            target.parent.mkdir(exist_ok=True)
            if durable:
                _fsync(path)
            path.replace(target)
            if durable:
                _fsync(target.parent)
        except OSError as error:
            raise DiskError(
                f"{target}: can't be stored: {error}", hint="free disk space or mend the disk"
            ) from error
        return target

    def delete(self, digest: str) -> None:
        """Delete an artifact, if it is there."""
        self.path(digest).unlink(missing_ok=True)

    def erase(self, digest: str) -> bool:
        """Delete an artifact for good: what is gone stays gone after a power cut. False if it is not there.

        Its blocks on the disk are not overwritten. Raises OSError.
        """
        return erase_file(self.path(digest))

    def digests(self) -> Iterator[str]:
        """Digests of all artifacts that are there."""
        for path in self.root.glob("??/*.safetensors"):
            yield path.stem

    def sizes(self) -> dict[str, int]:
        """Bytes of every artifact, by digest; of those that go meanwhile, or not. Raises DiskError."""
        found = {}
        try:
            for path in self.root.glob("??/*.safetensors"):
                with contextlib.suppress(FileNotFoundError):
                    found[path.stem] = path.stat().st_size
        except OSError as error:
            raise DiskError(f"{self.root}: can't be read: {error}", hint="mend the disk") from error
        return found

    def size_bytes(self) -> int:
        """Bytes of all artifacts together."""
        return sum(self.sizes().values())

    def intact(self, digest: str) -> bool:
        """Read the artifact again and compare its digest; False if it is missing or damaged."""
        return is_intact(self.path(digest), digest)


def artifact_path(root: Path, digest: str) -> Path:
    """Where an artifact lies in a store. Raises TransferError if `digest` is none."""
    check_digest_form(digest)
    return root / digest[:2] / f"{digest}.safetensors"


def erase_file(path: Path) -> bool:
    """Delete a file so that a power cut does not bring it back; False if there is none. Raises OSError."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    _fsync(path.parent)
    return True


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)
