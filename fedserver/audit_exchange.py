"""The coordinator's half of the two heads in a hello: each side keeps the head of the other's audit log."""

from dataclasses import dataclass

import structlog

from fedcore.audit import Head, Value
from fedcore.audit_heads import head_from_proto, head_to_proto
from fedcore.audit_store import AuditLog
from fedcore.database import Database
from fedcore.errors import TermError
from fedcore.term import Term, term_from_proto
from fedcore.v1 import audit_pb2, federation_pb2
from fedserver.call_audit import note
from fedserver.terms import Terms

_log = structlog.get_logger("fedserver.audit")


@dataclass(frozen=True, slots=True)
class Heads:
    """What goes into the reply: the head of this log, what was kept of the site's before this hello, and the term."""

    ours: audit_pb2.AuditHead
    kept: audit_pb2.AuditHead
    term: Term


class AuditExchange:
    """Keeps the heads of the sites' logs, and what they have seen of this one."""

    def __init__(self, database: Database, log: AuditLog) -> None:
        self._database = database
        self._log = log
        self._terms = Terms(database)

    async def hello(self, site: str, request: federation_pb2.HelloRequest) -> Heads:
        """Take in a site's heads; what contradicts goes to the log, and stays in `fedctl audit verify`.

        A site is let in all the same: whose records are gone is for people to find out. Records that a restore lost are no
        contradiction: they are noted as that. Raises ProtocolError, and TermError if the site knows a newer term.
        """
        who = f"site/{site}"
        term, known = self._terms.current(), term_from_proto(request.newest_term, who)
        if known > term:
            raise self._superseded(site, term, known)
        theirs = head_from_proto(request.audit_head, who)
        claim = head_from_proto(request.kept_audit_head, who)
        heads = Heads(head_to_proto(self._log.head()), head_to_proto(self._log.kept_of(who)), term)
        lost_after, lost = self._terms.lost_after(known), dict[str, Value]()
        if lost_after is not None and claim.sequence > lost_after:
            lost = {"lost_by_restore": str(claim)}
            claim = Head()
        found = await self._database.write(lambda c: self._log.exchange(c, who, theirs=theirs, ours=claim))
        note(
            who,
            site_head=str(theirs),
            **lost,
            **{f"contradiction_{n}": text for n, text in enumerate(found, start=1)},
        )
        for text in found:
            _log.error("audit logs contradict each other", site=site, what=text)
        return heads

    def _superseded(self, site: str, term: Term, known: Term) -> TermError:
        """The refusal of a site that has followed another coordinator; for people at both ends to look at."""
        _log.error(
            "a site knows a newer term: another coordinator was restored in this one's place",
            site=site,
            term=str(term),
            known=str(known),
        )
        return TermError(
            f"this coordinator is of {term}, but site {site} has followed one of {known}",
            hint="stop this coordinator, it was replaced; if it is the right one, restore it again with "
            f"--term {known.number + 1}",
        )
