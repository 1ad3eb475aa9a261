"""Audit records as people and files have them: one line a record, an exported file, which records were asked for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcore.audit import Entry, Head, Verdict, canonical, parse_head
from fedcore.errors import AuditError, ConfigError
from fedcore.parsing import parse_json


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records: those whose action begins so, whose actor, object contains so; all where empty."""

    action: str = ""
    actor: str = ""
    thing: str = ""
    refused: bool = False

    def takes(self, record: Mapping[str, Any]) -> bool:
        """Whether a record is among them. One that can't be read always is."""
        return (
            str(record.get("action", self.action)).startswith(self.action)
            and self.actor in str(record.get("actor", self.actor))
            and self.thing in str(record.get("object", self.thing))
            and not (self.refused and record.get("result") == "ok")
        )


def document(entry: Entry) -> dict[str, Any]:
    """A record as an object; of one that can't be read, where it stands and what stands there."""
    try:
        found = entry.document
    except (ValueError, TypeError):
        return {"sequence": entry.position, "unreadable": entry.body[:300], "digest": entry.digest}
    return found


def detail_text(record: Mapping[str, Any]) -> str:
    """A record's details as key=value."""
    detail = record.get("detail")
    return " ".join(f"{key}={value}" for key, value in detail.items()) if isinstance(detail, dict) else ""


def export_line(entry: Entry) -> str:
    """An entry as a line of an exported file, from which `read_export` gives the same entry."""
    try:
        record = parse_json(entry.body)
        exact = isinstance(record, dict) and canonical(record) == entry.body
    except ValueError:
        exact = False
    # A body that is not what this program writes goes as text, so that what was found is what is shown.
    key, value = ("record", record) if exact else ("body", entry.body)
    return canonical({"position": entry.position, "digest": entry.digest, key: value})


def read_export(path: Path) -> Iterator[Entry]:
    """The entries of an exported file, in order. Raises ConfigError that names a line that is none."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield _entry(line, f"{path} line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error


def _entry(line: str, where: str) -> Entry:
    try:
        found = parse_json(line)
        body = found["body"] if "body" in found else canonical(found["record"])
        return Entry(int(found["position"]), str(body), str(found["digest"]))
    except (ValueError, OverflowError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{where} is not a record of an exported audit log", hint="make it with 'audit export'"
        ) from error


def head_option(text: str) -> Head | None:
    """A head given on the command line; None if none was. Raises ConfigError."""
    if not text:
        return None
    try:
        return parse_head(text)
    except ValueError as error:
        raise ConfigError(f"--head: {error}", hint="'audit verify' prints the head of a log") from error


def verdict_document(verdict: Verdict, contradictions: Sequence[str] = ()) -> dict[str, Any]:
    """A verdict as an object. `contradictions` say, in words, what does not fit with the other side's log."""
    finding = verdict.finding
    return {
        "ok": finding is None and not contradictions,
        "records": verdict.records,
        "head": str(verdict.head),
        "finding": None
        if finding is None
        else {"sequence": finding.sequence, "kind": finding.kind, "text": finding.text},
        "contradictions": list(contradictions),
    }


def raise_broken(whose: str, report: Mapping[str, Any]) -> None:
    """Raise AuditError that names the first bad record, unless a report is good."""
    if report["ok"]:
        return
    said = ([report["finding"]["text"]] if report["finding"] else []) + report["contradictions"]
    raise AuditError(
        f"{whose}: {'; '.join(said)}",
        hint="keep a copy of the file as it is, and compare it with backups and exports",
    )
