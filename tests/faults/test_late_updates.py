"""A site that is held still until its round has closed: what it delivers then is folded in, over real gRPC."""

from contextlib import ExitStack

from tests.federation_fixture import SITES, Federation, digits_plan, wait_until


def test_a_late_update_is_folded_into_the_next_round(federation: Federation) -> None:
    late = SITES[3]
    plan = digits_plan(
        rounds=2, limits={"stall_timeout_s": 4, "join_wait_s": 1, "late_updates": "fold", "late_weight": 0.25}
    )
    with ExitStack() as coordinator_held:
        with federation.training(plan, late) as run:
            coordinator_held.enter_context(federation.hold_compute("coordinator"))
            wait_until(lambda: "collection_closed" in federation.journal(run), "the round goes on without it")
            wait_until(lambda: shown(federation, run, late) == ("late", "still at work on round 1"), "late")
        wait_until(lambda: federation.journal(run).count("update_stored") == len(SITES), "the late update")
    assert federation.wait(run).state == "DEGRADED"
    first, second = federation.rounds(run)
    assert (list(first["missing"]), first["aggregated"], first["folded"]) == ([late], 3, {})
    assert (second["missing"], second["aggregated"], list(second["folded"])) == ({}, 4, [late])
    folded = second["folded"][late]
    assert (folded["round"], folded["share"]) == (1, 0.25)
    assert folded["verdict"]["passed"], folded
    assert folded["verdict"]["registered"] == folded["verdict"]["num_examples"] > 0
    assert not list((federation.server_home / "spool").iterdir())


def shown(federation: Federation, run: str, site: str) -> tuple[str, str]:
    """What operators read of a site in a run."""
    return next((p.stage, p.reason) for p in federation.run(run).progress if p.site == site)
