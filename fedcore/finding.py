"""What a check found: one line for people, and whether it is a reason to fail."""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How it stands. Only `FAILED` makes the command fail."""

    OK = "ok"
    WARNING = "warn"
    FAILED = "FAIL"
    SKIPPED = "skip"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: its name, the verdict, what was found, and what to do."""

    name: str
    verdict: Verdict
    text: str
    hint: str = ""

    def __str__(self) -> str:
        """The line that `doctor` prints."""
        return f"{self.verdict:5} {self.name:12} {self.text}" + (f" -> {self.hint}" if self.hint else "")


def good(name: str, text: str) -> Finding:
    """As it should be."""
    return Finding(name, Verdict.OK, text)


def worrying(name: str, text: str, hint: str) -> Finding:
    """Works now, and may not for long or not well."""
    return Finding(name, Verdict.WARNING, text, hint)


def bad(name: str, text: str, hint: str) -> Finding:
    """Does not work."""
    return Finding(name, Verdict.FAILED, text, hint)


def skipped(name: str, text: str) -> Finding:
    """Could not be looked at, because of what another line says."""
    return Finding(name, Verdict.SKIPPED, text)
