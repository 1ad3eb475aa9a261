"""BatchNorm statistics measured after the merge, over real gRPC: the bits of fedsim, also when processes are killed."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
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


# An agent of before there were statistics: it says nothing of them, and ignores a directive that it does not know.
OLD_AGENT = """
from fedagent import cli, driver

capabilities, obey = driver.AgentDriver._capabilities, driver.AgentDriver._obey

def said(agent):
    told = capabilities(agent)
    told.ClearField("knows_recalibrate")
    return told

def heard(agent, directive):
    directive.ClearField("recalibrate")
    obey(agent, directive)

driver.AgentDriver._capabilities, driver.AgentDriver._obey = said, heard
cli.main()
"""


@pytest.fixture
def three_kinds(federation: Federation) -> Iterator[tuple[str, str, str]]:
    """A site of this version, one whose agent knows no statistics, one that forbids them; afterwards all are as before."""
    measures, old, forbids = SITES[:3]
    policy = federation.site_home(forbids) / "policy.toml"
    for site in (old, forbids):
        federation.kill_with_compute(site)
    try:
        policy.write_text("recalibrate = false\n")
        federation.start_agent(forbids)
        with federation.log_path(old).open("ab") as log:
            federation.programs[old] = subprocess.Popen(
                [sys.executable, "-c", OLD_AGENT, "serve", "--home", str(federation.site_home(old))],
                env=federation.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        federation.wait_connected(old, forbids)
        yield measures, old, forbids
    finally:
        policy.unlink(missing_ok=True)
        for site in (old, forbids):
            if site in federation.programs:
                federation.kill_with_compute(site)
            federation.start_agent(site)
        federation.wait_connected(old, forbids)


def test_an_old_agent_and_a_site_that_forbids_it_miss_that_stage_only(
    federation: Federation, three_kinds: tuple[str, str, str]
) -> None:
    measures, old, forbids = three_kinds
    since = federation.log_size(old)
    changed = {"name": "three-kinds", "rounds": 1, "min_sites": 1, "sites": list(three_kinds)}
    run = federation.submit({**plan(), **changed})
    ended = federation.wait(run)
    assert (ended.state, ended.reason) == ("DONE", "1 rounds finished")
    (record,) = federation.rounds(run)
    assert record["aggregated"] == 3
    assert record["sites"].keys() == set(three_kinds), "all evaluate"
    assert record["recalibration"]["num_examples"].keys() == {measures}
    assert record["recalibration"]["left_out"] == {
        old: "its agent is of a version that measures no statistics",
        forbids: "refuses: policy forbids to measure BatchNorm statistics of merged models",
    }
    assert "model_recalibrated" in federation.journal(run)
    assert "unknown kind" not in federation.log(old, since), "it is not even asked"
