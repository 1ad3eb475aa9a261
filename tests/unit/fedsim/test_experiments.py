"""Many runs through the command line: resumed, repeated, refused."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROW_KEYS = {
    "profile", "dataset", "alpha", "model", "strategy", "ablation", "seed", "accuracy", "balanced_accuracy",
    "balanced_accuracy_last5", "worst_site_accuracy", "worst_class_recall", "forgetting", "bytes_per_round",
    "seconds_per_round", "hardware",
}  # fmt: skip
SETTINGS = """
[fedavg]
model = { options = { width = 4 } }
training = { epochs = 1 }
[single_site]
model = { options = { width = 4 } }
training = { epochs = 1 }
[pooled]
model = { options = { width = 4 } }
training = { epochs = 1 }
"""


def fedsim(*args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "fedsim.cli", *args], capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == code, done.stderr
    return done


def compare(folder: Path, strategies: str, *more: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    settings = folder.parent / "settings.toml"
    settings.write_text(SETTINGS)
    return fedsim(
        "compare", "--dataset", "digits", "--strategies", strategies, "--seeds", "0", "--alpha", "0.5",
        "--sites", "2", "--rounds", "1", "--settings", str(settings), "--workers", "1", "--out", str(folder),
        *more, code=code,
    )  # fmt: skip


@pytest.mark.slow
def test_compare_resumes_and_writes_everything(tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(out, "fedavg")
    kept = (out / "runs.jsonl").read_text()
    assert kept.count("\n") == 1
    # A crash in the middle of a line loses that line and no other.
    (out / "runs.jsonl").write_text(kept + '{"config": "cut sho')
    again = compare(out, "fedavg,pooled,single_site")
    assert "3 runs, 1 of them finished already" in again.stderr
    assert (out / "runs.jsonl").read_text().startswith(kept)
    rows = json.loads((out / "table.json").read_text())
    assert [row["strategy"] for row in rows] == ["fedavg", "pooled", "single_site"]
    assert all(set(row) >= ROW_KEYS for row in rows)
    fedavg, pooled, single = rows
    assert fedavg["bytes_per_round"] > 0
    assert pooled["bytes_per_round"] == 0
    assert pooled["balanced_accuracy"] > single["balanced_accuracy"]
    for name in ("table.md", "table.csv", "report.html"):
        assert "single_site" in (out / name).read_text()
    assert len(list(out.glob("curves-*.svg"))) == len(list(out.glob("curves-*.png"))) == 1

    unchanged = compare(out, "fedavg,pooled,single_site", "-o", "json")
    assert json.loads(unchanged.stdout) == rows
    assert "3 runs, 3 of them finished already" in unchanged.stderr

    config = json.loads(kept)["config"]
    shown = fedsim("show", str(out / "runs" / config)).stdout
    assert "fedsim compare --dataset digits --strategies fedavg --seeds 0" in shown
    assert json.loads(kept)["model"] in shown
    fedsim("plot", str(out))


@pytest.mark.slow
def test_run_and_sweep(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'name = "p"\nrounds = 1\nstrategy = "fedavg"\n'
        '[model]\nname = "cnn"\nclasses = 10\ninput = [1, 8, 8]\noptions = { width = 4 }\n'
    )
    common = ["--dataset", "digits", "--sites", "2", "--max-train", "100"]
    done = fedsim("run", str(plan), *common, "--out", str(tmp_path / "one"), "-o", "json")
    document = json.loads(done.stdout)
    assert document["state"] == "DONE"
    refused = fedsim("run", str(plan), *common, "--out", str(tmp_path / "one"), code=7)
    assert refused.stderr.startswith("error[conflict]")

    out = tmp_path / "swept"
    settings = ["--set", "training.learning_rate=0.02,0.1", "--seeds", "0"]
    fedsim("sweep", str(plan), *common, *settings, "--workers", "2", "--out", str(out))
    rows = json.loads((out / "table.json").read_text())
    assert [row["ablation"] for row in rows] == ["training.learning_rate=0.02", "training.learning_rate=0.1"]
    # The sweep's first point is the plan itself: the same run, whichever command made it.
    lines = [json.loads(text) for text in (out / "runs.jsonl").read_text().splitlines()]
    assert len({line["config"] for line in lines}) == 2
    assert document["model"] in {line["model"] for line in lines}


def test_wrong_input_is_one_clear_error(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "strategy 'fedfast' is unknown" in compare(out, "fedfast", code=78).stderr
    assert not (out / "runs.jsonl").exists()
    assert "error[not_found]" in fedsim("show", str(tmp_path), code=6).stderr
    assert "has no finished run" in fedsim("plot", str(tmp_path), code=78).stderr


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another fedsim uses this folder" in compare(out, "fedavg", code=7).stderr
    finally:
        os.close(lock)
