"""What is fuzzed: a decoder, valid inputs to begin from, and the promise that only documented errors leave it.

The same targets are driven by Hypothesis (`driven`, in `make test` and longer in `make fuzz`) and by atheris (`guided`).
"""

import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

# Minutes for all targets together; without it a fixed number of examples, drawn alike each time.
MINUTES = float(os.environ.get("FUZZ_MINUTES", "0"))
EXAMPLES = 100
_BATCH = 2000

# What breaks parsers of text: depth, long and special numbers, bytes that are no text, the ends of ranges.
TEXT_WORDS: tuple[bytes, ...] = (
    b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"1e999", b"NaN", b"Infinity", b"-1", b"null", b"\\ud800", b"\\u0000",
    b"\0", b"\xff", b"18446744073709551616", b"inf", b"nan", b"{}", b"[]", b"[[", b'"', b"\n", b"\xef\xbb\xbf",
)  # fmt: skip
# What breaks parsers of binary forms: the ends of little-endian and big-endian fields.
BINARY_WORDS: tuple[bytes, ...] = (
    b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\x7f" + b"\xff" * 7, b"\0" * 8, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x01\0\0\0",
    b"\0\0\0\x01",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """`check(data, folder)` feeds the decoder, with an empty folder for its files, and raises if a promise is broken."""

    name: str
    check: Callable[[bytes, Path], None]
    # Called once: making them may take a moment.
    seeds: Callable[[], Sequence[bytes]]
    words: tuple[bytes, ...] = TEXT_WORDS


@contextmanager
def only(*documented: type[BaseException]) -> Iterator[None]:
    """These errors may leave the decoder; any other is what fuzzing looks for."""
    with suppress(*documented):
        yield


@contextmanager
def bounded(most_bytes: int) -> Iterator[None]:
    """No more than this is allocated at a time, touched or not. Python's and numpy's allocations are seen."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= most_bytes, f"{peak} bytes were allocated, at most {most_bytes} are needed"


def written(write: Callable[[Path], object]) -> bytes:
    """The bytes of the file that this writes."""
    with tempfile.TemporaryDirectory(prefix="fedimpres-fuzz-") as folder:
        path = Path(folder) / "file"
        write(path)
        return path.read_bytes()


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """Valid bytes with up to four things done to them; now and then bytes that were never valid."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 16))
        piece = draw(st.sampled_from(words) | st.binary(min_size=1, max_size=8))
        match draw(st.sampled_from(("insert", "overwrite", "replace", "cut", "end", "copy", "flip"))):
            case "insert":
                data[at:at] = piece
            case "overwrite":
                data[at : at + len(piece)] = piece
            case "replace":
                data[at : at + length] = piece
            case "cut":
                del data[at : at + length]
            case "end":
                del data[at:]
            case "copy":
                source = draw(st.integers(0, len(data)))
                data[at:at] = data[source : source + length]
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


def driven(targets: Sequence[Target]) -> Callable[..., None]:
    """The test of a module: each of its targets with mutated bytes."""

    @pytest.mark.parametrize("target", targets, ids=lambda target: target.name)
    def test(target: Target, tmp_path: Path, total_targets: int) -> None:
        seeds = target.seeds()
        for data in (*seeds, *target.words):
            target.check(data, emptied(tmp_path))

        @given(mutated(seeds, target.words))
        def stays_within_its_promise(data: bytes) -> None:
            target.check(data, emptied(tmp_path))

        terms = settings(
            max_examples=_BATCH if MINUTES else EXAMPLES,
            derandomize=not MINUTES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        end = time.monotonic() + 60 * MINUTES / total_targets
        while True:
            terms(stays_within_its_promise)()
            if time.monotonic() >= end:
                break

    return test


def emptied(folder: Path) -> Path:
    """The folder, emptied of what the example before left: flat, and small."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return folder
