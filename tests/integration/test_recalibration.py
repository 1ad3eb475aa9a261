"""BatchNorm statistics measured after the merge, over real gRPC: the bits of fedsim, also when processes are killed."""

import sqlite3
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import pytest

import fedsim
from fedcore.data.benchmark_sets import load_benchmark
from fedcore.plan import validate_plan
from fedserver import round_events as ev
from tests.federation_fixture import SITES, Federation, digits_plan, wait_until

PAIR = SITES[:2]
ROUNDS = 2


def plan() -> dict[str, Any]:
    # A seed of its own: the merged models of round 1 would be those of another test's run, and kept for it.
    return digits_plan(
        PAIR, name="recalibrated", rounds=ROUNDS, min_sites=2, seed=11, strategy_options={"recalibrate": True}
    )


def events(federation: Federation, run: str) -> list[ev.Event]:
    uri = f"file:{federation.server_home / 'fedserver.db'}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as database:
        rows = database.execute("SELECT body FROM journal WHERE run = ? ORDER BY seq", (run,)).fetchall()
    return [ev.EVENT.validate_json(body) for (body,) in rows]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of the same run in fedsim."""
    dealt = load_benchmark("digits", None, sites=len(SITES), alpha=0.5, seed=1)
    named = replace(dealt, sites=dict(zip(SITES, dealt.sites.values(), strict=True)))
    result = fedsim.run(validate_plan(plan()), named, threads=1, out=tmp_path_factory.mktemp("simulated"))
    assert result.state == "DONE", result.reason
    return [record.model_dump(mode="json") for record in result.records]


def check(federation: Federation, run: str, simulated: list[dict[str, Any]]) -> None:
    """The run is done, gave what fedsim gives, and left nothing of what it measured."""
    ended = federation.wait(run)
    assert (ended.state, ended.reason) == ("DONE", f"{ROUNDS} rounds finished")
    for real, expected in zip(federation.rounds(run), simulated, strict=True):
        assert real["recalibration"]["num_examples"].keys() == set(PAIR)
        for key in ("model", "accuracy", "classes", "recalibration", "bytes_up"):
            assert real[key] == expected[key], key
        assert real["phases_s"]["recalibrating"] > 0
    told = events(federation, run)
    merged = {event.model for event in told if isinstance(event, ev.AggregationFinished)}
    measured = {event.digest for event in told if isinstance(event, ev.StatisticsStored)}
    assert len(merged) == ROUNDS
    assert len(measured) == ROUNDS * len(PAIR)
    kept = {path.stem for path in (federation.server_home / "artifacts").glob("??/*.safetensors")}
    assert not (merged | measured) & kept
    assert {record["model"] for record in simulated} <= kept


def test_same_bits_over_grpc_and_simulated(federation: Federation, simulated: list[dict[str, Any]]) -> None:
    run = federation.submit(plan())
    check(federation, run, simulated)


def test_agent_killed_while_it_measures_and_coordinator_while_it_pools(
    federation: Federation, simulated: list[dict[str, Any]]
) -> None:
    first, second = PAIR
    with ExitStack() as pooling:
        with ExitStack() as measuring:
            with federation.training(plan(), first) as run:
                wait_until(lambda: "update_stored" in federation.journal(run), "the other's update")
                measuring.enter_context(federation.hold_compute(second))
            federation.wait_phase(run, "recalibrating")
            wait_until(lambda: "statistics_stored" in federation.journal(run), "the statistics of one site")
            pooling.enter_context(federation.hold_compute("coordinator"))
            federation.kill_with_compute(second)
        federation.start_agent(second)
        wait_until(lambda: federation.journal(run).count("statistics_stored") == 2, "all statistics")
        federation.kill_with_compute("coordinator")
        assert "model_recalibrated" not in federation.journal(run)
    federation.start_coordinator()
    check(federation, run, simulated)
