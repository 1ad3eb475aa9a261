"""Purges of impressions at the coordinator: what a run's state makes of one, its files, and the sites' part."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedcore.audit_store import AuditLog
from fedcore.errors import ConflictError, NotFoundError, StorageError
from fedcore.tensor_file import TensorSpec, write_tensor_file
from fedcore.v1 import federation_pb2
from fedserver import round_events as ev
from fedserver.bank_messages import bank_message, later_banks, with_findings
from fedserver.bank_summary import summarise_bank
from fedserver.impression_purges import banks, in_use, kept, purged_only, raise_if_purged, under_way
from fedserver.retention import erase_purged
from fedserver.round_state import RunState, Stage, Status, needed
from fedserver.round_work import Synthesise, Train, work
from fedserver.services.impressions import ImpressionsService
from fedserver.site_purges import SitePurges
from tests.unit.fedserver.test_round_driver import World as Coordinator
from tests.unit.fedserver.test_round_driver import directives, served, to_training
from tests.unit.fedserver.test_round_machine import SITES, Story, make_plan, world


def purge(state: RunState, *rounds: int, name: str = "p") -> ev.ImpressionsPurged:
    return ev.ImpressionsPurged(
        at=5.0, purge=name, rounds=rounds, digests=tuple(banks(state)[r] for r in rounds), sites=state.sites,
        by="olga", reason="a face",
    )  # fmt: skip


def confirmation(site: str, name: str = "p") -> ev.PurgeConfirmed:
    return ev.PurgeConfirmed(at=6, purge=name, site=site, deleted=(), audit_head="1:a")


def trained(rounds: int, **changes: object) -> Story:
    """A run that is in round `rounds` + 1, after that many rounds with a bank each: i1, i2, ..."""
    plan = make_plan(rounds=4, strategy="fedimpres", synthesis={"warmup_rounds": 1, "images": 4}, **changes)
    story = Story(plan, synthesises=True)
    story.follow(world())
    for number in range(1, rounds + 1):
        to_evaluation(story, number)
        make(story, number)
        story.follow(world())
    return story


def to_evaluation(story: Story, number: int) -> None:
    for site in SITES:
        story.tell(
            ev.UpdateStored(
                at=1, round=number, site=site, digest=f"u{site}{number}", payload_bytes=4, report=ev.Report(num_examples=3)
            )
        )  # fmt: skip
    story.follow(world())
    story.tell(ev.AggregationFinished(at=2, round=number, model=f"m{number}", accepted=SITES, rejected={}))
    for site in SITES:
        story.tell(ev.EvaluationReported(at=3, round=number, site=site, metrics=()))


def make(story: Story, number: int) -> None:
    (command,) = [c for c in work(story.state) if isinstance(c, Synthesise)]
    story.tell(
        ev.SynthesisFinished(at=3, round=number, impressions=f"i{number}", made=4, previous=command.previous)
    )


def test_a_run_under_way_goes_on_without_a_bank_and_makes_its_next_from_nothing() -> None:
    story = trained(2)
    assert (banks(story.state), in_use(story.state), under_way(story.state)) == (
        {1: "i1", 2: "i2"},
        {"i2"},
        True,
    )
    story.tell(purge(story.state, 2))
    assert [c.impressions for c in work(story.state) if isinstance(c, Train)] == [None] * 3
    assert (kept(story.state), in_use(story.state)) == ({1: "i1"}, set())
    assert "i2" not in needed(story.state)
    to_evaluation(story, 3)
    (command,) = [c for c in work(story.state) if isinstance(c, Synthesise)]
    assert command.previous is None
    make(story, 3)
    story.follow(world())
    assert story.state.stage is Stage.TRAINING
    assert in_use(story.state) == {"i3"}


def test_a_bank_begun_from_one_that_is_purged_meanwhile_is_refused() -> None:
    story = trained(1)
    to_evaluation(story, 2)
    story.tell(purge(story.state, 1))
    late = ev.SynthesisFinished(at=3, round=2, impressions="i2", made=4, previous="i1")
    with pytest.raises(ConflictError):
        story.tell(late)
    make(story, 2)
    assert banks(story.state) == {1: "i1", 2: "i2"}


def test_the_bank_of_a_round_that_is_not_over_can_go() -> None:
    story = trained(1)
    to_evaluation(story, 2)
    make(story, 2)
    story.tell(purge(story.state, 1, 2))
    story.follow(world())
    record = story.state.records[-1].record()
    assert (record.impressions_digest, record.impressions.made) == ("", 0)
    assert record.impressions.note == "purged by olga: a face"
    assert banks(story.state) == {1: "i1", 2: "i2"}
    assert kept(story.state) == {}


def test_runs_that_are_over_or_paused_need_no_force_and_keep_their_facts() -> None:
    story = trained(1)
    story.tell(ev.RunFinished(at=9, status="ABORTED", reason="x"))
    assert not under_way(story.state)
    story.tell(purge(story.state, 1))
    with pytest.raises(ConflictError, match="not those that it has"):
        story.tell(purge(story.state, 1, name="q"))
    for site in SITES[:2]:
        story.tell(confirmation(site))
    for bad in (confirmation(SITES[0]), confirmation("z"), confirmation(SITES[2], "q")):
        with pytest.raises(ConflictError, match="awaits"):
            story.tell(bad)
    assert story.state.status is Status.ABORTED
    assert set(story.state.purges[0].confirmed) == set(SITES[:2])
    assert purged_only([story.state]) == {"i1"}
    raise_if_purged([story.state], "i2")
    with pytest.raises(NotFoundError, match=r"round 1\) were purged at 1970-.* by olga: a face"):
        raise_if_purged([story.state], "i1")


def test_a_bank_that_another_run_makes_anew_is_another_making() -> None:
    old, new = trained(1), trained(1)
    old.tell(purge(old.state, 1))
    assert purged_only([old.state, new.state]) == set()
    assert purged_only([old.state]) == {"i1"}


# -- the driver and the files -------------------------------------------------------------------------


def go(story: Any) -> None:
    asyncio.run(asyncio.wait_for(story, 20))


def bank_file(coordinator: Coordinator, born: tuple[int, ...], labels: tuple[int, ...]) -> str:
    path = coordinator.store.new_path()
    tensors = {
        "images": (TensorSpec("images", "U8", (len(labels), 1, 8, 8)), bytes(64 * len(labels))),
        "labels": (
            TensorSpec("labels", "I64", (len(labels),)),
            b"".join(n.to_bytes(8, "little") for n in labels),
        ),
        "born": (
            TensorSpec("born", "I64", (len(born),)),
            b"".join(n.to_bytes(8, "little") for n in born),
        ),
    }
    digest = write_tensor_file(path, tensors)
    coordinator.store.adopt(path, digest, durable=False)
    return digest


def with_record(state: RunState, *digests: str) -> RunState:
    """A finished run whose rounds made these banks."""
    from dataclasses import replace

    from fedcore.round_record import RoundRecord
    from fedserver.finished_round import FinishedRound

    counts = {"expected": 2, "registered": 2, "started": 2, "reported": 2, "aggregated": 2}
    records = tuple(
        FinishedRound.of(
            RoundRecord(
                round=n, accuracy=None, balanced_accuracy=None, impressions_digest=d, **counts
            ).model_dump_json()
        )
        for n, d in enumerate(digests, start=1)
    )
    return replace(
        state, status=Status.DONE, stage=Stage.OVER, current=None, sites=("a", "b"), records=records
    )


def service(coordinator: Coordinator, purges: SitePurges) -> ImpressionsService:
    nothing = cast(Any, None)
    return ImpressionsService(
        coordinator.driver, coordinator.roster, purges, coordinator.store, nothing, nothing
    )


def test_a_purge_erases_tells_connected_sites_and_outlives_a_restart(tmp_path: Path) -> None:
    async def story() -> None:
        coordinator = Coordinator(tmp_path)
        purges = SitePurges(coordinator.driver, coordinator.roster, AuditLog(coordinator.database))
        async with served(coordinator) as driver:
            run, (first, second) = await to_training(coordinator, driver)
            await driver.post(run, ev.RunFinished(at=9, status="ABORTED", reason="x"))
            early = bank_file(coordinator, (1, 1), (0, 2))
            late = bank_file(coordinator, (1, 2), (0, 1))
            view = driver.view(run)
            view.state = with_record(view.state, early, late)
            coordinator.roster.close(second)
            directives(first)
            await service(coordinator, purges)._purge([view], {early}, "olga", "a face")
            assert (early in coordinator.store, late in coordinator.store) == (False, True)
            assert later_banks(view.state, 1, coordinator.store) == [2]
            order = first.outbox.get_nowait()
            assert order is not None
            assert list(order.purge_impressions.digests) == [early]

            said = federation_pb2.ImpressionsPurged(
                purge=order.purge_impressions.purge, deleted=[early, "f" * 64]
            )
            await purges.confirmed("a", said)
            await purges.confirmed("a", said)  # once is enough
            records = [
                entry.document for entry in purges._audit.entries() if "impressions.purged" in entry.body
            ]
            assert [(one["actor"], one["detail"]["deleted"]) for one in records] == [("site/a", 1)]
            assert purges.directives("a") == []
            assert [list(one.purge_impressions.digests) for one in purges.directives("b")] == [[early]]

            # A site that got it back from a backup is asked again; one that has yet to answer is not asked twice.
            purges.held(first, federation_pb2.ImpressionsHeld(digests=[early, late]))
            assert directives(first) == ["purge_impressions"]
            (third,) = coordinator.connect("b")
            purges.held(third, federation_pb2.ImpressionsHeld(digests=[early]))
            await coordinator.until(lambda: third.settled)
            assert directives(third) == ["stop"]
            message = with_findings(
                bank_message(view.state, 2, coordinator.store, coordinator.roster),
                view.state,
                coordinator.store,
            )
            assert [(one.name, one.num_images) for one in message.classes] == [("0", 1), ("1", 1)]
            assert [(one.round, one.num_images) for one in message.born] == [(1, 1), (2, 1)]
            assert [(one.site, one.copy) for one in message.holders] == [("a", "holds"), ("b", "none")]

            # A crash between journal and deletion, or a file that a backup brought back.
            assert bank_file(coordinator, (1, 1), (0, 2)) == early
            erase_purged(coordinator.store, [one.state for one in driver.views()])
            assert early not in coordinator.store

    go(story())


def test_a_bank_that_came_too_late_leaves_no_file(tmp_path: Path) -> None:
    async def story() -> None:
        coordinator = Coordinator(tmp_path)
        async with served(coordinator) as driver:
            run, _ = await to_training(coordinator, driver)
            digest = bank_file(coordinator, (1,), (0,))
            late = ev.SynthesisFinished(at=3, round=1, impressions=digest, made=1, previous="i0")
            with pytest.raises(ConflictError):
                await driver.post(run, late)
            assert digest not in coordinator.store

    go(story())


def test_a_run_that_uses_them_is_named_and_a_file_that_stays_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(**fields: Any) -> Any:
        from fedcore.v1 import impressions_pb2

        return impressions_pb2.PurgeImpressionsRequest(reason="r", **fields)

    async def story() -> None:
        coordinator = Coordinator(tmp_path)
        purges = SitePurges(coordinator.driver, coordinator.roster, AuditLog(coordinator.database))
        monkeypatch.setattr("fedserver.services.impressions.caller_of", lambda _: SimpleNamespace(id="olga"))
        async with served(coordinator) as driver:
            run, _ = await to_training(coordinator, driver)
            view, digest = driver.view(run), bank_file(coordinator, (1,), (0,))
            running = view.state
            view.state = with_record(running, digest)
            live = SimpleNamespace(state=trained(1).state)
            impressions = service(coordinator, purges)
            with monkeypatch.context() as patch:
                patch.setattr(driver, "view", lambda _: live)
                patch.setattr(driver, "views", lambda: [live])
                with pytest.raises(ConflictError, match="is under way and uses these impressions"):
                    await impressions.PurgeImpressions(asked(run="t-1", all=True), None)
            with pytest.raises(NotFoundError, match="rounds with impressions: 1"):
                await impressions.PurgeImpressions(asked(run=run, round=7), None)
            with monkeypatch.context() as patch:
                patch.setattr(
                    coordinator.store, "erase", lambda _: (_ for _ in ()).throw(OSError("read-only"))
                )
                with pytest.raises(StorageError, match="can't be deleted"):
                    await impressions.PurgeImpressions(asked(run=run, all=True), None)
            reply = await impressions.PurgeImpressions(asked(run=run, all=True), None)
            assert (reply.purged, [one.state for one in reply.banks]) == (0, ["purged"])
            assert digest not in coordinator.store
            assert purges.directives("a")

    go(story())


def test_a_file_that_is_no_bank_is_refused(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path)
    try:
        with pytest.raises(StorageError, match="not a bank of impressions"):
            summarise_bank(coordinator.store.path(coordinator.artifact(b"x")))
    finally:
        coordinator.database.close()
