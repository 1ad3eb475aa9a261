"""Backups as files: what is written comes back, and nothing else is taken for it."""

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedcore.backup.archive import Manifest, Member, Source, measure, pack, unpack
from fedcore.backup.envelope import CHUNK_BYTES, MAGIC, BackupReader, read_header, seal
from fedcore.backup.files import check_backup, write_backup
from fedcore.backup.keys import (
    KeySource,
    Recipient,
    from_key_file,
    from_passphrase,
    make_key_file,
    read_passphrase,
    recipient_from_text,
    recipient_of_passphrase,
)
from fedcore.database import copy_database, open_database
from fedcore.errors import BackupError, ConfigError, ConflictError, StorageError
from fedcore.pki import certificates_to_pem, make_issuing_ca, make_root

WORDS = "correct horse battery staple"
SCHEMA = ["CREATE TABLE a (b TEXT) STRICT", "CREATE TABLE c (d TEXT) STRICT"]
ABOUT = {
    "backup_id": "ab" * 8, "federation": "lab", "term": 3, "created_at": "2026-01-02T03:04:05Z",
    "software_version": "0.1.0", "schema_version": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipient, KeySource]:
    path = tmp_path_factory.mktemp("keys") / "backup.key"
    text = make_key_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return recipient_from_text(text), from_key_file(path)


def sealed(content: bytes, recipient: Recipient) -> bytes:
    return b"".join(seal([content], recipient, **ABOUT))  # type: ignore[arg-type]


def opened(path: Path, keys: KeySource, size: int) -> bytes:
    with BackupReader(path, keys) as reader:
        content = reader.read(size)
        reader.end()
        return content


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 5])
def test_any_size_comes_back(size: int, tmp_path: Path, pair: tuple[Recipient, KeySource]) -> None:
    content = os.urandom(size)
    path = tmp_path / "a"
    path.write_bytes(sealed(content, pair[0]))
    assert size < 64 or content[:64] not in path.read_bytes()
    assert opened(path, pair[1], size) == content
    with BackupReader(path, pair[1]) as reader, pytest.raises(BackupError):
        reader.read(size + 1)
    header = read_header(path)
    assert (header.federation, header.term, header.schema_version, header.scrypt) == ("lab", 3, 2, None)


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def chunks_of(data: bytes) -> tuple[bytes, list[bytes]]:
    start = len(MAGIC) + 4 + int.from_bytes(data[len(MAGIC) : len(MAGIC) + 4], "big")
    body, size = data[start:], CHUNK_BYTES + 16
    return data[:start], [body[i : i + size] for i in range(0, len(body), size)]


TAMPERED: dict[str, Callable[[bytes], bytes]] = {
    "a byte of the last chunk": lambda data: flip(data, len(data) - 1),
    "a byte of the first chunk": lambda data: flip(data, len(chunks_of(data)[0]) + 9),
    "the header's federation": lambda data: data.replace(b'"lab"', b'"lob"'),
    "the header's term": lambda data: data.replace(b'"term":3', b'"term":4'),
    "the last byte is gone": lambda data: data[:-1],
    "the last chunk is gone": lambda data: chunks_of(data)[0] + b"".join(chunks_of(data)[1][:-1]),
    "the first chunk is gone": lambda data: chunks_of(data)[0] + b"".join(chunks_of(data)[1][1:]),
    "two chunks changed places": lambda data: (
        chunks_of(data)[0] + b"".join(chunks_of(data)[1][i] for i in (1, 0, 2))
    ),
    "a chunk stands twice": lambda data: data + chunks_of(data)[1][-1],
    "a byte is added": lambda data: data + b"x",
    "nothing is left": lambda data: b"",
    "half the header": lambda data: data[:60],
}


@pytest.mark.parametrize("how", TAMPERED)
def test_what_was_changed_is_found(how: str, tmp_path: Path, pair: tuple[Recipient, KeySource]) -> None:
    size = 2 * CHUNK_BYTES + 100
    path = tmp_path / "a"
    whole = sealed(bytes(size), pair[0])
    assert len(chunks_of(whole)[1]) == 3
    path.write_bytes(TAMPERED[how](whole))
    with pytest.raises(BackupError):
        opened(path, pair[1], size)


def test_only_its_passphrase_or_key_opens_it(tmp_path: Path, pair: tuple[Recipient, KeySource]) -> None:
    by_words, by_key = tmp_path / "words", tmp_path / "key"
    by_words.write_bytes(sealed(b"content", recipient_of_passphrase(WORDS)))
    by_key.write_bytes(sealed(b"content", pair[0]))
    assert opened(by_words, from_passphrase(WORDS), 7) == b"content"
    for path, keys, words in (
        (by_words, from_passphrase(WORDS + "!"), "can't be opened with this passphrase"),
        (by_words, pair[1], "made with a passphrase"),
        (by_key, from_passphrase(WORDS), "made for a key file"),
    ):
        with pytest.raises(BackupError, match=words):
            BackupReader(path, keys)
    make_key_file(tmp_path / "other.key")
    with pytest.raises(BackupError, match="can't be opened with the key in"):
        BackupReader(by_key, from_key_file(tmp_path / "other.key"))


def test_a_passphrase_or_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_text(WORDS + "\n")
    path.chmod(0o600)
    assert read_passphrase(path) == WORDS
    path.chmod(0o644)
    for read in (read_passphrase, from_key_file):
        with pytest.raises(ConfigError, match="expected 0600"):
            read(path)
    with pytest.raises(ConfigError, match="expected at least 12"):
        recipient_of_passphrase("short")
    with pytest.raises(ConfigError, match="fedctl backup key|32 bytes"):
        recipient_from_text("fedimpres-backup-recipient:AAAA")
    with pytest.raises(ConfigError, match="can't be made"):
        make_key_file(path)


def test_a_header_can_not_choose_how_much_memory_a_passphrase_costs(tmp_path: Path) -> None:
    path = tmp_path / "a"
    data = sealed(b"", recipient_of_passphrase(WORDS)).replace(b'"n":65536', b'"n":99999999')
    size = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 4], "big") + 3
    path.write_bytes(MAGIC + size.to_bytes(4, "big") + data[len(MAGIC) + 4 :])
    with pytest.raises(BackupError, match="less than or equal to 262144"):
        read_header(path)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "pki/../../x",
        "pki/.hidden",
        "spool/x",
        "operator/tls.key",
        "pki",
        "artifacts/ab/x",
        "",
    ],
)
def test_a_member_lies_below_the_home_and_nowhere_else(name: str) -> None:
    with pytest.raises(ValueError, match="no path of a coordinator's home"):
        Member(name=name, size=0, sha256="0" * 64)


def test_no_member_stands_twice_and_the_database_is_there() -> None:
    one = Member(name="fedserver.db", size=0, sha256="0" * 64)
    for members in ((one, one), (one,), ()):
        with pytest.raises(ValueError, match="stands twice, or database or configuration"):
            Manifest(members=members)


# -- whole backups ------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What a coordinator's home has, as small as can be."""
    root = tmp_path / "home"
    for folder in ("pki", "credential", "artifacts/ab"):
        (root / folder).mkdir(parents=True)
    open_database(root / "fedserver.db", SCHEMA, create=True).close()
    (root / "fedserver.toml").write_text('name = "lab"\n')
    now = datetime.now(UTC)
    authority = make_root("lab", now)
    issuing = make_issuing_ca(authority, "lab", now)
    (root / "pki/root.crt").write_bytes(certificates_to_pem([authority.certificate]))
    (root / "pki/issuing.crt").write_bytes(certificates_to_pem([issuing.certificate]))
    (root / "credential/tls.crt").write_bytes(certificates_to_pem([issuing.certificate]))
    (root / f"artifacts/ab/{'ab' * 32}.safetensors").write_bytes(bytes(3 << 20))
    return root


def sources(root: Path) -> list[Source]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return [measure(path.relative_to(root).as_posix(), path) for path in paths]


def file_of(root: Path, recipient: Recipient, out: Path, **about: object) -> Path:
    pieces = seal(pack(sources(root), ["cd" * 32]), recipient, **{**ABOUT, **about})  # type: ignore[arg-type]
    return write_backup(out, pieces).path


def test_a_backup_is_checked_without_a_coordinator(
    home: Path, tmp_path: Path, pair: tuple[Recipient, KeySource]
) -> None:
    out = file_of(home, pair[0], tmp_path / "b")
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    checked = check_backup(out, pair[1])
    assert (checked.header.id, checked.manifest.artifacts, checked.manifest.absent) == (
        "ab" * 8,
        1,
        ("cd" * 32,),
    )
    assert checked.total_bytes > 3 << 20
    with BackupReader(out, pair[1]) as reader:
        made = tmp_path / "new"

        def place(member: Member) -> Path:
            (made / member.name).parent.mkdir(parents=True, exist_ok=True)
            return made / member.name

        unpack(reader, place)
    for path in sorted(home.rglob("*")):
        if path.is_file():
            copy = made / path.relative_to(home)
            assert copy.read_bytes() == path.read_bytes()
            assert stat.S_IMODE(copy.stat().st_mode) == 0o600


def test_the_check_looks_into_the_database_and_the_certificates(
    home: Path, tmp_path: Path, pair: tuple[Recipient, KeySource]
) -> None:
    """Sealed well, but with nonsense inside: only a program of ours gone wrong makes such a file."""
    with pytest.raises(BackupError, match="schema 2, expected 3"):
        check_backup(file_of(home, pair[0], tmp_path / "1", schema_version=3), pair[1])
    whole = (home / "fedserver.db").read_bytes()
    (home / "fedserver.db").write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(BackupError, match="its database"):
        check_backup(file_of(home, pair[0], tmp_path / "2"), pair[1])
    (home / "fedserver.db").write_bytes(whole)
    (home / "pki/issuing.crt").unlink()
    with pytest.raises(BackupError, match="holds no pki/issuing.crt"):
        check_backup(file_of(home, pair[0], tmp_path / "3"), pair[1])


def test_a_file_that_changes_meanwhile_ends_the_backup_and_leaves_nothing(
    home: Path, tmp_path: Path, pair: tuple[Recipient, KeySource]
) -> None:
    measured = sources(home)
    (home / "fedserver.toml").write_text('name = "lob"\n')
    out = tmp_path / "out" / "b"
    out.parent.mkdir()
    with pytest.raises(BackupError, match="fedserver.toml changed while it was backed up"):
        write_backup(out, seal(pack(measured, []), pair[0], **ABOUT))  # type: ignore[arg-type]
    assert list(out.parent.iterdir()) == []


def test_a_backup_is_never_written_over_another_file(tmp_path: Path) -> None:
    out = tmp_path / "b"

    def pieces() -> Iterator[bytes]:
        yield b"a"
        out.write_bytes(b"somebody else's")

    with pytest.raises(ConflictError, match="already there"):
        write_backup(out, pieces())
    assert out.read_bytes() == b"somebody else's"
    with pytest.raises(ConflictError, match="already there"):
        write_backup(out, [b"a"])
    assert sorted(tmp_path.iterdir()) == [out]


def test_the_databases_copy_is_of_one_moment_and_one_file(tmp_path: Path) -> None:
    database = open_database(tmp_path / "a.db", SCHEMA, create=True)
    try:
        database.write_now(lambda c: c.execute("INSERT INTO a VALUES ('kept')"))
        copy = tmp_path / "copy.db"
        copy_database(database.path, copy)
        database.write_now(lambda c: c.execute("INSERT INTO a VALUES ('later')"))
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        with closing(sqlite3.connect(f"file:{copy}?immutable=1", uri=True)) as connection:
            assert connection.execute("SELECT b FROM a").fetchall() == [("kept",)]
        assert {path.name for path in tmp_path.glob("copy*")} == {"copy.db"}
        with pytest.raises(StorageError, match="can't be made"):
            copy_database(database.path, copy)
    finally:
        database.close()


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert write_backup(tmp_path / "b", [b"a"]).path.read_bytes() == b"a"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
