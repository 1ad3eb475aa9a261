"""The operators' journey of operations.md, each line its own command; then runs are steered from the command line."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.federation_fixture import SITES, Federation, children, digits_plan, wait_until

PAIR = SITES[:2]
# Minutes: nothing but an abort ends it in time.
ENDLESS = {"training": {"epochs": 1000, "batch_size": 2}}


def test_init_token_and_enrolment_say_what_the_next_line_needs(federation: Federation) -> None:
    said = federation.journey
    assert "Federation lab is ready" in said["init"].out
    token = said["token clinic-a"].json
    assert {"token", "ca_fingerprint", "coordinator"} <= token.keys()
    assert token["coordinator"] == f"127.0.0.1:{federation.port}"
    assert token["ca_fingerprint"] in said["init"].out
    assert "Site clinic-a belongs to federation lab" in said["enroll clinic-a"].out
    assert federation.ctl("auth", "whoami", "-o", "json").json["role"] == "operator"
    folder = federation.site_home("clinic-a") / "credential"
    assert {path.name for path in folder.iterdir()} >= {"ca.crt", "tls.crt", "tls.key", "credential.toml"}
    assert (folder / "tls.key").stat().st_mode & 0o077 == 0


def test_a_run_from_submission_to_a_model_that_scores_what_was_reported(
    federation: Federation, tmp_path: Path
) -> None:
    document = digits_plan(PAIR, rounds=3, strategy="fedimpres", min_sites=2, training={"epochs": 2})
    run = federation.ctl("run", "submit", str(federation.plan(document)), "-o", "json").json["run"]
    waited = federation.ctl("run", "wait", run, "-o", "json", "--timeout", "60s").json
    assert (waited["state"], waited["round"], waited["rounds"]) == ("DONE", 3, 3)
    assert (waited["run"], waited["name"], sorted(waited["sites"])) == (run, "digits", sorted(PAIR))
    assert "DONE" in federation.ctl("run", "show", run).out
    records = federation.ctl("run", "rounds", run, "-o", "json").json["rounds"]
    _check_records(records)
    assert run in federation.ctl("run", "watch", run).out
    out = tmp_path / "model.safetensors"
    federation.ctl("model", "download", run, "--out", str(out))
    card = json.loads((tmp_path / "model.json").read_text())
    assert card["digest"] == records[-1]["model"] == hashlib.sha256(out.read_bytes()).hexdigest()
    correct, total = _score_in_plain_pytorch(out, card, federation)
    assert total == sum(site["num_examples"] for site in records[-1]["sites"].values())
    assert correct / total == pytest.approx(records[-1]["accuracy"], abs=1e-9)
    assert records[-1]["accuracy"] > 0.3
    federation.ctl("model", "download", run, "--round", "best", "--out", str(tmp_path / "best.safetensors"))
    best = json.loads((tmp_path / "best.json").read_text())["round"]
    assert records[best - 1]["validation_accuracy"] == max(r["validation_accuracy"] for r in records)


def _check_records(records: list[dict[str, Any]]) -> None:
    assert [record["round"] for record in records] == [1, 2, 3]
    for record in records:
        counts = [record[key] for key in ("expected", "registered", "started", "reported", "aggregated")]
        assert counts == [2] * 5
        assert set(record["sites"]) == set(PAIR)
        assert record["seconds"] > 0
        assert record["bytes_up"] > 0
        assert record["bytes_down"] >= record["bytes_up"]
        assert {"training", "aggregating", "evaluating"} <= record["phases_s"].keys()
        assert 0 <= record["balanced_accuracy"] <= 1
        assert record["missing"] == {}
    # The second round's training has impressions made beside it, through the first round's model; the third uses them.
    made = [record["impressions"]["made"] for record in records]
    assert made[0] == 0
    assert all(10 <= count <= 20 for count in made[1:]), f"the gate holds some back, not most: {made}"
    rejected = [record["impressions"]["figures"]["rejected"] for record in records[1:]]
    assert rejected == [20 - n for n in made[1:]]
    for record in records[:2]:
        assert record["impressions"]["used"] == dict.fromkeys(PAIR, 0)
    # A site draws what it lacks: perhaps not all that there is.
    assert all(0 < used <= made[1] for used in records[2]["impressions"]["used"].values())


def _score_in_plain_pytorch(file: Path, card: dict[str, Any], federation: Federation) -> tuple[int, int]:
    """Load the file as anybody would, and count right answers on the sites' own test images."""
    code = """
import json, sys
import numpy as np, torch
from safetensors.torch import load_file
from fedcore.models import build_model
from fedcore.plan import ModelSection
torch.set_num_threads(1)
card = json.loads(sys.argv[2])
model = build_model(ModelSection(**card["model"])).eval()
model.load_state_dict(load_file(sys.argv[1]))
mean, std = (torch.tensor(card["transform"][key]).view(1, -1, 1, 1) for key in ("mean", "std"))
correct = total = 0
for path in sys.argv[3:]:
    arrays = np.load(path, allow_pickle=False)
    images = torch.tensor(arrays["test_images"]).reshape(-1, 1, 8, 8) / 255
    labels = torch.tensor(arrays["test_labels"].reshape(-1).astype(int))
    with torch.inference_mode():
        correct += int((model((images - mean) / std).argmax(1) == labels).sum())
    total += len(labels)
print(correct, total)
"""
    paths = [str(federation.data(site)) for site in PAIR]
    done = subprocess.run(
        [sys.executable, "-c", code, str(file), json.dumps(card), *paths],
        capture_output=True, text=True, timeout=270, check=True,
    )  # fmt: skip
    correct, total = map(int, done.stdout.split())
    return correct, total


def test_pause_keeps_the_round_under_way_and_resume_goes_on(federation: Federation) -> None:
    with federation.training(digits_plan(PAIR, rounds=2), PAIR[0]) as run:
        federation.ctl("run", "pause", run)
    paused = federation.wait_phase(run, "PAUSED")
    assert paused.round == 1
    assert "paused" in paused.reason
    assert federation.ctl("run", "pause", run, expect=7).err.startswith("error[conflict]")
    federation.ctl("run", "resume", run)
    assert federation.wait(run).state == "DONE"
    assert [record["round"] for record in federation.rounds(run)] == [1, 2]


def test_a_second_run_queues_and_abort_frees_the_device_at_once(federation: Federation) -> None:
    first = federation.submit(digits_plan(PAIR, rounds=1, **ENDLESS))
    second = federation.submit(digits_plan(PAIR, name="second", rounds=1))
    third = federation.submit(digits_plan(PAIR, name="third", rounds=1))
    wait_until(lambda: _trains(federation, first), "both sites train")
    assert (federation.run(second).state, federation.run(third).state) == ("QUEUED", "QUEUED")
    assert "queued" in federation.ctl("run", "pause", second, expect=7).err
    federation.ctl("run", "abort", third, "--yes")
    federation.ctl("run", "abort", first, "--yes", "--reason", "wrong plan")
    wait_until(lambda: federation.run(second).state != "QUEUED", "the next run starts")
    aborted = federation.run(first)
    assert aborted.state == "ABORTED"
    assert "aborted by admin: wrong plan" in aborted.reason
    assert federation.wait(second).state == "DONE"
    assert federation.run(third).state == "ABORTED"
    federation.ctl("run", "wait", first, expect=1)
    assert federation.ctl("run", "abort", first, "--yes", expect=7).err.startswith("error[conflict]")
    assert "ABORTED" in federation.ctl("run", "list").out


def test_abort_stops_training_within_three_seconds_of_the_processor(federation: Federation) -> None:
    run = federation.submit(digits_plan(PAIR, rounds=1, **ENDLESS))
    wait_until(lambda: _trains(federation, run), "both sites train")
    federation.ctl("run", "abort", run, "--yes")
    before = [_processor_s(federation, site) for site in PAIR]
    wait_until(lambda: not any(_busy(federation, site) for site in PAIR), "compute is idle")
    for site, earlier_s in zip(PAIR, before, strict=True):
        assert _processor_s(federation, site) - earlier_s < 3


def test_an_agent_that_was_away_during_the_abort_stops_when_it_returns(federation: Federation) -> None:
    """The newest word counts, also for one who could not hear it."""
    run = federation.submit(digits_plan(PAIR, rounds=1, **ENDLESS))
    wait_until(lambda: _trains(federation, run), "both sites train")
    federation.kill("coordinator")
    uri = federation.server_home / "fedserver.db"
    _abort_in_the_journal(uri, run)
    federation.start_coordinator()
    federation.wait_connected(*SITES)
    assert federation.run(run).state == "ABORTED"
    wait_until(lambda: not any(_busy(federation, site) for site in PAIR), "compute is idle")


def _abort_in_the_journal(path: Path, run: str) -> None:
    import sqlite3
    from contextlib import closing

    from fedserver.round_events import RunFinished

    event = RunFinished(at=0.0, status="ABORTED", reason="aborted while the agents were away")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "INSERT INTO journal (run, at, kind, body) VALUES (?, '', ?, ?)",
            (run, event.kind, event.model_dump_json()),
        )


def _trains(federation: Federation, run: str) -> bool:
    stages = {site.site: site.stage for site in federation.run(run).progress}
    return all(stages.get(site) == "training" for site in PAIR)


def _busy(federation: Federation, site: str) -> bool:
    """Whether the site's agent has work, or its compute process takes processor time all the same."""
    said = json.loads((federation.site_home(site) / "status.json").read_text())
    before = _processor_s(federation, site)
    time.sleep(0.2)
    return bool(said["doing"]) or _processor_s(federation, site) > before


def _processor_s(federation: Federation, site: str) -> float:
    """Seconds of processor time that the site's compute process has taken; a clock tick is its grain."""
    ticks = 0
    for pid in children(federation.programs[site].pid):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
