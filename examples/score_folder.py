"""Score a folder of images with a downloaded model: python score_folder.py model.safetensors FOLDER."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from fedcore.models import build_model
from fedcore.plan import ModelSection

file, folder = Path(sys.argv[1]), Path(sys.argv[2])
card = json.loads(file.with_suffix(".json").read_text())
model = build_model(ModelSection(**card["model"])).eval().requires_grad_(False)
model.load_state_dict(load_file(file))
channels, height, width = card["input"]
mean, std = (torch.tensor(card["transform"][key]).view(-1, 1, 1) for key in ("mean", "std"))
for path in sorted(path for path in folder.rglob("*") if path.suffix in {".png", ".jpg"}):
    image = Image.open(path).convert("L" if channels == 1 else "RGB")
    pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR)).reshape(
        height, width, channels
    )
    scores = model(((torch.tensor(pixels).permute(2, 0, 1) / 255 - mean) / std)[None]).softmax(1)[0]
    print(path, card["class_names"][int(scores.argmax())], f"{float(scores.max()):.3f}", sep="\t")
