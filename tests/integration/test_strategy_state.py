"""What strategies keep at the coordinator, over real gRPC: it survives SIGKILL to the bit, and leaves nothing behind."""

import sqlite3
from contextlib import closing
from typing import Any

from fedserver import round_events as ev
from tests.federation_fixture import SITES, Federation, digits_plan

PAIR = SITES[:2]
ROUNDS = 3


def plan(**changes: Any) -> dict[str, Any]:
    return digits_plan(
        PAIR,
        name="variates",
        rounds=ROUNDS,
        min_sites=2,
        strategy="scaffold",
        strategy_options={"ema": 0.5},
        **changes,
    )


def aggregations(federation: Federation, run: str) -> list[ev.AggregationFinished]:
    """What the journal says of each round's merge."""
    uri = f"file:{federation.server_home / 'fedserver.db'}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as database:
        rows = database.execute("SELECT body FROM journal WHERE run = ? ORDER BY seq", (run,)).fetchall()
    texts = [body for (body,) in rows]
    events = [ev.EVENT.validate_json(text) for text in texts]
    return [event for event in events if isinstance(event, ev.AggregationFinished)]


def stored(federation: Federation) -> set[str]:
    return {path.stem for path in (federation.server_home / "artifacts").glob("??/*.safetensors")}


def test_state_and_average_survive_a_killed_coordinator_and_leave_nothing_behind(
    federation: Federation,
) -> None:
    undisturbed = federation.submit(plan())
    assert federation.wait(undisturbed).state == "DONE"
    merges = aggregations(federation, undisturbed)
    assert len(merges) == ROUNDS
    assert len({merge.strategy_state for merge in merges} - {None}) == ROUNDS
    released = [record["model"] for record in federation.rounds(undisturbed)]
    # The first round's average is its model; from then on they part.
    assert merges[0].released is None
    assert released == [merges[0].model, merges[1].released, merges[2].released]

    with federation.second_round(plan()) as run:
        federation.kill_with_compute("coordinator")
        assert len(aggregations(federation, run)) == 1, "in the second of three rounds"
    federation.start_coordinator()
    assert federation.wait(run).state == "DONE"
    assert aggregations(federation, run) == [
        merge.model_copy(update={"at": again.at})
        for merge, again in zip(merges, aggregations(federation, run), strict=True)
    ]
    assert [record["model"] for record in federation.rounds(run)] == released

    kept = stored(federation)
    assert set(released) <= kept
    obsolete = {merge.strategy_state for merge in merges} | {merge.model for merge in merges[1:]}
    assert not obsolete & kept
