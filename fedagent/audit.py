"""The site's audit log: every byte that leaves this site, and every artifact that arrives, is accounted for here.

What leaves is recorded before its first byte goes out, and again with the result: an update with digest, size, run and
round; figures of an evaluation; and the control messages (heartbeats, progress), as a count, when a connection ends.
A log that can't be written stops deliveries.
"""

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from fedagent.schema import MIGRATIONS
from fedagent.terms import Followed, check_not_older, follow, newest_term, restores
from fedcore.audit import OK, Fact, Head, Value
from fedcore.audit_heads import head_from_proto, head_to_proto
from fedcore.audit_store import AuditLog
from fedcore.audit_text import document
from fedcore.database import Database, open_database
from fedcore.errors import FedimpresError, PermissionDeniedError, TermError
from fedcore.term import Term, term_from_proto, term_to_proto
from fedcore.text import printable
from fedcore.v1 import federation_pb2

# The other side, under the name by which its log is known here.
COORDINATOR = "coordinator"
_AGENT = "agent"
_PURGE = "impressions.purge"
# Digests that one record names.
_MAX_NAMED = 20
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Purpose:
    """What an artifact is for: "update", "model", "impressions", "strategy state"; and in which run and round."""

    what: str
    run: str = ""
    round: int = 0

    @property
    def detail(self) -> dict[str, Value]:
        """As a record has it."""
        return {"purpose": self.what, "run": self.run, "round": self.round}


@dataclass(slots=True)
class ControlBytes:
    """Messages that went out over one connection, and their bytes."""

    messages: int = 0
    total: int = 0

    def add(self, size_bytes: int) -> None:
        """Count a message."""
        self.messages += 1
        self.total += size_bytes


class SiteAudit:
    """The log of one site, and the heads that its hellos exchange."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.log = AuditLog(database)
        self._refused: set[str] = set()

    async def event(self, action: str, thing: str = "", **detail: Value) -> None:
        """Record something that this agent did or saw."""
        await self.log.record(Fact(action, _AGENT, object=thing, detail=detail))

    async def purged(self, digests: Sequence[str], *, asked: int, purge: str, by: str, reason: str) -> Head:
        """Record that these banks of impressions were deleted here, of `asked` that were to go; give the new head."""
        return await self.log.record(purge_fact(digests, asked=asked, purge=purge, by=by, reason=reason))

    def earlier_purge(self, purge: str) -> tuple[list[str], Head] | None:
        """What a purge deleted here, and its record, if it was carried out before; reads the log from its start."""
        for entry in self.log.walk():
            if f'"{purge}"' in entry.body:  # spares reading every record
                record = document(entry)
                if record.get("action") == _PURGE and record["detail"].get("purge") == purge:
                    named = [v for key, v in record["detail"].items() if key.startswith("digest_")]
                    return named, Head(entry.position, entry.digest)
        return None

    # -- hello ------------------------------------------------------------------------------------

    def introduce(self, hello: federation_pb2.HelloRequest) -> None:
        """Put the head of this log, the kept one of the coordinator's and its newest known term into a hello."""
        hello.audit_head.CopyFrom(head_to_proto(self.log.head()))
        hello.kept_audit_head.CopyFrom(head_to_proto(self.log.kept_of(COORDINATOR)))
        hello.newest_term.CopyFrom(term_to_proto(self._database.read(newest_term)))

    async def greeted(self, hello: federation_pb2.HelloRequest, reply: federation_pb2.HelloReply) -> None:
        """Record a hello, and keep the coordinator's head; what contradicts goes to the log and stays there.

        A newer term is followed: that the coordinator's log went back with a restore is recorded as that. Raises TermError
        for an older one, ProtocolError for heads that are none.
        """
        term = term_from_proto(reply.term, COORDINATOR)
        theirs = head_from_proto(reply.audit_head, COORDINATOR)
        claim = head_from_proto(reply.kept_audit_head, COORDINATOR)
        detail: dict[str, Value] = {"bytes": hello.ByteSize(), "coordinator_head": str(theirs)}

        def write(connection: sqlite3.Connection) -> list[str]:
            self._follow(connection, term, theirs)
            found = self.log.exchange(connection, COORDINATOR, theirs=theirs, ours=claim)
            detail.update({f"contradiction_{n}": text for n, text in enumerate(found, start=1)})
            fact = Fact("site.hello", _AGENT, object=f"federation/{reply.federation}", detail=detail)
            self.log.append(connection, fact)
            return found

        for text in await self._database.write(write):
            _log.error("audit logs contradict each other", what=text)

    def _follow(self, connection: sqlite3.Connection, term: Term, theirs: Head) -> None:
        known = newest_term(connection)
        check_not_older(term, known)
        if term == known:
            return
        before = Head()
        if term.number > 1:
            before = self.log.restart(connection, COORDINATOR, theirs)
            detail: dict[str, Value] = {"term": str(term), "before": str(before), "after": str(theirs)}
            self.log.append(
                connection, Fact("coordinator.restored", _AGENT, object=COORDINATOR, detail=detail)
            )
            _log.warning("the coordinator was restored from a backup", **detail)
        follow(connection, term, self.log.time(), before, theirs)

    async def refused(self, error: TermError) -> None:
        """Record that a coordinator of an older term was met; the same one again is not recorded again."""
        await self._refuse("coordinator.refuse", COORDINATOR, error)

    async def _refuse(self, action: str, thing: str, error: FedimpresError, **detail: Value) -> None:
        if error.message not in self._refused:
            self._refused.add(error.message)
            told: dict[str, Value] = {"error": error.message, **detail}
            await self.log.record(Fact(action, _AGENT, object=thing, result=error.code, detail=told))

    async def disconnected(self, told: ControlBytes) -> None:
        """Record what went out over a connection that is over, besides artifacts."""
        await self.event("control.sent", COORDINATOR, messages=told.messages, bytes=told.total)

    # -- what leaves and what arrives -------------------------------------------------------------

    async def figures(self, report: federation_pb2.EvaluationReport) -> None:
        """Record an evaluation's figures that are about to leave."""
        body = report.SerializeToString(deterministic=True)
        purpose = Purpose("evaluation figures", report.run, report.round)
        digest = hashlib.sha256(body).hexdigest()
        await self.event("figures.send", f"figures/{digest}", bytes=len(body), **purpose.detail)

    async def statistics(self, report: federation_pb2.StatisticsReport) -> None:
        """Record BatchNorm statistics that are about to leave."""
        purpose = Purpose("statistics", report.run, report.round)
        await self.event(
            "statistics.send",
            f"artifact/{report.manifest.digest}",
            bytes=len(report.payload),
            **purpose.detail,
        )

    async def statistics_refused(
        self, task: federation_pb2.RecalibrateTask, error: PermissionDeniedError
    ) -> None:
        """Record that statistics were asked for which this site gives to nobody; the same again is not recorded again."""
        purpose = Purpose("statistics", task.run, task.round)
        thing = f"artifact/{printable(task.model.digest, 64)}"
        await self._refuse("statistics.refuse", thing, error, **purpose.detail)

    async def log_lines(self, lines: federation_pb2.LogLines) -> None:
        """Record lines of this agent's log that are about to leave, or that they were refused."""
        body = lines.SerializeToString(deterministic=True)
        detail: dict[str, Value] = {
            "bytes": len(body), "lines": len(lines.lines), "asked_by": printable(lines.asked_by, 100),
        }  # fmt: skip
        digest = hashlib.sha256(body).hexdigest()
        result = "refused" if lines.refusal else OK
        await self.log.record(Fact("log.send", _AGENT, object=f"log/{digest}", result=result, detail=detail))

    async def sending(self, digest: str, total_bytes: int, offset: int, purpose: Purpose) -> None:
        """Record an artifact that is about to leave, from an offset."""
        await self.event(
            "artifact.send", f"artifact/{digest}", bytes=total_bytes, offset=offset, **purpose.detail
        )

    async def sent(self, digest: str, sent_bytes: int, result: str, purpose: Purpose) -> None:
        """Record how a sending ended: "ok" or what cut it, and how many bytes had been handed over."""
        detail = {"bytes": sent_bytes, **purpose.detail}
        await self.log.record(
            Fact("artifact.sent", _AGENT, object=f"artifact/{digest}", result=result, detail=detail)
        )

    async def arrived(self, digest: str, total_bytes: int, purpose: Purpose) -> None:
        """Record an artifact that came whole, its digest checked."""
        await self.event("artifact.receive", f"artifact/{digest}", bytes=total_bytes, **purpose.detail)


def purge_fact(digests: Sequence[str], *, asked: int, purge: str, by: str, reason: str) -> Fact:
    """Banks of impressions were deleted at this site. `purge` is the coordinator's name for it, "" by the site's hand."""
    one = f"artifact/{digests[0]}" if len(digests) == 1 else "impressions"
    named = {f"digest_{n}": digest for n, digest in enumerate(digests[:_MAX_NAMED], start=1)}
    detail: dict[str, Value] = {
        "deleted": len(digests),
        "asked": asked,
        "purge": purge,
        "by": by,
        "reason": reason,
    }
    return Fact(_PURGE, _AGENT if purge else by, object=one, detail={**detail, **named})


def open_site_audit(path: Path) -> Database:
    """Open the file of a site's log, made if it is not there. Close it. Raises StorageError."""
    return open_database(path, MIGRATIONS, create=not path.exists())


@contextmanager
def site_log(path: Path) -> Iterator[AuditLog]:
    """The log of a site for reading, also while its agent runs. Raises StorageError if there is none."""
    database = open_database(path, MIGRATIONS)
    try:
        yield AuditLog(database)
    finally:
        database.close()


def coordinators_restores(path: Path) -> list[Followed]:
    """The restores of its coordinator that a site has followed, the oldest first. Raises StorageError."""
    database = open_database(path, MIGRATIONS)
    try:
        return restores(database)
    finally:
        database.close()
