"""Banks of impressions on this site's disk, and their removal: whole ones and what has arrived of one.

Told apart from models and updates by the tensors that their headers name, so it needs no book-keeping, and finds what an
earlier version left. Works on the folder alone: also beside a running agent.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedcore.artifact_store import artifact_path, erase_file
from fedcore.parsing import parse_json
from fedcore.tensor_file import MAX_HEADER_BYTES

_TENSORS = {"images", "labels"}


@dataclass(frozen=True, slots=True)
class HeldBank:
    """One file. `num_images` is what the whole bank has, `size_bytes` what lies here of it."""

    digest: str
    path: Path
    num_images: int
    size_bytes: int
    whole: bool


class HeldImpressions:
    """The banks in a home's artifact folder."""

    def __init__(self, artifacts: Path) -> None:
        self._root = artifacts
        self._partial = artifacts / "partial"

    def banks(self) -> list[HeldBank]:
        """All that is here, by digest; a file that goes meanwhile is left out."""
        found = [bank for path, whole in self._files() if (bank := _bank(path, whole)) is not None]
        return sorted(found, key=lambda bank: (bank.digest, not bank.whole))

    def digests(self) -> list[str]:
        """Their digests, sorted."""
        return sorted({bank.digest for bank in self.banks()})

    def erase(self, digests: Iterable[str]) -> list[str]:
        """Delete these banks for good; give those that were here. What is no bank is left alone.

        Raises TransferError for what is no digest, OSError if one can't be deleted.
        """
        erased = []
        for digest in digests:
            path = artifact_path(self._root, digest)
            whole = _bank(path, True) is not None and erase_file(path)
            # Nobody knows yet what a first part is, and losing one costs nothing but time.
            part = self._partial.is_dir() and erase_file(self._partial / f"{digest}.part")
            if whole or part:
                erased.append(digest)
        return erased

    def _files(self) -> Iterator[tuple[Path, bool]]:
        for path in self._root.glob("??/*.safetensors"):
            yield path, True
        for path in self._partial.glob("*.part"):
            yield path, False


def _bank(path: Path, whole: bool) -> HeldBank | None:
    """What a file is by its header; None if it is no bank, or can't be read."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= MAX_HEADER_BYTES:
                return None
            entries = parse_json(file.read(size))
        if not isinstance(entries, dict) or not entries.keys() >= _TENSORS:
            return None
        return HeldBank(path.stem, path, int(entries["images"]["shape"][0]), path.stat().st_size, whole)
    except (OSError, ValueError, OverflowError, KeyError, TypeError, IndexError):
        return None
