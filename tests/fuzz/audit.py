"""Exported audit logs, heads, and the events of the journal."""

from pathlib import Path

from fedcore.audit import Entry, Fact, Head, digest_of, parse_head, seal, verify
from fedcore.audit_text import export_line, head_option, read_export
from fedcore.errors import ConfigError
from tests.fuzz.target import TEXT_WORDS, Target, only


def _entries() -> list[Entry]:
    head, made = Head(), []
    for number in range(3):
        fact = Fact("run.submit", "operator/admin", object=f"run-{number}", detail={"n": number, "ok": True})
        made.append(seal(head, "2026-01-01T00:00:00Z", fact))
        head = Head(made[-1].position, made[-1].digest)
    return made


def check_export(data: bytes, folder: Path) -> None:
    path = folder / "audit.jsonl"
    path.write_bytes(data)
    with only(ConfigError):
        entries = list(read_export(path))
        verify(entries)
        path.write_text("".join(f"{export_line(entry)}\n" for entry in entries))
        assert list(read_export(path)) == entries


def check_body(data: bytes, folder: Path) -> None:
    """A body as it lies in a database that somebody wrote in, with the digest that it should have."""
    body = data.decode(errors="surrogateescape")
    entry = Entry(1, body, digest_of(body))
    verdict = verify([entry])
    assert verdict.records == (verdict.finding is None)
    path = folder / "audit.jsonl"
    path.write_text(f"{export_line(entry)}\n")
    assert list(read_export(path)) == [entry]


def check_head(data: bytes, folder: Path) -> None:
    with only(ConfigError):
        head = head_option(data.decode(errors="surrogateescape"))
        assert head is None or parse_head(str(head)) == head


TARGETS = [
    Target(
        "audit_export", check_export, lambda: ["".join(f"{export_line(e)}\n" for e in _entries()).encode()]
    ),
    Target("audit_body", check_body, lambda: [_entries()[0].body.encode()]),
    Target("audit_head", check_head, lambda: [b"3:" + b"a" * 64], (*TEXT_WORDS, "²".encode(), b":")),
]
