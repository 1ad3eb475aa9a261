"""What goes into a debug bundle: no secret in any form, the newest of the log, and a part that fails fails alone."""

import asyncio
import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives import serialization

from fedcore.database import open_database
from fedcore.enrollment_token import TOKEN_BEGINNING, EnrollmentToken
from fedcore.errors import ConflictError, ProtocolError, StorageError
from fedcore.pki import key_to_pem, new_key
from fedcore.thread_dump import task_dump, thread_dump
from fedcore.v1 import operations_pb2
from fedctl.bundle_file import write_bundle
from fedserver import debug_bundle
from fedserver.debug_bundle import DebugBundle, database_figures
from fedserver.log_tail import LogTail
from fedserver.redaction import REMOVED, Redactor
from fedserver.schema import MIGRATIONS


def test_a_key_is_taken_out_in_every_form_and_nothing_else_is(tmp_path: Path) -> None:
    key = new_key()
    pem = key_to_pem(key)
    (tmp_path / "pki").mkdir()
    (tmp_path / "pki" / "root.key").write_bytes(pem)
    redactor = Redactor.of_home(tmp_path)
    body = [line for line in pem.decode().splitlines() if "-----" not in line]
    der = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    number = key.private_numbers().private_value.to_bytes(32, "big")
    forms = {
        "pem": pem, "one line of its body": body[0].encode(), "body": "".join(body).encode(), "der": der,
        "hex": der.hex().encode(), "base64 of the file": base64.b64encode(pem), "number": number,
        "number in hex": number.hex().encode(), "json": json.dumps({"key": pem.decode()}).encode(),
    }  # fmt: skip
    for what, form in forms.items():
        cleaned = redactor.clean(b"before " + form + b" after")
        assert REMOVED in cleaned, what
        assert cleaned.startswith(b"before "), what
        for secret in (body[0].encode(), der, number, number.hex().encode(), base64.b64encode(pem)[:60]):
            assert secret not in cleaned, what
    plain = (
        b"site clinic-a, digest "
        + b"ab" * 32
        + b", -----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"
    )
    assert redactor.clean(plain) == plain


def test_keys_of_strangers_and_tokens_are_taken_out_by_their_form(tmp_path: Path) -> None:
    redactor = Redactor.of_home(tmp_path)
    token = EnrollmentToken("ab" * 8, "s" * 32, "clinic-a", 8444, "PEM").encode()
    assert token.startswith(TOKEN_BEGINNING)
    assert redactor.clean(f'{{"reason": "{token}"}}'.encode()) == b'{"reason": "' + REMOVED + b'"}'
    stranger = key_to_pem(new_key())
    assert redactor.clean(b"x" + stranger + b"y") == b"x" + REMOVED + b"\ny"
    assert redactor.clean(stranger[:100]) == REMOVED, "cut off, it is a key all the same"
    body = stranger.split(b"\n", 1)[1].split(b"-----")[0]
    assert redactor.clean(body) == REMOVED, "and so it is without its first line"
    assert redactor.clean(json.dumps(body.decode()).encode()) == b'"' + REMOVED + b'"'


def test_the_log_is_kept_to_its_newest_lines_and_an_exception_with_its_traceback() -> None:
    tail = LogTail(max_lines=2)
    for number in range(3):
        event = {"event": f"line {number}", "odd": Path("/x")}
        assert tail(None, "info", event) is event
    try:
        raise StorageError("disk full")
    except StorageError:
        tail(None, "error", {"event": "failed", "exc_info": True})
    first, second = tail.text().splitlines()
    assert json.loads(first) == {"event": "line 2", "odd": "/x"}
    assert "StorageError: disk full" in json.loads(second)["exception"]
    tail(None, "info", {"event": "x" * 10_000})
    assert max(map(len, tail.text().splitlines())) == 4000


def test_threads_and_tasks_are_named_with_where_they_stand() -> None:
    async def story() -> str:
        waiting = asyncio.create_task(asyncio.sleep(60), name="waits")
        await asyncio.sleep(0)
        text = task_dump()
        waiting.cancel()
        return text

    assert "Task waits:" in asyncio.run(story())
    assert "test_threads_and_tasks_are_named_with_where_they_stand" in thread_dump()


def test_database_figures_count_rows(tmp_path: Path) -> None:
    database = open_database(tmp_path / "fedserver.db", MIGRATIONS, create=True)
    try:
        figures = database_figures(database)
    finally:
        database.close()
    assert figures["user_version"] == len(MIGRATIONS)
    assert figures["rows"]["journal"] == 0
    assert figures["file_bytes"]["fedserver.db"] > 0


def test_a_part_that_fails_says_so_and_large_files_come_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debug_bundle, "_PIECE_BYTES", 4)

    class Some(DebugBundle):
        async def _files(self) -> Any:
            yield "a.txt", "0123456789"
            yield "b.txt", debug_bundle._tried(self._broken)
            yield "c.txt", ""

        def _broken(self) -> str:
            raise StorageError("database is damaged")

    class Home:
        home = tmp_path

    async def collect() -> list[operations_pb2.BundlePart]:
        bundle = Some(cast(Any, Home()))
        return [operations_pb2.BundlePart(name=name, data=data) async for name, data in bundle.pieces()]

    parts = asyncio.run(collect())
    assert max(len(part.data) for part in parts) == 4
    out = tmp_path / "bundle.tar.gz"
    assert write_bundle(out, parts) == ["a.txt", "b.txt", "c.txt", "fedctl.json"]
    assert out.stat().st_mode & 0o777 == 0o600
    with tarfile.open(out) as archive:
        contents = {
            entry.name: cast(io.BufferedReader, archive.extractfile(entry)).read()
            for entry in archive.getmembers()
        }
    assert contents["bundle/a.txt"] == b"0123456789"
    assert contents["bundle/b.txt"] == b"not there: StorageError: database is damaged\n"
    with pytest.raises(ConflictError, match="already there"):
        write_bundle(out, [])


def test_an_archive_is_whole_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "bundle.tar.gz"
    bad = [operations_pb2.BundlePart(name="../x", data=b"")]
    with pytest.raises(ProtocolError, match="can't be"):
        write_bundle(out, bad)
    assert list(tmp_path.iterdir()) == []
