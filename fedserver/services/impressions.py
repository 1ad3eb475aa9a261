"""The Impressions service: what is stored of impressions, who looks at them, and their removal."""

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.artifact_store import ArtifactStore
from fedcore.errors import ConflictError, NotFoundError, ProtocolError, StorageError
from fedcore.tensor_file import read_manifest
from fedcore.text import printable
from fedcore.v1 import impressions_pb2, impressions_pb2_grpc
from fedserver import round_events as ev
from fedserver.bank_messages import bank_message, later_banks, with_findings
from fedserver.call_audit import note
from fedserver.downloads import stream_artifact
from fedserver.impression_purges import banks, in_use, kept, raise_if_purged, under_way
from fedserver.interceptors import caller_of
from fedserver.pages import page, token_number
from fedserver.retention import erase_purged
from fedserver.roster import Roster
from fedserver.round_driver import RoundDriver, RunView
from fedserver.round_state import RunState
from fedserver.site_purges import SitePurges
from fedserver.turns import Turns

_MAX_REASON = 200
# Digests that one record of the audit log names; a purge's record also counts them all.
_MAX_NAMED = 20


class ImpressionsService(impressions_pb2_grpc.ImpressionsServicer):
    """Message <-> round driver; what sites are asked goes through `purges`."""

    def __init__(
        self,
        driver: RoundDriver,
        roster: Roster,
        purges: SitePurges,
        store: ArtifactStore,
        pool: ThreadPoolExecutor,
        turns: Turns,
    ) -> None:
        self._driver = driver
        self._roster = roster
        self._purges = purges
        self._store = store
        self._pool = pool
        self._turns = turns

    async def ListImpressions(  # noqa: N802 - the name in the contract
        self, request: impressions_pb2.ListImpressionsRequest, context: Any
    ) -> impressions_pb2.ListImpressionsReply:
        """All banks, or one run's, by run and round."""
        views = [self._driver.view(request.run)] if request.run else self._driver.views()
        found, rest = await asyncio.to_thread(
            lambda: page(self._banks(views, request.page_token), lambda bank: bank.ByteSize())
        )
        return impressions_pb2.ListImpressionsReply(banks=found, next_page_token=rest)

    async def GetImpressions(  # noqa: N802
        self, request: impressions_pb2.GetImpressionsRequest, context: Any
    ) -> impressions_pb2.ImpressionBank:
        """One bank with all that is known of it."""
        state, number = self._bank(request.run, request.round)
        return await asyncio.to_thread(
            lambda: with_findings(self._message(state, number), state, self._store)
        )

    async def PreviewImpressions(  # noqa: N802
        self, request: impressions_pb2.PreviewImpressionsRequest, context: Any
    ) -> AsyncIterator[Any]:
        """Stream a bank to those who may see it."""
        note(f"run/{request.run}", round=request.round, offset=request.offset)
        state, number = self._bank(request.run, request.round)
        digest = banks(state)[number]
        note(f"artifact/{digest}", run=state.run, round=number)
        if state.purge_of(number) is not None:
            raise_if_purged([state], digest)
        path = self._store.find(digest)
        note(bytes=read_manifest(path)[0].payload_bytes)
        async for part in stream_artifact(path, digest, request.offset, self._pool, self._turns):
            yield part

    async def PurgeImpressions(  # noqa: N802
        self, request: impressions_pb2.PurgeImpressionsRequest, context: Any
    ) -> impressions_pb2.PurgeImpressionsReply:
        """Remove banks here, then ask the sites. What the sites answer is in the banks' purge state."""
        reason = printable(request.reason, _MAX_REASON)
        note(f"run/{request.run}", reason=reason, force=request.force)
        view = self._driver.view(request.run)
        note(f"run/{view.state.run}")
        numbers = _asked_rounds(request, view.state, reason)
        digests = {digest for r, digest in kept(view.state).items() if r in numbers}
        holding = [v for v in self._driver.views() if digests & set(kept(v.state).values())]
        if not request.force:
            for holder in holding:
                _refuse_in_use(holder.state, digests)
        await self._purge(holding, digests, caller_of(context).id, reason)
        # Again: what an earlier purge could not delete.
        erase_purged(self._store, [v.state for v in self._driver.views()])
        gone = {banks(view.state)[number] for number in numbers}
        left = sorted(d for d in gone if d in self._store and not self._made_anew(d))
        if left:
            raise StorageError(
                f"{len(left)} purged banks can't be deleted from the coordinator's disk: {left[0]}, ...",
                hint="mend the disk's permissions, then purge again: the sites are asked already",
            )
        others = [holder.state.run for holder in holding if holder is not view]
        gone_banks = await asyncio.to_thread(self._purged_banks, view.state, numbers)
        return impressions_pb2.PurgeImpressionsReply(banks=gone_banks, purged=len(digests), other_runs=others)

    def _purged_banks(self, state: RunState, numbers: list[int]) -> list[impressions_pb2.ImpressionBank]:
        found = []
        for number in numbers:
            bank = self._message(state, number)
            bank.lives_on_in.extend(later_banks(state, number, self._store))
            found.append(bank)
        return found

    async def _purge(self, holding: list[RunView], digests: set[str], by: str, reason: str) -> None:
        """Journal the purge in every run that has one of the banks; files go with it. Then ask the sites."""
        if not digests:
            return
        purge = secrets.token_hex(8)
        sites: set[str] = set()
        for view in holding:
            mine = {r: d for r, d in kept(view.state).items() if d in digests}
            event = ev.ImpressionsPurged(
                at=self._driver.wall(), purge=purge, rounds=tuple(mine), digests=tuple(mine.values()),
                sites=view.state.sites, by=by, reason=reason,
            )  # fmt: skip
            await self._driver.post(view.state.run, event)
            sites |= set(view.state.sites)
        named = {f"digest_{n}": d for n, d in enumerate(sorted(digests)[:_MAX_NAMED], start=1)}
        note(purge=purge, banks=len(digests), sites=", ".join(sorted(sites)), **named)
        # After the journal: by now the driver has given sites at work a task without the bank.
        self._purges.ask_connected(tuple(sorted(sites)))

    def _banks(
        self, views: list[RunView], token: str
    ) -> Iterator[tuple[str, impressions_pb2.ImpressionBank]]:
        """Banks with their tokens, "RUN/ROUND"; those that follow `token`, if there is one."""
        run, _, number = token.rpartition("/")
        after = token_number(number)
        if token:
            last = self._driver.view(run)
            views = list(itertools.dropwhile(lambda view: view is not last, views))
        for view in views:
            state = view.state
            for round_number in banks(state):
                if state.run != run or round_number > after:
                    yield f"{state.run}/{round_number}", self._message(state, round_number)

    def _message(self, state: RunState, number: int) -> impressions_pb2.ImpressionBank:
        return bank_message(state, number, self._store, self._roster)

    def _bank(self, run: str, number: int) -> tuple[RunState, int]:
        """The run, and the round asked for; the newest that made a bank for 0. Raises NotFoundError, ConflictError."""
        state = self._driver.view(run).state
        found = banks(state)
        if not found:
            raise NotFoundError(f"run {state.run} has made no impressions")
        if number == 0:
            return state, max(found)
        if number not in found:
            raise _no_bank(state, number)
        return state, number

    def _made_anew(self, digest: str) -> bool:
        """Whether some run has made the same bytes again since they were purged, which is another making."""
        return any(digest in kept(view.state).values() for view in self._driver.views())


def _asked_rounds(
    request: impressions_pb2.PurgeImpressionsRequest, state: RunState, reason: str
) -> list[int]:
    """Rounds whose banks are to go. Raises ProtocolError for a request that is none, NotFoundError."""
    if request.all == bool(request.round):
        raise ProtocolError("a purge names one round, or all", hint="give --round N or --all")
    if not reason:
        raise ProtocolError(
            "a purge needs a reason: it stands in the audit logs of all sites", hint="give --reason"
        )
    found = banks(state)
    if request.all:
        return list(found)
    if request.round not in found:
        raise _no_bank(state, request.round)
    return [request.round]


def _no_bank(state: RunState, number: int) -> NotFoundError:
    made = ", ".join(map(str, banks(state))) or "none"
    return NotFoundError(
        f"run {state.run} has no impressions of round {number}; rounds with impressions: {made}"
    )


def _refuse_in_use(state: RunState, digests: set[str]) -> None:
    """Raise ConflictError if a run under way uses one of the banks."""
    if under_way(state) and digests & in_use(state):
        raise ConflictError(
            f"run {state.run} is under way and uses these impressions",
            hint=f"`fedctl run pause {state.run}`, abort it or wait; with --force it goes on at once without a bank",
        )
