"""A corner of docs/results.md comes out again: `make results-quick`, its shortest row."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = ROOT.parent / "shared" / "data"
RUNS = ROOT / "docs" / "results" / "runs.jsonl"


@pytest.mark.timeout(300)
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real images of ../shared/data")
@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported(),
    reason="this processor has no bf16 instructions: a row takes ten times as long",
)
def test_a_row_of_the_results_comes_out_again(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/results.py",
        "quick",
        "--data",
        str(DATA),
        "--scratch",
        str(tmp_path),
    ]
    command += ["--workers", "1", "--tasks", "wbc_multisite", "--strategies", "fedavg"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("fedavg on wbc_multisite, seed 0: ")
    assert done.stdout.endswith("ok\n")


def test_what_is_stored_and_what_is_shown_are_the_same_runs() -> None:
    stored = [json.loads(line) for line in RUNS.read_text().splitlines()]
    shown = json.loads((ROOT / "docs" / "results.json").read_text())
    main = [line["row"] for line in stored if not str(line["row"]["ablation"] or "").startswith("trial ")]
    assert len(shown) == len(main)

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("profile", "dataset", "alpha", "strategy", "ablation", "seed"))

    figures = {key(row): row["balanced_accuracy_last5"] for row in shown}
    assert figures == {key(row): row["balanced_accuracy_last5"] for row in main}
