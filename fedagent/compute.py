"""The agent's compute process: `python -m fedagent.compute`. Commands are in docs/design.md."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedagent.config import ComputeConfig
from fedagent.local_state import LocalState
from fedagent.noop import train_noop
from fedagent.objectives import objective_names
from fedagent.recalibration import measure_statistics
from fedagent.site_images import SiteImages, open_site_dataset
from fedagent.trainer import TrainRequest, load_model, train, with_own
from fedcore.compute_worker import Handler, Job, serve
from fedcore.data import dataset_names
from fedcore.device import ComputeDevice, open_device
from fedcore.evaluation import evaluate
from fedcore.models import learns_from_images, model_names
from fedcore.models.base import FederatedModel
from fedcore.models.state_file import load_tensors, save_state
from fedcore.plan import Plan, plan_from_json
from fedcore.seeding import derive_seed


class AgentCompute:
    """The commands of a site's compute process; images stay loaded between them."""

    def __init__(self) -> None:
        self._images = SiteImages()

    def handlers(self) -> dict[str, Handler]:
        """Commands by name."""
        return {
            "describe": self.describe,
            "train": self.train,
            "recalibrate": self.recalibrate,
            "evaluate": self.evaluate,
        }

    def describe(self, args: dict[str, Any], job: Job) -> dict[str, Any]:
        """What this site can do.

        Opens the data. Raises DataError, ConfigError, ComputeError (no such device).
        """
        device = _device(args)
        summary = open_site_dataset(args["data"]).summarise()
        return {
            "device": device.kind,
            "device_name": device.name,
            "threads": device.threads,
            "class_names": None if summary.class_names is None else list(summary.class_names),
            "num_examples": summary.num_examples,
            "models": model_names(),
            "objectives": objective_names(),
            "datasets": dataset_names(),
        }

    def train(self, args: dict[str, Any], job: Job) -> dict[str, Any]:
        """Train for a round, write the update and report. The model `noop` needs no data.

        Raises DataError, LearningError, StorageError, PlanError, TensorMismatchError.
        """
        device = _device(args)
        request = TrainRequest(
            plan=plan_from_json(args["plan"]),
            site=args["site"],
            run=args["run"],
            round=int(args["round"]),
            model=Path(args["model"]),
            impressions=None if args["impressions"] is None else Path(args["impressions"]),
            strategy_state=None if args["strategy_state"] is None else Path(args["strategy_state"]),
            objective=args["objective"],
            objective_options=args["objective_options"],
            local_tensors=tuple(args["local_tensors"]),
            personal_tensors=tuple(args["personal_tensors"]),
            state=Path(args["state"]),
            out=Path(args["out"]),
        )
        corrupt = 0
        if not learns_from_images(request.plan.model.name):
            result = train_noop(request, job)
        else:
            site, images = self._images.get(args["data"], request.plan, device)
            corrupt = site.corrupt_images
            pictures_of = partial(self._images.pictures, args["data"], request.plan, device)
            checks = bool(args["check_impressions"])
            result = train(request, images, device, job, pictures_of=pictures_of if checks else None)
        report = asdict(result)
        digest = report.pop("digest")
        if result.impression_check is not None:
            report["impression_check"] = result.impression_check.model_dump()
        report |= {"threads": device.threads, "device": device.kind, "corrupt_images": corrupt}
        return {"digest": digest, "report": report}

    def recalibrate(self, args: dict[str, Any], job: Job) -> dict[str, Any]:
        """Write what the global model's BatchNorm layers see of the training images to `out`.

        Raises DataError, LearningError, StorageError, TensorMismatchError.
        """
        began = time.monotonic()
        device = _device(args)
        plan = plan_from_json(args["plan"])
        _, images = self._images.get(args["data"], plan, device)
        model = _global_model(args, plan, device, args["local_tensors"])
        number, site = int(args["round"]), args["site"]
        seed = derive_seed(plan.seed, "recalibration", number, site)
        generator = torch.Generator().manual_seed(seed)
        found = measure_statistics(model, images, plan, job, f"{site} round {number}", generator)
        digest = save_state(Path(args["out"]), found)
        return {"digest": digest, "num_examples": len(images), "seconds": time.monotonic() - began}

    def evaluate(self, args: dict[str, Any], job: Job) -> dict[str, Any]:
        """Score the global model, with the tensors that a strategy keeps here, on what is held out.

        Splits without images are left out; the model `noop` has none. Raises DataError, StorageError,
        TensorMismatchError.
        """
        began = time.monotonic()
        device = _device(args)
        plan = plan_from_json(args["plan"])
        splits: list[dict[str, Any]] = []
        if learns_from_images(plan.model.name):
            site, _ = self._images.get(args["data"], plan, device)
            own_tensors = (*args["local_tensors"], *args["personal_tensors"])
            model = _global_model(args, plan, device, own_tensors)
            per_class = bool(args["share_class_metrics"])
            for split, images in (("validation", site.validation), ("test", site.test)):
                if len(images):
                    found = evaluate(model, images, plan, device.device, per_class=per_class, check=job.check)
                    splits.append({"split": split, **asdict(found)})
        return {"splits": splits, "seconds": time.monotonic() - began}


def _global_model(
    args: dict[str, Any], plan: Plan, device: ComputeDevice, own_tensors: Sequence[str]
) -> FederatedModel:
    """The global model, with this site's version of `own_tensors` where it has one."""
    own = LocalState(Path(args["state"])).newest() if own_tensors else None
    state = with_own(load_tensors(Path(args["model"])), own_tensors, own)
    return load_model(plan, state, device, args["site"])


def _device(args: dict[str, Any]) -> ComputeDevice:
    config = ComputeConfig.model_validate(args["compute"])
    return open_device(config.device, config.threads)


def main() -> None:
    """Serve commands on stdin and stdout until stdin ends."""
    serve(AgentCompute().handlers())


if __name__ == "__main__":
    main()
