"""What a strategy keeps at the site between rounds: FedBN's normalisation layers, never sent.

One canonical tensor file a round, named by it, written by temp, fsync, rename. Round r starts from the newest
file below r, so a repeated round starts from where it started the first time and gives the same bytes.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedcore.errors import StorageError
from fedcore.models.state_file import load_tensors, save_state

_NAME = re.compile(r"^round-(\d{8})\.safetensors$")


class LocalState:
    """The tensors kept in a run's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def before(self, round_number: int) -> dict[str, Tensor] | None:
        """What the newest round before this one left, None if none did.

        Raises StorageError if it is damaged.
        """
        rounds = [r for r in self._rounds() if r < round_number]
        return load_tensors(self._path(rounds[-1])) if rounds else None

    def newest(self) -> dict[str, Tensor] | None:
        """What the newest round left, None if none did. Raises StorageError if it is damaged."""
        rounds = self._rounds()
        return load_tensors(self._path(rounds[-1])) if rounds else None

    def save(self, round_number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what this round leaves, durably, and the state that it started from; forget what is older.

        Later rounds are forgotten too: a coordinator restored from a backup has begun again before them.

        Raises StorageError if it can't be written.
        """
        path = self._path(round_number)
        temporary = path.with_suffix(".tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_state(temporary, tensors)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            rounds = self._rounds()
            later = [r for r in rounds if r > round_number]
            for gone in [*[r for r in rounds if r < round_number][:-1], *later]:
                self._path(gone).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{path}: can't be written: {error}") from error

    def _rounds(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return sorted(int(m.group(1)) for p in self._folder.iterdir() if (m := _NAME.match(p.name)))

    def _path(self, round_number: int) -> Path:
        return self._folder / f"round-{round_number:08d}.safetensors"
