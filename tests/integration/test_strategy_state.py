"""What strategies keep at the coordinator, over real gRPC: it survives SIGKILL to the bit, and leaves nothing behind."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from fedcore.artifact_store import artifact_path
from fedcore.models.state_file import load_tensors
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


def test_a_site_takes_out_the_model_that_it_scored_with_its_own_tensors_in_it(
    federation: Federation, tmp_path: Path
) -> None:
    run = federation.submit(
        digits_plan(
            PAIR, name="own", min_sites=2, strategy="fedimpres", strategy_options={"local_norm": True}
        )
    )
    assert federation.wait(run).state == "DONE"
    last = federation.rounds(run)[-1]
    shared = load_tensors(artifact_path(federation.server_home / "artifacts", last["model"]))
    models = []
    for site in PAIR:
        out = tmp_path / f"{site}.safetensors"
        home = str(federation.site_home(site))
        said = federation.command("fedagent", "model", "export", "--home", home, "--out", str(out))
        assert said.code == 0, said
        card = json.loads(out.with_suffix(".json").read_text())
        assert (card["run"], card["round"], card["site"], card["global_model"]) == (
            run,
            2,
            site,
            last["model"],
        )
        assert card["metrics"]["test_accuracy"] == last["sites"][site]["accuracy"]
        models.append(load_tensors(out))
        own = {name for name, tensor in models[-1].items() if not tensor.equal(shared[name])}
        assert "norm1.weight" in own
        assert own <= set(card["own_tensors"]) == {name for name in shared if name.startswith("norm")}
    assert not models[0]["norm1.running_mean"].equal(models[1]["norm1.running_mean"])
    said = federation.command(
        "fedagent",
        "model",
        "export",
        "--home",
        home,
        "--run",
        "none",
        "--out",
        str(tmp_path / "x.safetensors"),
    )
    assert said.code != 0
    assert "no model of run none" in said.err
    (federation.site_home(site) / "local" / run / "model.json").write_text("{")
    said = federation.command("fedagent", "model", "export", "--home", home, "--out", str(out))
    assert said.code != 0
    assert "is no record of a scored model" in said.err
