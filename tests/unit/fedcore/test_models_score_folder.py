"""examples/score_folder.py sees a folder as the framework's own reader and evaluation do."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedcore.data import open_dataset
from fedcore.data.transforms import normalise
from fedcore.models import build_model
from fedcore.models.state_file import save_state
from fedcore.plan import Plan

torch.set_num_threads(1)

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "score_folder.py"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_script_gives_the_classes_that_the_framework_gives(channels: int, tmp_path: Path) -> None:
    document = {
        "name": "s",
        "rounds": 1,
        "model": {"name": "cnn", "classes": 3, "input": [channels, 12, 16]},
        "data": {"class_names": ["a", "b", "c"]},
        "transform": {"mean": [0.4] * channels, "std": [0.3] * channels},
    }
    plan = Plan.model_validate(document)
    torch.manual_seed(2)
    model = build_model(plan.model)
    model(torch.randn(64, channels, 12, 16))  # moves the running statistics away from their start
    file = tmp_path / "model.safetensors"
    digest = save_state(file, model.state_dict())
    card = {
        "model": plan.model.model_dump(mode="json"),
        "class_names": list(plan.class_names),
        "transform": {"mean": plan.mean, "std": plan.std},
        "input": plan.model.input,
        "digest": digest,
    }
    file.with_suffix(".json").write_text(json.dumps(card))
    rng = np.random.default_rng(0)
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for n in range(6):
        Image.fromarray(rng.integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    command = [sys.executable, str(SCRIPT), str(file), str(folder.parent)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=270).stdout

    reader = open_dataset("folder", folder.parent, validation_fraction=0, test_fraction=0)
    with torch.inference_mode():
        images = normalise(torch.tensor(reader.read(plan).train.images), plan)
        scores, classes = model.eval()(images).softmax(1).max(1)
    expected = [
        f"{folder / f'{n}.png'}\t{plan.class_names[k]}\t{score:.3f}"
        for n, (k, score) in enumerate(zip(classes.tolist(), scores.tolist(), strict=True))
    ]
    assert printed.splitlines() == expected
