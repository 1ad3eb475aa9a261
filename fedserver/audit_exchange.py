"""The coordinator's half of the two heads in a hello: each side keeps the head of the other's audit log."""

from dataclasses import dataclass

import structlog

from fedcore.audit_heads import head_from_proto, head_to_proto
from fedcore.audit_store import AuditLog
from fedcore.database import Database
from fedcore.v1 import audit_pb2, federation_pb2
from fedserver.call_audit import note

_log = structlog.get_logger("fedserver.audit")


@dataclass(frozen=True, slots=True)
class Heads:
    """What goes into the reply: the head of this log, and what was kept of the site's before this hello."""

    ours: audit_pb2.AuditHead
    kept: audit_pb2.AuditHead


class AuditExchange:
    """Keeps the heads of the sites' logs, and what they have seen of this one."""

    def __init__(self, database: Database, log: AuditLog) -> None:
        self._database = database
        self._log = log

    async def hello(self, site: str, request: federation_pb2.HelloRequest) -> Heads:
        """Take in a site's heads; what contradicts goes to the log, and stays in `fedctl audit verify`.

        A site is let in all the same: whose records are gone is for people to find out. Raises ProtocolError.
        """
        who = f"site/{site}"
        theirs = head_from_proto(request.audit_head, who)
        claim = head_from_proto(request.kept_audit_head, who)
        heads = Heads(head_to_proto(self._log.head()), head_to_proto(self._log.kept_of(who)))
        found = await self._database.write(lambda c: self._log.exchange(c, who, theirs=theirs, ours=claim))
        note(
            who,
            site_head=str(theirs),
            **{f"contradiction_{n}": text for n, text in enumerate(found, start=1)},
        )
        for text in found:
            _log.error("audit logs contradict each other", site=site, what=text)
        return heads
