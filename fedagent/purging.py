"""Carries out the purges that the coordinator asks for: delete, record in the site's own log, then say so."""

import asyncio

import structlog

from fedagent.audit import SiteAudit
from fedagent.held_impressions import HeldImpressions
from fedcore.audit_heads import head_to_proto
from fedcore.errors import FedimpresError
from fedcore.text import printable
from fedcore.v1 import federation_pb2

_MAX_TEXT = 300
log = structlog.get_logger(__name__)


class Purging:
    """One site's banks, and its audit log. Orders are carried out one after the other."""

    def __init__(self, held: HeldImpressions, audit: SiteAudit) -> None:
        self._held = held
        self._audit = audit
        self._turn = asyncio.Lock()

    async def carry_out(
        self, order: federation_pb2.PurgeImpressions
    ) -> federation_pb2.ImpressionsPurged | None:
        """Delete the banks of an order; give the answer once the site's log holds the record of it.

        None if it can't be done: the coordinator asks again at the next connection.
        """
        by, reason = printable(order.by, _MAX_TEXT), printable(order.reason, _MAX_TEXT)
        purge = printable(order.purge, 40)
        async with self._turn:
            try:
                deleted = await asyncio.to_thread(self._held.erase, order.digests)
                earlier = None if deleted else await asyncio.to_thread(self._audit.earlier_purge, purge)
                if earlier is not None:  # the answer to it was lost on its way
                    deleted, head = earlier
                else:
                    head = await self._audit.purged(
                        deleted, asked=len(order.digests), purge=purge, by=by, reason=reason
                    )
            except (FedimpresError, OSError) as error:
                log.error("impressions can't be purged", purge=purge, error=str(error))
                return None
        log.warning("impressions purged", purge=purge, deleted=len(deleted), by=by, reason=reason)
        return federation_pb2.ImpressionsPurged(
            purge=order.purge, deleted=deleted, audit_head=head_to_proto(head)
        )

    async def holdings(self) -> federation_pb2.AgentMessage:
        """What this site holds now, for the coordinator."""
        digests = await asyncio.to_thread(self._held.digests)
        return federation_pb2.AgentMessage(impressions_held=federation_pb2.ImpressionsHeld(digests=digests))
