"""The sites' part of a purge: what each is still to delete, and what it says it did.

A purge is journalled with the sites it is asked of. A site is told when it connects, and at once if it is connected; what
it has not confirmed it is told again. So a site that was away, or whose answer was lost, does it when it comes back.
"""

import structlog

from fedcore.audit import Fact, Value
from fedcore.audit_heads import head_from_proto
from fedcore.audit_store import AuditLog
from fedcore.errors import ConflictError, ProtocolError
from fedcore.tensor_stream import check_digest_form
from fedcore.v1 import federation_pb2
from fedserver import round_events as ev
from fedserver.impression_purges import purged_only, unconfirmed
from fedserver.roster import Roster, Session
from fedserver.round_driver import RoundDriver
from fedserver.round_state import Purge

_MAX_DIGESTS = 100_000
log = structlog.get_logger(__name__)


class SitePurges:
    """Directives to sites and their confirmations."""

    def __init__(self, driver: RoundDriver, roster: Roster, audit: AuditLog) -> None:
        self._driver = driver
        self._roster = roster
        self._audit = audit

    def ask(self, session: Session) -> None:
        """Tell a connected site of every purge that it has still to carry out.

        One that does not fit into its queue is told at its next connection.
        """
        for directive in self.directives(session.site):
            if not session.send(directive):
                log.warning("purge could not be told, the agent reads too slowly", site=session.site)

    def ask_connected(self, sites: tuple[str, ...]) -> None:
        """Tell those of `sites` that are connected."""
        for site in sites:
            session = self._roster.sessions.get(site)
            if session is not None:
                self.ask(session)

    def directives(self, site: str) -> list[federation_pb2.Directive]:
        """What a site has still to carry out, one directive a purge; banks of several runs may be in one."""
        pending = [p for view in self._driver.views() for p in unconfirmed(view.state, site)]
        digests = {p.id: sorted({d for q in pending if q.id == p.id for d in q.digests}) for p in pending}
        return [_order(purge, digests[purge.id]) for purge in {p.id: p for p in pending}.values()]

    async def confirmed(self, site: str, said: federation_pb2.ImpressionsPurged) -> None:
        """Record a site's word here, then in the runs. One that was not awaited is only logged. Raises ProtocolError."""
        who = f"site/{site}"
        head = str(head_from_proto(said.audit_head, who))
        awaiting = {
            view.state.run: {digest for p in purges for digest in p.digests}
            for view in self._driver.views()
            if (purges := [p for p in unconfirmed(view.state, site) if p.id == said.purge])
        }
        asked = set().union(*awaiting.values()) if awaiting else set()
        if not asked:
            log.info("agent confirmed a purge that nobody awaits", site=site, purge=said.purge[:40])
            return
        deleted = [digest for digest in said.deleted if digest in asked]
        detail: dict[str, Value] = {
            "purge": said.purge,
            "banks": len(asked),
            "deleted": len(deleted),
            "site_head": head,
        }
        detail |= {f"digest_{n}": digest for n, digest in enumerate(deleted[:20], start=1)}
        await self._audit.record(Fact("impressions.purged", who, "site", object=who, detail=detail))
        for run, digests in awaiting.items():
            event = ev.PurgeConfirmed(
                at=self._driver.wall(), purge=said.purge, site=site, audit_head=head,
                deleted=tuple(digest for digest in deleted if digest in digests),
            )  # fmt: skip
            try:
                await self._driver.post(run, event)
            except ConflictError as error:
                log.info("agent's confirmation came twice", site=site, error=error.message)
        log.info("site purged impressions", site=site, purge=said.purge, deleted=len(deleted))

    def held(self, session: Session, said: federation_pb2.ImpressionsHeld) -> None:
        """Note which banks a site says it holds; ask again for those that it had confirmed to be gone.

        They are back when the site's disk was restored from a backup, say. Raises ProtocolError, TransferError.
        """
        site = session.site
        if len(said.digests) > _MAX_DIGESTS:
            raise ProtocolError(
                f"{site}: says that it holds {len(said.digests)} banks, expected at most {_MAX_DIGESTS}"
            )
        digests = frozenset(check_digest_form(digest) for digest in said.digests)
        self._roster.holds_impressions(site, digests)
        states = [view.state for view in self._driver.views()]
        asked = {digest for state in states for p in unconfirmed(state, site) for digest in p.digests}
        back = (digests & purged_only(states)) - asked
        for purge in {p.id: p for state in states for p in state.purges if back & set(p.digests)}.values():
            log.warning("site holds impressions that it had purged", site=site, purge=purge.id)
            session.send(_order(purge, sorted(back & set(purge.digests))))


def _order(purge: Purge, digests: list[str]) -> federation_pb2.Directive:
    order = federation_pb2.PurgeImpressions(purge=purge.id, digests=digests, by=purge.by, reason=purge.reason)
    return federation_pb2.Directive(purge_impressions=order)
