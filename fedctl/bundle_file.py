"""A debug bundle as an archive: what the coordinator sends, and which fedctl asked for it. Whole or not there."""

import contextlib
import io
import json
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedcore.errors import ConflictError, ProtocolError, StorageError
from fedcore.software import software

if TYPE_CHECKING:
    from fedcore.v1 import operations_pb2

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")


def write_bundle(out: Path, parts: "Iterable[operations_pb2.BundlePart]") -> list[str]:
    """Write FILE.tar.gz, readable by its owner only; returns the names in it.

    Raises ConflictError if the file is there, ProtocolError for a name that can't be a file's, StorageError, and what
    the stream raises.
    """
    if out.exists():
        raise ConflictError(f"{out} is already there", hint="give another name, or delete it")
    folder = out.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
    names: list[str] = []
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{out.name}.", delete=False) as file:
            temporary = file.name
            with tarfile.open(fileobj=file, mode="w:gz") as archive:
                for name, data in _files(parts):
                    _add(archive, f"{folder}/{name}", data)
                    names.append(name)
        os.replace(temporary, out)
    except OSError as error:
        raise StorageError(f"{out}: can't be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    return names


def _files(parts: "Iterable[operations_pb2.BundlePart]") -> Iterator[tuple[str, bytes]]:
    """Pieces put together."""
    name, pieces = "", bytearray()
    for part in parts:
        if not _NAME.fullmatch(part.name):
            raise ProtocolError(f"the coordinator sent a file named {part.name[:80]!r}, which can't be")
        if part.name != name:
            if name:
                yield name, bytes(pieces)
            name, pieces = part.name, bytearray()
        pieces += part.data
    if name:
        yield name, bytes(pieces)
    yield "fedctl.json", (json.dumps(software(), indent=2) + "\n").encode()


def _add(archive: tarfile.TarFile, path: str, data: bytes) -> None:
    entry = tarfile.TarInfo(path)
    entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
    archive.addfile(entry, io.BytesIO(data))
