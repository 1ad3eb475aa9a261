"""The coordinator's own commands on a real federation: health, drain."""

import os
import signal

import pytest

from tests.federation_fixture import SITES, Federation, digits_plan, wait_until

pytestmark = pytest.mark.slow


def facts(federation: Federation, expect: int) -> dict[str, dict[str, object]]:
    """`server health` by part, as a fedctl of its own."""
    said = federation.ctl("server", "health", "-o", "json", expect=expect).json
    assert said["healthy"] is (expect == 0)
    return {f"{fact['check']} {fact['subject']}".strip(): fact for fact in said["facts"]}


def test_a_drain_lets_the_round_under_way_finish_and_health_tells_of_it(federation: Federation) -> None:
    held = federation.programs[SITES[0]]
    since = federation.log_size(SITES[1])
    held.send_signal(signal.SIGSTOP)  # the round can't end before it is looked at
    try:
        run = federation.submit(digits_plan(rounds=3))
        federation.wait_phase(run, "training")
        said = federation.ctl("server", "drain", "--reason", "new disk", "-o", "json").json
        assert (said["draining"], said["quiet"], said["by"]) == (True, False, "admin")
        assert run in said["under_way"]
        still = federation.ctl("server", "drain", "--wait", "--timeout", "1s", expect=5)
        assert "still under way" in still.err
    finally:
        held.send_signal(signal.SIGCONT)
    done = federation.ctl("server", "drain", "--wait", "--timeout", "60s", "-o", "json").json
    assert (done["quiet"], done["reason"]) == (True, "new disk")
    assert federation.journal(run).count("round_opened") == 1
    assert federation.journal(run)[-1] == "round_finished"
    wait_until(
        lambda: "the coordinator is about to stop" in federation.log(SITES[1], since), "agent was told"
    )
    drained = facts(federation, expect=8)
    assert "new disk" in str(drained["drain"]["says"])
    assert "new disk" in federation.run(run).reason
    assert [name for name, fact in drained.items() if not fact["healthy"] and name != "site probe"] == [
        "drain"
    ]
    assert {"database", "journal", "disk", "compute", "certificate", "issuing-ca", "root-ca"} <= set(drained)
    assert {"service fedcore.v1.Federation", "service fedcore.v1.Operations"} <= set(drained)
    federation.ctl("server", "drain", "--undo")
    assert federation.wait(run).state == "DONE"


def test_a_stopped_compute_process_is_told(federation: Federation) -> None:
    federation.wait(federation.submit(digits_plan(rounds=1)))
    pid = federation.compute_pid("coordinator")
    os.kill(pid, signal.SIGSTOP)
    try:
        found = facts(federation, expect=8)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "SIGSTOP" in str(found["compute"]["says"])
