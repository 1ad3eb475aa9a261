"""examples/plugin, found through its entry points and used by name, each half where it would be installed."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PLUGIN = Path(__file__).resolve().parents[2] / "examples" / "plugin"
PLAN = """
PLAN = '''
name = "plugin"
rounds = 3
strategy = "smoothed_fedavg"
[strategy_options]
smoothing = 0.2
[model]
name = "tiny_mlp"
classes = 2
input = [1, 16, 16]
options = { hidden = 32 }
[data]
class_names = ["ring", "disc"]
'''
from fedcore.plan import parse_plan
plan = parse_plan(PLAN)
"""


@pytest.fixture
def path_with_plugin(tmp_path: Path) -> str:
    """What `pip install` leaves behind: the package and a dist-info folder with its entry points."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return os.pathsep.join([str(tmp_path), str(PLUGIN)])


def run(code: str, path: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PLAN + code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_names_are_listed_beside_the_built_in_ones_without_import(path_with_plugin: str) -> None:
    code = """
import sys
from fedagent.objectives import objective_names
from fedcore.data import dataset_names
from fedcore.models import model_names
from fedserver.strategies import strategy_names
assert {"cnn", "tiny_mlp"} <= set(model_names())
assert {"npz", "ring"} <= set(dataset_names())
assert {"cross_entropy", "smoothed_cross_entropy"} <= set(objective_names())
assert {"fedavg", "smoothed_fedavg"} <= set(strategy_names())
assert "torch" not in sys.modules
assert "fedimpres_example_plugin" not in sys.modules
"""
    run(code, path_with_plugin)
    with pytest.raises(AssertionError, match="AssertionError"):
        run(code, "")


def test_the_coordinators_half_needs_no_torch(path_with_plugin: str) -> None:
    code = """
import sys
from fedcore.errors import PlanError
from fedserver.strategies import load_strategy
strategy = load_strategy(plan)
assert strategy.objective == "smoothed_cross_entropy"
assert strategy.objective_options == {"smoothing": 0.2}
assert "torch" not in sys.modules
try:
    load_strategy(plan.model_copy(update={"strategy_options": {"smothing": 0.2}}))
except PlanError as error:
    print(error)
"""
    assert "unknown key 'smothing'" in run(code, path_with_plugin)


def test_a_site_trains_the_plugins_model_on_its_data_with_its_objective(path_with_plugin: str) -> None:
    code = """
import numpy as np
import torch
from pathlib import Path
from fedagent.objectives import load_objective
from fedagent.objectives.base import Batch, LocalContext, Outputs
from fedcore.data import open_dataset
from fedcore.data.transforms import normalise
from fedcore.evaluation import accuracy, evaluate
from fedcore.models import build_model
torch.set_num_threads(1)
torch.manual_seed(0)
reader = open_dataset("ring", None, options={"images": 400})
assert reader.summarise().num_examples == 280
data = reader.read(plan)
assert data.train.images.shape == (280, 16, 16, 1)
assert data.class_names == ("ring", "disc")
assert sorted(np.bincount(data.train.labels).tolist()) == [140, 140]
model = build_model(plan.model)
objective = load_objective("smoothed_cross_entropy", {"smoothing": 0.2})
context = LocalContext(site="s", run="r", round=1, model=model, class_counts=torch.tensor([140.0, 140.0]),
                       state=Path("unused"), build_global_model=lambda: build_model(plan.model))
images = normalise(torch.tensor(data.train.images), plan)
labels = torch.tensor(data.train.labels)
optimizer = torch.optim.Adam(model.parameters(), 0.003)
for step in range(120):
    features = model.features(images)
    batch = Batch(images, labels, torch.zeros(len(labels), dtype=torch.bool))
    loss = objective.loss(batch, Outputs(features, model.head(features)), context)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(accuracy(evaluate(model, data.test, plan, "cpu")))
"""
    assert float(run(code, path_with_plugin)) > 0.8


def test_a_wrong_option_of_the_dataset_is_named(path_with_plugin: str) -> None:
    code = """
from fedcore.data import open_dataset
from fedcore.errors import ConfigError
try:
    open_dataset("ring", None, options={"imags": 4})
except ConfigError as error:
    print(error)
"""
    assert "kind 'ring' has no option 'imags', known: images, seed" in run(code, path_with_plugin)
