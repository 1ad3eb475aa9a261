"""Many runs through the command line: resumed, repeated, refused."""

import contextlib
import fcntl
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from fedsim import cli

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
    """The command, in this process: a program of its own would spend most of its time on importing torch."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["fedsim", *args]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    done = subprocess.CompletedProcess(args, int(ended.value.code or 0), out.getvalue(), err.getvalue())
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


@pytest.mark.slow
def test_sites_are_dealt_by_name_or_from_a_file(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'name = "p"\nrounds = 1\nstrategy = "fedavg"\n'
        '[model]\nname = "cnn"\nclasses = 10\ninput = [1, 8, 8]\noptions = { width = 4 }\n'
    )
    named = ["--partition", "shards:1+feature_shift:0.5", "--sites", "3", "--max-train", "90"]
    first = fedsim("run", str(plan), *named, "--out", str(tmp_path / "one"), "-o", "json")
    saved = tmp_path / "one" / "partition.json"
    again = fedsim(
        "run", str(plan), "--partition-file", str(saved), "--out", str(tmp_path / "two"), "-o", "json"
    )
    for key in ("model", "config"):
        assert json.loads(first.stdout)[key] == json.loads(again.stdout)[key]
    assert (tmp_path / "two" / "partition.json").read_bytes() == saved.read_bytes()

    shown = fedsim("show", str(tmp_path / "one")).stdout
    assert "3 sites, shards:1+feature_shift:0.5, seed 0" in shown
    assert re.search(
        rf"partition   {saved} \(split [0-9a-f]{{8}}; the same sites again: --partition-file\)", shown
    )
    assert "--partition shards:1+feature_shift:0.5 --sites 3" in shown
    assert "site-1    30 + " in shown
    document = json.loads(fedsim("show", str(tmp_path / "one"), "-o", "json").stdout)
    assert document["split"]["partition"] == "shards:1+feature_shift:0.5"
    assert "indices" not in document["split"]["sites"]["site-1"]

    # Two rates on the saved split; the first is the plan itself: the same run, whichever command made it.
    out = tmp_path / "swept"
    axes = ["--set", "training.learning_rate=0.02,0.1", "--forgetting-rounds", "5", "--workers", "1"]
    fedsim("sweep", str(plan), "--partition-file", str(saved), *axes, "--out", str(out))
    lines = [json.loads(text) for text in (out / "runs.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert json.loads(first.stdout)["model"] in {line["model"] for line in lines}
    assert {line["partition"] for line in lines} == {"shards:1+feature_shift:0.5"}
    assert all(set(line["picked"]["sites"]) == {"site-1", "site-2", "site-3"} for line in lines)
    assert all(line["spec"]["data"]["partition_file"] == "partition.json" for line in lines)
    assert set(lines[0]["row"]) >= ROW_KEYS
    assert len(list(out.glob("sites-*.svg"))) == len(list(out.glob("classes-*.png"))) == 1

    saved.write_text(saved.read_text()[:-40])
    damaged = fedsim(
        "run", str(plan), "--partition-file", str(saved), "--out", str(tmp_path / "three"), code=1
    )
    assert damaged.stderr.startswith("error[data_invalid]")
    assert "damaged, it is not JSON" in damaged.stderr
    assert not (tmp_path / "three").exists()


def test_contradicting_options_are_one_clear_error(tmp_path: Path) -> None:
    common = ["--strategies", "fedavg", "--out", str(tmp_path / "out")]
    for options, message in (
        (["--partition", "iid", "--alpha", "0.1"], "partition 'iid' contradicts alpha 0.1"),
        (["--dataset", "wbc_multisite", "--alpha", "0.1"], "wbc_multisite is dealt by its real sites"),
    ):
        command = [sys.executable, "-m", "fedsim.cli", "compare", *options, *common]
        done = subprocess.run(command, capture_output=True, text=True, timeout=270, check=False)
        stderr = done.stderr
        assert done.returncode == 78, stderr
        assert stderr.startswith("error[config_invalid]")
        assert stderr.count("error") == 1
        assert message in stderr


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
