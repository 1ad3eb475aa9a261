"""A run over real gRPC, with a process for everybody, and one in fedsim give the same bits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedcore.data.benchmark_sets import load_recorded
from fedcore.plan import load_plan

# Wall-clock figures, and what the coordinator measures on images that the demo takes away with it; everything else must
# be equal, digests of every model and of the impressions included.
TIMES = {"phases_s", "seconds", "update_scores"}


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key not in TIMES}
    kept["training"] = {
        site: {key: value for key, value in report.items() if key != "seconds"}
        for site, report in record["training"].items()
    }
    return kept


# Impressions are made beside the third round at the latest, and used in the fourth.
ROUNDS = 4


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "strategy", ["fedimpres", *(pytest.param(name, marks=pytest.mark.long) for name in ("fedbn", "scaffold"))]
)
def test_same_numbers_over_grpc_and_simulated(strategy: str, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    command = ["demo", "--dataset", "digits", "--sites", "3", "--rounds", str(ROUNDS), "--strategy", strategy]
    command += ["--seed", "3", "--out", str(demo), "-o", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "fedctl.app", *command],
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    real = [json.loads(line) for line in (demo / "rounds.jsonl").read_text().splitlines()]
    assert len(real) == ROUNDS

    federation = load_recorded(json.loads((demo / "partition.json").read_text()))
    result = fedsim.run(load_plan(demo / "plan.toml"), federation, threads=1, out=tmp_path / "simulated")

    assert result.state == "DONE"
    simulated = [record.model_dump(mode="json") for record in result.records]
    assert [without_times(r) for r in simulated] == [without_times(r) for r in real]
    assert result.model is not None
    assert result.model.read_bytes() == (demo / "model.safetensors").read_bytes()
    if strategy == "fedimpres":
        assert real[-1]["impressions"]["made"] > 0
        assert any(real[-1]["impressions"]["used"].values())
        last = result.impressions[ROUNDS]
        assert last.read_bytes() == (demo / "impressions.safetensors").read_bytes()
