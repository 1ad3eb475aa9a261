"""Which agents are connected, what they can do, and what each does now. Lives in memory: a restart begins empty."""

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from fedcore.clock import Clock
from fedcore.errors import FedimpresError, IdentityError, OverloadedError
from fedcore.v1 import federation_pb2
from fedserver.round_decisions import Presence, Withheld
from fedserver.round_state import RunState
from fedserver.round_work import SiteCommand
from fedserver.suitability import unable_reason

_QUEUE_DEPTH = 64

Assignment = SiteCommand


@dataclass(slots=True)
class SiteProgress:
    """What a site said of its work last."""

    stage: str = ""
    done: int = 0
    total: int = 0
    loss: float = 0.0
    images_per_s: float = 0.0


@dataclass(slots=True, eq=False)
class Session:
    """One connection of one agent. `outbox` holds directives to send; None in it ends the stream."""

    site: str
    id: str
    capabilities: federation_pb2.Capabilities
    since: float
    last_progress: float
    outbox: asyncio.Queue[federation_pb2.Directive | None] = field(
        default_factory=lambda: asyncio.Queue(_QUEUE_DEPTH)
    )
    run: str | None = None
    assignment: Assignment | None = None
    progress: SiteProgress = field(default_factory=SiteProgress)
    # Whether the agent knows if it has work: one that returns may still be busy with what nobody waits for.
    settled: bool = False
    # Questions that wait for the agent's answer, by number (fedserver.questions).
    asked: dict[int, asyncio.Future[federation_pb2.AgentMessage]] = field(default_factory=dict)
    # Why the coordinator ended the stream, if it refused the site.
    refusal: FedimpresError | None = None
    # What `unable` found last, and for which run and objective.
    _found: tuple[tuple[str, str], str] | None = None

    def unable(self, state: RunState) -> str:
        """Why the site can't take part in a run, in words; empty if it can. Every look at the rounds asks every session."""
        asked = state.run, state.objective
        if self._found is None or self._found[0] != asked:
            self._found = asked, unable_reason(state, self.capabilities)
        return self._found[1]

    def learn(self, capabilities: federation_pb2.Capabilities) -> None:
        """Take in what the site can do from now on."""
        self.capabilities.CopyFrom(capabilities)
        self._found = None

    def send(self, directive: federation_pb2.Directive) -> bool:
        """Queue a directive; False if the agent reads too slowly to take it."""
        try:
            self.outbox.put_nowait(directive)
        except asyncio.QueueFull:
            return False
        return True

    def end(self, refusal: FedimpresError | None = None) -> None:
        """End the stream, after what is queued if there is room, else at once; with `refusal` as the reason."""
        self.refusal = refusal or self.refusal
        while self.outbox.full():
            self.outbox.get_nowait()
        self.outbox.put_nowait(None)


@dataclass(slots=True)
class _Greeting:
    site: str
    capabilities: federation_pb2.Capabilities
    at: float


class Roster:
    """Sessions by site. The newest connection of a site is the one that counts."""

    def __init__(self, clock: Clock, max_agents: int) -> None:
        self._clock = clock
        self._max_agents = max_agents
        self._greetings: dict[str, _Greeting] = {}
        self._sessions: dict[str, Session] = {}
        self._left: dict[str, float] = {}
        self._seen: dict[str, str] = {}
        # Digests of the banks of impressions that each site said it holds, since this coordinator started.
        self._impressions: dict[str, frozenset[str]] = {}

    @property
    def sessions(self) -> dict[str, Session]:
        """The open session of each connected site."""
        return self._sessions

    def greet(self, site: str, capabilities: federation_pb2.Capabilities) -> str:
        """Register a hello; returns the session id that Directives must name. Raises OverloadedError."""
        if site not in self._sessions and len(self._sessions) >= self._max_agents:
            raise OverloadedError(
                f"{len(self._sessions)} agents are connected, the limit of this coordinator",
                hint="agents try again by themselves; the limit is max_agents of [admission] in fedserver.toml",
            )
        self._greetings = {s: g for s, g in self._greetings.items() if g.site != site}
        session = secrets.token_hex(8)
        self._greetings[session] = _Greeting(site, capabilities, self._clock.monotonic())
        return session

    def open(self, site: str, session_id: str) -> Session:
        """Open the stream that a hello announced, ending an older one of the same site. Raises IdentityError."""
        greeting = self._greetings.pop(session_id, None)
        if greeting is None or greeting.site != site:
            raise IdentityError(f"{site}: no hello for session {session_id[:40]!r}", hint="call Hello first")
        older = self._sessions.pop(site, None)
        if older is not None:
            older.end()
        now = self._clock.monotonic()
        session = Session(site, session_id, greeting.capabilities, since=now, last_progress=now)
        self._sessions[site] = session
        self.touch(session)
        return session

    def close(self, session: Session) -> None:
        """Forget a session whose stream has ended, unless a newer one took its place."""
        if self._sessions.get(session.site) is session:
            del self._sessions[session.site]
            self._left[session.site] = self._clock.monotonic()
        for waiting in session.asked.values():
            if not waiting.done():
                waiting.set_result(federation_pb2.AgentMessage())
        self.touch(session)

    def touch(self, session: Session) -> None:
        """Note that the site was heard of."""
        self._seen[session.site] = datetime.now(UTC).isoformat(timespec="seconds")

    def progressed(self, site: str) -> None:
        """Note that a site's work moved."""
        session = self._sessions.get(site)
        if session is not None:
            session.last_progress = self._clock.monotonic()

    def holds_impressions(self, site: str, digests: frozenset[str]) -> None:
        """Note all banks of impressions that a site said it holds."""
        self._impressions[site] = digests

    def impressions_of(self, site: str) -> frozenset[str] | None:
        """The banks that a site said last it holds; None if it has said nothing."""
        return self._impressions.get(site)

    def last_seen(self, site: str) -> str:
        """RFC 3339 time at which the site was last heard of since this coordinator started; empty if never."""
        return self._seen.get(site, "")

    def presence(self, unable: dict[str, str], withheld: Mapping[str, Withheld]) -> dict[str, Presence]:
        """Every site that is or was here, and all that are `withheld`; `unable` says why a connected site can't take
        part.
        """
        result = {
            site: Presence(connected=False, unable="", since=at, last_progress=at)
            for site, at in self._left.items()
        }
        for site, session in self._sessions.items():
            result[site] = Presence(
                connected=True, unable=unable.get(site, ""), since=session.since,
                last_progress=session.last_progress, num_examples=session.capabilities.num_examples,
                knows_recalibration=session.capabilities.knows_recalibrate,
            )  # fmt: skip
        for site, why in withheld.items():
            known = result.get(site) or Presence(connected=False, unable="", since=0.0, last_progress=0.0)
            result[site] = replace(known, withheld=why)
        return result
