"""Digests of files: what artifacts and models are known by."""

import hashlib
from pathlib import Path


def file_digest(path: Path) -> str:
    """SHA-256 of a file, lower-case hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path: Path, digest: str) -> bool:
    """Whether a file has this digest; False if it is missing or can't be read."""
    try:
        return file_digest(path) == digest
    except OSError:
        return False
