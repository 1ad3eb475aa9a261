"""What local training does to each class: the model that sites start from, and every update, scored on the same images.

An update is scored as it left its site, BatchNorm statistics included; what a strategy sends beside the model
(`aux/...`) is left aside. One model is in memory at a time.

Legend: K classes.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedcore.compute_worker import Job
from fedcore.data import LabelledImages
from fedcore.device import ComputeDevice
from fedcore.errors import FedimpresError, StorageError
from fedcore.evaluation import SplitMetrics, evaluate
from fedcore.models import build_model
from fedcore.models.base import FederatedModel
from fedcore.models.state_file import load_tensors
from fedcore.plan import Plan
from fedserver.decoding import read_update


def score_updates(
    plan: Plan,
    start: Path,
    updates: Iterable[tuple[str, Path]],
    images: LabelledImages,
    *,
    device: ComputeDevice,
    job: Job,
) -> dict[str, Any]:
    """Score `start` and each (site, update) on `images`: the fields of the event UpdatesScored.

    An update that can't be scored is left out, and `note` says why. Raises StorageError if `start` is damaged,
    Cancelled if the job is withdrawn.
    """
    model = device.place(build_model(plan.model))
    started_from = load_tensors(start)
    before = _score(model, start, started_from, plan, images, device, job)
    after: dict[str, list[int]] = {}
    notes = []
    for site, path in updates:
        try:
            state = read_update(path, start, plan.transfer)
            after[site] = list(_score(model, path, state, plan, images, device, job).class_correct)
        except FedimpresError as error:
            notes.append(f"{site}: update not scored: {error.message}")
    return {
        "class_totals": list(before.class_totals),
        "before": list(before.class_correct),
        "after": after,
        "note": "; ".join(notes),
    }


def _score(
    model: FederatedModel,
    path: Path,
    state: Mapping[str, Tensor],
    plan: Plan,
    images: LabelledImages,
    device: ComputeDevice,
    job: Job,
) -> SplitMetrics:
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:  # torch's word for tensors that are missing, surplus or misshapen
        raise StorageError(f"{path.name}: does not hold the plan's model: {error}") from error
    return evaluate(model, images, plan, device.device, per_class=True, check=job.check)
