"""`fedsim.run`: whole runs on real images."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fedsim
from fedcore.data.benchmark_sets import Federation, load_benchmark
from fedcore.data.dataset import LabelledImages
from fedcore.errors import ConflictError, DataError, PlanError
from fedcore.plan import Plan
from fedcore.round_record import RoundRecord
from fedsim.showing import describe, read_run
from fedsim.simulation import replay
from fedsim.sites import plan_images

MakePlan = Callable[..., Plan]


# Impressions from the first round on, however bad the model.
EAGER = {"worth_remembering": 0, "gate": False, "overlap": False}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("overlap", [False, True])
def test_events_replay_to_the_same_state(overlap: bool, federation: Federation, make_plan: MakePlan) -> None:
    # Beside training, impressions are made a round later.
    plan = make_plan(
        rounds=3 if overlap else 2, strategy="fedimpres", strategy_options={**EAGER, "overlap": overlap}
    )
    result = fedsim.run(plan, federation)
    state = replay(plan, result.events)
    assert state.status == result.state == "DONE"
    assert [finished.record() for finished in state.records] == result.records
    assert result.records[-1].balanced_accuracy is not None
    used = result.records[-1].impressions.used
    assert set(used) == {"site-1", "site-2", "site-3"}
    assert all(0 < count <= 10 for count in used.values())


def test_seed_determines_every_bit(federation: Federation, make_plan: MakePlan) -> None:
    first, again = (
        fedsim.run(make_plan(strategy="fedimpres", strategy_options=EAGER), federation) for _ in range(2)
    )
    other = fedsim.run(make_plan(strategy="fedimpres", strategy_options=EAGER, seed=6), federation)
    assert first.model_digest == again.model_digest
    assert {n: sha256(p) for n, p in first.impressions.items()} == {
        n: sha256(p) for n, p in again.impressions.items()
    }
    assert first.config_hash == again.config_hash != other.config_hash
    assert first.model_digest != other.model_digest


def test_sites_check_impressions_unless_told_not_to(federation: Federation, make_plan: MakePlan) -> None:
    plan = make_plan(strategy="fedimpres", strategy_options=EAGER)
    checked, unchecked = (
        fedsim.run(plan, federation, check_impressions=check, forgetting_rounds=0) for check in (True, False)
    )
    checks = [record.impressions.checks for record in checked.records]
    assert set(checks[-1]) == {"site-1", "site-2", "site-3"}
    assert all(check.num_checked > 0 for check in checks[-1].values())
    assert not any(record.impressions.checks for record in unchecked.records)
    assert checked.config_hash != unchecked.config_hash
    # None was refused, so the two are the same to the last bit.
    assert not any(check.num_refused for found in checks for check in found.values())
    assert checked.model_digest == unchecked.model_digest


def test_name_of_the_plan_changes_no_configuration(federation: Federation, make_plan: MakePlan) -> None:
    one, other = (fedsim.run(make_plan(rounds=1, name=name), federation) for name in ("one", "other"))
    assert (one.config_hash, one.model_digest) == (other.config_hash, other.model_digest)


def test_result_files(federation: Federation, make_plan: MakePlan, tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []

    def on_round(record: RoundRecord, model: Path) -> None:
        assert sha256(model) == record.model
        seen.append((record.round, record.model))

    out = tmp_path / "run"
    result = fedsim.run(
        make_plan(strategy="fedimpres", strategy_options=EAGER), federation, on_round=on_round, out=out
    )
    assert [number for number, _ in seen] == [1, 2]
    assert result.model is not None
    assert result.best_model is not None
    assert sha256(result.model) == result.model_digest == seen[-1][1]
    assert sha256(result.best_model) == dict(seen)[result.best_round or 0]
    assert sorted(result.impressions) == [1, 2]
    lines = (out / "rounds.jsonl").read_text().splitlines()
    assert [RoundRecord.model_validate_json(line) for line in lines] == result.records
    assert not list(out.glob("scratch-*"))
    shown = describe(read_run(out))
    assert result.model_digest in shown
    assert "fedsim.run(" in shown
    with pytest.raises(ConflictError, match="holds a run"):
        fedsim.run(make_plan(), federation, out=out)


def test_results_without_out_last_as_long_as_the_result(federation: Federation, make_plan: MakePlan) -> None:
    result = fedsim.run(make_plan(rounds=1), federation)
    folder = result.folder
    assert (folder / "model.safetensors").is_file()
    del result
    assert not folder.exists()


def test_process_is_left_as_it_was(federation: Federation, make_plan: MakePlan) -> None:
    torch.manual_seed(1)
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_rng_state())
    fedsim.run(make_plan(rounds=1), federation, threads=1)
    after = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_rng_state())
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_failing_sites_fail_the_run_and_say_why(federation: Federation, make_plan: MakePlan) -> None:
    result = fedsim.run(make_plan(training={"learning_rate": 1e30}), federation)
    assert result.state == "FAILED"
    assert "lower training.learning_rate" in result.reason
    assert result.records == []
    assert result.model is None


def test_sampled_sites_and_bytes(federation: Federation, make_plan: MakePlan) -> None:
    result = fedsim.run(make_plan(training={"sites_per_round": 2}), federation)
    assert [(r.expected, r.aggregated) for r in result.records] == [(2, 2), (2, 2)]
    first = result.records[0]
    # Two sites fetch the first model to train and the new one to evaluate, and send one update each.
    assert first.bytes_down == 2 * first.bytes_up


def test_forgetting_is_measured_at_the_end_and_changes_nothing(
    federation: Federation, make_plan: MakePlan
) -> None:
    plan = make_plan(strategy="fedbn", rounds=3)
    measured = fedsim.run(plan, federation, forgetting_rounds=2)
    unmeasured = fedsim.run(plan, federation, forgetting_rounds=0)
    assert sorted(measured.forgetting) == [2, 3]
    assert all(value is not None and -1 <= value <= 1 for value in measured.forgetting.values())
    assert unmeasured.forgetting == {}
    assert measured.model_digest == unmeasured.model_digest


def test_a_hundred_sites_leave_no_heap_of_files(make_plan: MakePlan) -> None:
    federation = load_benchmark("digits", sites=100, seed=0, max_train=400)
    files: list[int] = []

    def on_round(record: RoundRecord, model: Path) -> None:
        files.append(sum(1 for _ in model.parent.parent.glob("??/*.safetensors")))

    result = fedsim.run(make_plan(), federation, on_round=on_round, forgetting_rounds=0)
    assert [record.aggregated for record in result.records] == [100] * 2
    # Updates, the model before, the model after and the best so far: the same number in every round.
    assert max(files) <= 100 + 3


def test_plan_that_does_not_fit_is_refused(federation: Federation, make_plan: MakePlan) -> None:
    with pytest.raises(PlanError, match="'elsewhere' is not in the federation"):
        fedsim.run(make_plan(sites=["site-1", "elsewhere"]), federation)
    with pytest.raises(PlanError, match="min_sites is 4, the federation has 3"):
        fedsim.run(make_plan(min_sites=4), federation)
    with pytest.raises(PlanError, match="no such file"):
        fedsim.run(make_plan(training={"initial": "earlier-run"}), federation)
    empty = replace(federation.sites["site-1"], train=federation.pooled_test.take(np.zeros(0, np.int64)))
    with pytest.raises(DataError, match="site-1: no training images"):
        fedsim.run(make_plan(), replace(federation, sites={**federation.sites, "site-1": empty}))


def test_initial_model_continues_a_run(federation: Federation, make_plan: MakePlan, tmp_path: Path) -> None:
    first = fedsim.run(make_plan(rounds=1), federation, out=tmp_path / "first")
    assert first.model is not None
    scratch = fedsim.run(make_plan(rounds=1), federation)
    second = fedsim.run(make_plan(rounds=1, training={"initial": str(first.model)}), federation)
    assert second.records[0].loss is not None
    assert scratch.records[0].loss is not None
    assert second.records[0].loss < scratch.records[0].loss


def test_labels_go_by_class_name(federation: Federation, make_plan: MakePlan) -> None:
    reversed_names = tuple(reversed(federation.class_names))
    plan = make_plan(data={"class_names": list(reversed_names)})
    images = LabelledImages(np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 1, 9]))
    assert plan_images(images, plan, federation.class_names, "x").labels.tolist() == [9, 8, 0]
    same = make_plan()
    assert plan_images(images, same, federation.class_names, "x").labels.tolist() == [0, 1, 9]


def test_imports_load_no_torch() -> None:
    code = "import sys, fedsim, fedsim.cli, fedsim.comparison, fedsim.writing; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_run_file_is_whole_json(federation: Federation, make_plan: MakePlan, tmp_path: Path) -> None:
    fedsim.run(make_plan(rounds=1), federation, out=tmp_path / "r", command="fedsim run x")
    document = json.loads((tmp_path / "r" / "run.json").read_text())
    assert document["state"] == "DONE"
    assert document["command"] == "fedsim run x"
    assert set(document["versions"]) == {"fedimpres", "torch"}
