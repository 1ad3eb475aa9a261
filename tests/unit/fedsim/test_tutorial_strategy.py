"""docs/tutorial-strategy.md, done: the files are taken out of the page, installed and run."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FENCE = re.compile(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    """The page's files by their path."""
    return dict(FENCE.findall((ROOT / "docs" / "tutorial-strategy.md").read_text()))


@pytest.fixture
def installed(files: dict[str, str], tmp_path: Path) -> Path:
    """What `pip install` leaves behind: the package and a dist-info folder with its entry points."""
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    info = tmp_path / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups) + "\n")
    return tmp_path


def python(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_halves_take_less_than_sixty_lines(files: dict[str, str]) -> None:
    code = [name for name in files if name.endswith(".py")]
    assert code == ["feddecorr/strategy.py", "feddecorr/objective.py"]
    assert sum(len(files[name].splitlines()) for name in code) < 60


def test_the_page_works_as_it_stands(installed: Path) -> None:
    arguments = [
        "run",
        "plan.toml",
        "--dataset",
        "digits",
        "--sites",
        "4",
        "--alpha",
        "0.1",
        "--out",
        "first",
    ]
    printed = python(installed, "-m", "fedsim.cli", *arguments, "--max-train", "200", "-o", "json")
    result = json.loads(printed)
    assert result["state"] == "DONE"
    assert result["rounds"] == 3
    records = [json.loads(line) for line in (installed / "first" / "rounds.jsonl").read_text().splitlines()]
    assert all(record["aggregated"] == 4 and record["loss"] < 10 for record in records)


def test_every_option_does_something_and_the_control_process_needs_no_torch(installed: Path) -> None:
    code = """
import sys
from pathlib import Path
from fedcore.errors import PlanError
from fedcore.plan import load_plan
from fedserver.strategies import load_strategy
plan = load_plan(Path("plan.toml"))
assert load_strategy(plan).objective_options == {"beta": 0.1, "logit_adjustment": 1.0}
try:
    load_strategy(plan.model_copy(update={"strategy_options": {"gamma": 1}}))
except PlanError as error:
    print(error)
assert "torch" not in sys.modules
import fedsim
from fedcore.data.benchmark_sets import load_benchmark
data = load_benchmark("digits", sites=2, alpha=0.1, seed=0, max_train=80)
digests = set()
for change in ({}, {"beta": 0.0}, {"step": 0.5}, {"logit_adjustment": 0.0}, {"ema": 0.0}):
    options = {**plan.strategy_options, **change}
    digests.add(fedsim.run(plan.model_copy(update={"strategy_options": options, "rounds": 2}), data).model_digest)
assert len(digests) == 5, digests
"""
    printed = python(installed, "-c", code)
    assert "unknown key 'gamma'" in printed
    assert "beta" in printed
