# ruff: noqa: N803, N806 - shape suffixes
"""Where impressions lie among real images: both as features of the run's last global model, in one plane.

The plane is that of the two principal components of the real test images' features (Pearson 1901); impressions are
laid onto it, they don't turn it. Written while the run's images are in memory, so that plots need neither them nor
torch. Legend: N images, M impressions, D features.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedcore.data.benchmark_sets import Federation
from fedcore.data.splits import stratified_sample
from fedcore.errors import StorageError
from fedcore.seeding import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from fedcore.models.base import FederatedModel
    from fedsim.runs import Result

PROJECTION_FILE = "projection.json"
# Real images in the picture: more of them hide one another.
MOST_REAL = 400
_BATCH = 256
Floats = NDArray[np.float64]


def principal_plane(features_ND: Floats) -> tuple[Floats, Floats, tuple[float, float]]:
    """Mean [D], two principal axes [2, D] and the shares of the variance that they explain.

    An axis points where its largest entry is positive; axes that the features don't have are zero.
    """
    mean_D = features_ND.mean(axis=0)
    _, scales, rows = np.linalg.svd(features_ND - mean_D, full_matrices=False)
    axes_2D = np.zeros((2, features_ND.shape[1]))
    shares = [0.0, 0.0]
    total = float((scales**2).sum())
    for n in range(min(2, len(scales)) if total > 0 else 0):
        sign = 1.0 if rows[n][np.abs(rows[n]).argmax()] > 0 else -1.0
        axes_2D[n] = sign * rows[n]
        shares[n] = float(scales[n] ** 2) / total
    return mean_D, axes_2D, (shares[0], shares[1])


def write_projection(result: "Result", federation: Federation, folder: Path) -> None:
    """Write projection.json of a run that made impressions: its last bank beside a sample of the test images.

    Points are rounded to 4 decimals; labels count the plan's classes. Raises StorageError.
    """
    from fedcore.models import build_model
    from fedcore.models.state_file import load_tensors
    from fedsim.sites import plan_images

    plan = result.plan
    assert result.model is not None
    model = build_model(plan.model)
    model.load_state_dict(load_tensors(result.model))
    test = plan_images(federation.pooled_test, plan, federation.class_names, "pooled test")
    if len(test) > MOST_REAL:
        rng = np.random.default_rng(derive_seed(plan.seed, "projection"))
        test = test.take(stratified_sample(test.labels, MOST_REAL, rng))
    number = max(result.impressions)
    bank = load_tensors(result.impressions[number])
    real = _features(model.eval(), _tensor(test.images), result)
    made = _features(model, bank["images"], result)
    mean_D, axes_2D, shares = principal_plane(real)
    document: dict[str, Any] = {
        "round": number,
        "class_names": list(plan.class_names),
        "explained": [round(share, 4) for share in shares],
        "real": _points(real, mean_D, axes_2D, test.labels.tolist()),
        "impressions": _points(made, mean_D, axes_2D, bank["labels"].tolist()),
    }
    path = folder / PROJECTION_FILE
    try:
        path.write_text(json.dumps(document) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: can't be written: {error}") from error


def _points(features: Floats, mean_D: Floats, axes_2D: Floats, labels: list[int]) -> dict[str, Any]:
    return {"points": ((features - mean_D) @ axes_2D.T).round(4).tolist(), "labels": labels}


def _tensor(images: NDArray[np.uint8]) -> "Tensor":
    import torch

    return torch.from_numpy(images)


def _features(model: "FederatedModel", images: "Tensor", result: "Result") -> Floats:
    """Features [N, D] of pixels [N, H, W, C] or [N, C, H, W], on the CPU."""
    import torch

    from fedcore.data.transforms import normalise

    with torch.inference_mode():
        parts = [
            model.features(normalise(images[start : start + _BATCH], result.plan)).double()
            for start in range(0, len(images), _BATCH)
        ]
    found: Floats = torch.cat(parts).numpy()
    return found
