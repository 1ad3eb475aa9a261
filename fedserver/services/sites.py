"""The Sites service: what operators decide about a site, and what they ask its agent."""

from datetime import UTC, datetime
from typing import Any

import structlog

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.clock import Clock
from fedcore.errors import ConflictError, PermissionDeniedError, ProtocolError, UnreachableError
from fedcore.text import printable
from fedcore.v1 import admin_pb2, federation_pb2, sites_pb2, sites_pb2_grpc
from fedserver.call_audit import note
from fedserver.certificates import Certificates, Owner
from fedserver.directives import stop_directive
from fedserver.interceptors import caller_of
from fedserver.questions import ask
from fedserver.registry import Registry, SiteRow, not_served
from fedserver.roster import Roster, Session
from fedserver.round_driver import RoundDriver
from fedserver.site_messages import runs_with, site_message
from fedserver.standing import Standing

_MAX_REASON = 300
_ANSWER_S = 8.0
_LINES, _MAX_LINES = 100, 1000
_MAX_TEXT, _MAX_FIELDS = 500, 30
log = structlog.get_logger(__name__)


class SitesService(sites_pb2_grpc.SitesServicer):
    """Standing of sites, their removal, ping, log."""

    def __init__(
        self,
        registry: Registry,
        roster: Roster,
        driver: RoundDriver,
        certificates: Certificates,
        clock: Clock,
    ) -> None:
        self._registry = registry
        self._roster = roster
        self._driver = driver
        self._certificates = certificates
        self._clock = clock

    async def EnableSite(  # noqa: N802 - the name in the contract
        self, request: sites_pb2.ChangeSiteRequest, context: Any
    ) -> admin_pb2.Site:
        """Let runs ask the site again."""
        return self._message(await self._decide(request.site, Standing.ENABLED, request.reason, context))

    async def DrainSite(  # noqa: N802
        self, request: sites_pb2.ChangeSiteRequest, context: Any
    ) -> admin_pb2.Site:
        """Give the site no further work."""
        return self._message(await self._decide(request.site, Standing.DRAINING, request.reason, context))

    async def DisableSite(  # noqa: N802
        self, request: sites_pb2.ChangeSiteRequest, context: Any
    ) -> admin_pb2.Site:
        """Let the site go at once and serve its agent no more."""
        return self._message(await self._decide(request.site, Standing.DISABLED, request.reason, context))

    async def RemoveSite(  # noqa: N802
        self, request: sites_pb2.RemoveSiteRequest, context: Any
    ) -> sites_pb2.RemoveSiteReply:
        """Take the site out of the federation. It is kept out first: what fails after that is done by asking again."""
        note(f"site/{request.site}", force=request.force)
        self._registry.site(request.site)
        runs = runs_with((view.state for view in self._driver.views()), request.site)
        if runs and not request.force:
            first = runs[0]
            raise ConflictError(
                f"site {request.site} takes part in run {first.run} ({first.status}, {first.finished} of "
                f"{first.plan.rounds} rounds finished)",
                hint="wait for the run or abort it; --force lets the run go on without the site",
            )
        row = await self._decide(request.site, Standing.REMOVED, request.reason, context)
        revoked, changed = await self._certificates.revoke_all(
            Owner("site", row.id), by=caller_of(context), reason=f"site {row.decision}"
        )
        note(revoked=changed, serials=" ".join(one.serial for one in revoked))
        return sites_pb2.RemoveSiteReply(site=self._message(self._registry.site(row.id)), revoked=changed)

    async def PingSite(  # noqa: N802
        self, request: sites_pb2.PingSiteRequest, context: Any
    ) -> sites_pb2.PingSiteReply:
        """One round trip to the agent."""
        session = self._session(request.site)

        def ping(number: int) -> federation_pb2.Directive:
            return federation_pb2.Directive(ping=federation_pb2.Ping(nonce=number))

        _, seconds = await ask(session, ping, _ANSWER_S, self._clock)
        note(microseconds=round(seconds * 1e6))
        return sites_pb2.PingSiteReply(round_trip_s=seconds)

    async def ReadSiteLog(  # noqa: N802
        self, request: sites_pb2.ReadSiteLogRequest, context: Any
    ) -> sites_pb2.ReadSiteLogReply:
        """The last lines of the agent's log, if its site's policy shares them."""
        session, lines = self._session(request.site), min(request.lines or _LINES, _MAX_LINES)
        if not session.capabilities.knows_read_log:
            raise ProtocolError(
                f"site {session.site}: its agent (version {session.capabilities.software_version}) can't give its log",
                hint="upgrade the agent, or have the site's people look: journalctl -u fedagent",
            )
        asked_by = str(caller_of(context))

        def read(number: int) -> federation_pb2.Directive:
            read_log = federation_pb2.ReadLog(nonce=number, lines=lines, asked_by=asked_by)
            return federation_pb2.Directive(read_log=read_log)

        message, _ = await ask(session, read, _ANSWER_S, self._clock)
        said = message.log_lines
        if said.refusal:
            raise PermissionDeniedError(
                f"site {session.site} {printable(said.refusal, _MAX_TEXT)}",
                hint="its own people decide: share_logs = true in the site's policy.toml",
            )
        found = [_checked(line) for line in said.lines[-lines:]]
        note(lines=len(found))
        return sites_pb2.ReadSiteLogReply(lines=found)

    async def _decide(self, site: str, standing: Standing, reason: str, context: Any) -> SiteRow:
        """Change a site's standing, and make it so: durable first, then the stream, then the rounds."""
        caller, why = caller_of(context), printable(reason, _MAX_REASON)
        note(f"site/{site}", reason=why)
        row = await self._registry.decide(site, standing, by=caller.id, reason=why, now=datetime.now(UTC))
        log.warning(
            "a site's standing was decided", site=row.id, standing=standing.value, by=str(caller), reason=why
        )
        session = self._roster.sessions.get(row.id)
        if session is not None and not standing.served:
            refusal = not_served(row)
            session.send(stop_directive("", refusal.message))
            session.end(refusal)
        self._driver.nudge()
        return row

    def _session(self, site: str) -> Session:
        """The site's connection. Raises NotFoundError, UnreachableError if it is away."""
        note(f"site/{site}")
        row = self._registry.site(site)
        session = self._roster.sessions.get(site)
        if session is None:
            seen = self._roster.last_seen(site) or row.last_seen or "never"
            kept_out = "" if row.enabled else f"; it is {row.decision}"
            raise UnreachableError(
                f"site {site} is not connected, last seen: {seen}{kept_out}",
                hint="at the site: fedagent status, fedagent doctor",
            )
        return session

    def _message(self, row: SiteRow) -> admin_pb2.Site:
        return site_message(row, self._roster, (view.state for view in self._driver.views()))


def _checked(line: federation_pb2.LogLine) -> federation_pb2.LogLine:
    """A line of a site's log, cut to what can be shown."""
    fields = list(line.fields.items())[:_MAX_FIELDS]
    return federation_pb2.LogLine(
        at=printable(line.at, 40),
        level=printable(line.level, 20),
        event=printable(line.event, _MAX_TEXT),
        fields={printable(key, 40): printable(value, _MAX_TEXT) for key, value in fields},
    )
