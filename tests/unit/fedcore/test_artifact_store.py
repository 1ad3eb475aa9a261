"""Content-addressed files: whole or not there; nothing leads out of the folder."""

import hashlib
from pathlib import Path

import pytest

from fedcore.artifact_store import ArtifactStore
from fedcore.errors import NotFoundError, StorageError, TransferError


def put(store: ArtifactStore, data: bytes, *, durable: bool = True) -> str:
    path = store.new_path()
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    store.adopt(path, digest, durable=durable)
    assert not path.exists()
    return digest


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_adopted_is_found_under_its_digest(tmp_path: Path, durable: bool) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    digest = put(store, b"one", durable=durable)
    other = put(store, b"three", durable=durable)
    assert put(store, b"one", durable=durable) == digest  # again, over itself
    assert (
        store.find(digest)
        == store.path(digest)
        == tmp_path / "artifacts" / digest[:2] / f"{digest}.safetensors"
    )
    assert store.find(digest).read_bytes() == b"one"
    assert digest in store
    assert store.intact(digest)
    assert sorted(store.digests()) == sorted([digest, other])
    assert store.size_bytes() == 8
    reopened = ArtifactStore(tmp_path / "artifacts")
    assert digest in reopened
    store.delete(digest)
    store.delete(digest)
    assert digest not in store
    with pytest.raises(NotFoundError, match=digest):
        store.find(digest)
    assert not store.intact(digest)


def test_damage_is_noticed(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    digest = put(store, b"whole")
    store.path(digest).write_bytes(b"whole?")
    assert not store.intact(digest)


def test_half_written_files_are_gone_after_a_restart(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    paths = [store.new_path() for _ in range(3)]
    assert len(set(paths)) == 3
    for path in paths:
        path.write_bytes(b"half")
    ArtifactStore(tmp_path)
    assert not any(path.exists() for path in paths)


@pytest.mark.parametrize("digest", ["", "..", "../" * 21 + "a", "/etc/passwd", "A" * 64, "0" * 64 + "/../x"])
def test_nothing_but_a_digest_names_an_artifact(tmp_path: Path, digest: str) -> None:
    store = ArtifactStore(tmp_path)
    for act in (store.path, store.find, store.delete, store.__contains__):
        with pytest.raises(TransferError):
            act(digest)


def test_a_file_that_cannot_be_stored_is_a_storage_error(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    with pytest.raises(StorageError, match="can't be stored"):
        store.adopt(tmp_path / "missing", "0" * 64)
