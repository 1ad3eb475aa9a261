"""Processes killed with SIGKILL at each stage of a round: what comes out is what an undisturbed run gives, to the bit."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.federation_fixture import (
    BEHIND_PROXY,
    PROBE,
    SITES,
    Federation,
    children,
    commanded,
    digits_plan,
    gone,
    noop_plan,
    wait_until,
)

ROUNDS = 2
# Updates of 6 MiB: three chunks.
PARAMS = 3 << 19
# After which an upload is held: one chunk has arrived, the second has not.
HELD_AFTER = 3 << 20


def upload_plan() -> dict[str, Any]:
    return noop_plan(PARAMS, rounds=ROUNDS)


def impressions_plan(name: str = "impressions") -> dict[str, Any]:
    return digits_plan(
        name=name,
        rounds=ROUNDS,
        strategy="fedimpres",
        synthesis={"warmup_rounds": 1, "images": 40},
    )


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, str]:
    """Final model of each plan, from a run that nobody disturbed."""
    return {}


def final_model(federation: Federation, run: str) -> str:
    digest = federation.rounds(run)[-1]["model"]
    assert len(digest) == 64
    return str(digest)


def reference(federation: Federation, known: dict[str, str], document: dict[str, Any]) -> str:
    if document["name"] not in known:
        run = federation.submit(document)
        assert federation.wait(run).state == "DONE"
        known[document["name"]] = final_model(federation, run)
    return known[document["name"]]


def check_whole(federation: Federation, run: str, digest: str) -> None:
    """The run is DONE, each round was counted once, with every site, and the model is the undisturbed one."""
    ended = federation.wait(run)
    assert (ended.state, ended.reason) == ("DONE", f"{ROUNDS} rounds finished")
    records = federation.rounds(run)
    assert [record["round"] for record in records] == list(range(1, ROUNDS + 1))
    for record in records:
        assert (record["reported"], record["aggregated"], record["attempts"]) == (len(SITES), len(SITES), 1)
        assert record["missing"] == {}
    kinds = federation.journal(run)
    assert kinds.count("round_opened") == kinds.count("round_finished") == ROUNDS
    assert kinds.count("update_stored") == ROUNDS * len(SITES)
    assert kinds.count("aggregation_finished") == ROUNDS
    assert kinds.count("run_finished") == 1
    assert final_model(federation, run) == digest, records
    assert not list((federation.server_home / "spool").iterdir())


def test_coordinator_killed_while_agents_upload(federation: Federation, undisturbed: dict[str, str]) -> None:
    digest = reference(federation, undisturbed, upload_plan())
    with federation.uploading(upload_plan(), HELD_AFTER) as run:
        federation.kill("coordinator")
        assert 0 < federation.part(BEHIND_PROXY).stat().st_size < 4 * PARAMS
        assert federation.journal(run).count("update_stored") < len(SITES)
    federation.start_coordinator()
    check_whole(federation, run, digest)


def test_coordinator_killed_while_sites_train(federation: Federation, undisturbed: dict[str, str]) -> None:
    digest = reference(federation, undisturbed, impressions_plan())
    with federation.training(impressions_plan(), SITES[0]) as run:
        wait_until(lambda: "task_started" in federation.journal(run), "training has begun")
        federation.kill_with_compute("coordinator")
        assert "collection_closed" not in federation.journal(run)
    federation.start_coordinator()
    check_whole(federation, run, digest)


def test_coordinator_and_its_compute_killed_while_it_aggregates(
    federation: Federation, undisturbed: dict[str, str]
) -> None:
    digest = reference(federation, undisturbed, upload_plan())
    with federation.aggregating(upload_plan()) as run:
        federation.kill_with_compute("coordinator")
    kinds = federation.journal(run)
    assert "collection_closed" in kinds
    assert "aggregation_finished" not in kinds
    federation.start_coordinator()
    check_whole(federation, run, digest)


def test_coordinator_and_its_compute_killed_while_it_synthesises(
    federation: Federation, undisturbed: dict[str, str]
) -> None:
    """The second round's training has impressions made beside it."""
    digest = reference(federation, undisturbed, impressions_plan())
    with federation.second_round(impressions_plan()) as run:
        federation.kill_with_compute("coordinator")
    kinds = federation.journal(run)
    assert kinds.count("round_opened") == 2
    assert "synthesis_finished" not in kinds
    federation.start_coordinator()
    check_whole(federation, run, digest)


def test_compute_of_the_coordinator_killed_while_it_aggregates(
    federation: Federation, undisturbed: dict[str, str]
) -> None:
    digest = reference(federation, undisturbed, upload_plan())
    since = federation.log_size("coordinator")
    with federation.aggregating(upload_plan()) as run:
        victim = federation.compute_pid("coordinator")
        os.kill(victim, signal.SIGKILL)
    check_whole(federation, run, digest)
    assert "killed by signal 9" in federation.log("coordinator", since)
    assert federation.compute_pid("coordinator") != victim


def test_one_agent_of_four_killed_and_restarted(federation: Federation, undisturbed: dict[str, str]) -> None:
    digest = reference(federation, undisturbed, impressions_plan())
    with federation.training(impressions_plan(), SITES[0]) as run:
        compute = federation.compute_pid(SITES[0])
        federation.kill(SITES[0])
    wait_until(lambda: gone(compute), "the compute process ends with its parent")
    federation.start_agent(SITES[0])
    check_whole(federation, run, digest)


def test_one_agent_killed_while_it_uploads_and_restarted(
    federation: Federation, undisturbed: dict[str, str]
) -> None:
    digest = reference(federation, undisturbed, upload_plan())
    with federation.uploading(upload_plan(), HELD_AFTER) as run:
        federation.kill(BEHIND_PROXY)
    federation.start_agent(BEHIND_PROXY)
    check_whole(federation, run, digest)


def test_a_damaged_update_on_the_agents_disk_is_made_again(
    federation: Federation, undisturbed: dict[str, str]
) -> None:
    """A power cut may leave a finished update as zeros: it was not fsynced, and need not be."""
    digest = reference(federation, undisturbed, upload_plan())
    since = federation.log_size(BEHIND_PROXY)
    with federation.uploading(upload_plan(), HELD_AFTER) as run:
        federation.kill(BEHIND_PROXY)
    assert list((federation.site_home(BEHIND_PROXY) / "tasks").glob("*.json")), "an update to deliver"
    update = newest_artifact(federation, BEHIND_PROXY)
    assert update is not None
    update.write_bytes(b"\0" * update.stat().st_size)
    federation.start_agent(BEHIND_PROXY)
    check_whole(federation, run, digest)
    assert "update was damaged, training again" in federation.log(BEHIND_PROXY, since)


def newest_artifact(federation: Federation, site: str) -> Path | None:
    files = (federation.site_home(site) / "artifacts").glob("??/*.safetensors")
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=None)


def test_a_site_whose_compute_is_killed_misses_this_round_only(federation: Federation) -> None:
    with federation.training(digits_plan(rounds=2), SITES[2]) as run:
        compute = federation.compute_pid(SITES[2])
        wait_until(lambda: commanded(compute), "the site's command")
        os.kill(compute, signal.SIGKILL)
    ended = federation.wait(run)
    assert ended.state == "DEGRADED"
    first, second = federation.rounds(run)
    assert list(first["missing"]) == [SITES[2]]
    assert "the compute process died during 'train' (killed by signal 9)" in first["missing"][SITES[2]]
    assert (first["aggregated"], second["aggregated"], second["missing"]) == (3, 4, {})
    assert [(missed.round, list(missed.sites)) for missed in ended.missed] == [(1, [SITES[2]])]


def test_one_agent_gone_for_good_degrades_the_run_and_is_named(federation: Federation) -> None:
    limits = {"stall_timeout_s": 3, "join_wait_s": 1}
    with federation.training(digits_plan(rounds=2, limits=limits), SITES[3]) as run:
        federation.kill_with_compute(SITES[3])
    said = federation.ctl("run", "wait", run, "-o", "json", expect=8)
    assert said.json["state"] == "DEGRADED"
    records = federation.rounds(run)
    assert [record["aggregated"] for record in records] == [3, 3]
    assert "no connection for" in records[0]["missing"][SITES[3]]
    assert all(list(record["missing"]) == [SITES[3]] for record in records)
    shown = federation.ctl("run", "show", run).out
    assert f"missing: {SITES[3]} in rounds 1, 2" in " ".join(shown.split())
    assert [missed["sites"] for missed in said.json["missed"]] == [[SITES[3]]] * 2


def test_a_stopped_agent_is_let_go_and_comes_back_by_itself(federation: Federation) -> None:
    """Connected, but without progress: SIGSTOP stands for a machine that hangs."""
    limits = {"stall_timeout_s": 4, "join_wait_s": 1}
    with (
        federation.training(digits_plan(rounds=2, limits=limits), SITES[3]) as run,
        federation.hold(SITES[3]),
    ):
        wait_until(lambda: "site_let_go" in federation.journal(run), "it is let go")
    assert federation.wait(run).state == "DEGRADED"
    reason = federation.rounds(run)[0]["missing"][SITES[3]]
    assert "no progress for" in reason or "no connection for" in reason
    federation.wait_connected(SITES[3])


def test_a_run_that_waits_in_vain_for_min_sites_fails(federation: Federation) -> None:
    """Its only site never comes."""
    limits = {"stall_timeout_s": 1, "join_wait_s": 1, "round_deadline_s": 2}
    run = federation.submit(digits_plan((PROBE,), rounds=1, limits=limits))
    said = federation.ctl("run", "wait", run, "-o", "json", expect=1)
    assert said.json["state"] == "FAILED"
    assert f"missing: {PROBE} (not connected)" in said.json["reason"]


def test_a_coordinator_that_is_told_to_stop_drains_and_goes_on_later(
    federation: Federation, undisturbed: dict[str, str]
) -> None:
    digest = reference(federation, undisturbed, impressions_plan())
    with federation.training(impressions_plan(), SITES[0]) as run:
        program = federation.programs.pop("coordinator")
        program.terminate()
        assert program.wait(60) == 0, "it does not wait for the site, which will not end"
        assert "collection_closed" not in federation.journal(run)
    federation.start_coordinator()
    check_whole(federation, run, digest)


@pytest.fixture(autouse=True)
def _no_stray_compute(federation: Federation) -> Iterator[None]:
    """Each program has at most one compute process, and none is without a parent."""
    yield
    programs = {str(program.pid) for program in federation.programs.values()}
    owned = {str(pid) for program in federation.programs.values() for pid in children(program.pid)}
    wait_until(
        lambda: {line.split()[0] for line in federation.leftovers()} <= programs | owned,
        "no stray process",
    )
