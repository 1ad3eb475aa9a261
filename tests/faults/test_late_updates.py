"""A site that is held still until its round has closed: what it delivers then is folded in, over real gRPC."""

import os
import signal

from tests.faults.test_kills import stage
from tests.federation_fixture import SITES, Federation, children, digits_plan, wait_until


def test_a_late_update_is_folded_into_a_later_round(federation: Federation) -> None:
    late = SITES[3]
    limits = {"stall_timeout_s": 6, "join_wait_s": 1, "late_updates": "fold", "late_rounds": 9}
    run = federation.submit(digits_plan(rounds=4, training={"epochs": 30}, limits=limits))
    wait_until(lambda: stage(federation, run, late) == "training", "training")
    pids = [federation.programs[late].pid, *children(federation.programs[late].pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: "collection_closed" in federation.journal(run), "the round goes on without it", 30)
        wait_until(lambda: stage(federation, run, late) == "late", "it is shown as late")
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert federation.wait(run).state == "DEGRADED"
    first, *later = federation.rounds(run)
    assert list(first["missing"]) == [late]
    assert first["folded"] == {}
    (folded,) = [record["folded"][late] for record in later if record["folded"]]
    assert folded["round"] == 1
    assert folded["verdict"]["passed"], folded
    assert folded["share"] in (0.5, 0.25, 0.125)
    assert (
        federation.journal(run).count("update_stored")
        == sum(record["aggregated"] for record in [first, *later]) + 1
    )
    assert not list((federation.server_home / "spool").iterdir())
