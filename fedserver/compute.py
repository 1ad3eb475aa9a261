"""The coordinator's compute process: `python -m fedserver.compute`. Commands are in docs/design.md.

A command may carry `compute`, the section of fedserver.toml (device, threads); without it the device is
"auto".
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcore.compute_worker import Handler, Job, serve
from fedcore.device import ComputeDevice, open_device
from fedcore.digest import is_intact
from fedcore.errors import ConfigError, FedimpresError, PlanError, StorageError, TensorMismatchError
from fedcore.evaluation import evaluate
from fedcore.models import build_model
from fedcore.models.base import FederatedModel, batch_norm_layers, norm_tensor_names
from fedcore.models.state_file import load_intact, load_tensors, save_state, specs_of
from fedcore.norm_statistics import statistic_names
from fedcore.plan import ModelSection, Plan, plan_from_json
from fedcore.seeding import derive_seed
from fedcore.tensor_file import EXTRA_PREFIX, TensorManifest, TensorSpec, check_expected
from fedcore.update_coding import coded_specs
from fedserver.aggregation import average_over_rounds
from fedserver.config import ComputeConfig
from fedserver.late_updates import LateFile
from fedserver.merging import merge_round
from fedserver.own_images import OwnImages, read_scoring_images, read_test_images
from fedserver.statistics_pool import recalibrate
from fedserver.strategies import load_strategy
from fedserver.strategies.base import MergeRequest, SiteReport, SiteUpdate, Strategy
from fedserver.synthesis.bank import Bank, bank_bytes
from fedserver.synthesis.make import check_synthesis, make_bank
from fedserver.synthesis.readiness import ready
from fedserver.update_scores import score_updates


class ServerCompute:
    """The commands of the coordinator's compute process; its own images stay loaded between them."""

    def __init__(self) -> None:
        self._test_images = OwnImages("evaluation.data", "test images", read_test_images)
        self._scoring_images = OwnImages(
            "evaluation.updates_data", "validation or test images", read_scoring_images
        )

    def handlers(self) -> dict[str, Handler]:
        """Commands by name."""
        return {
            "initialise": self.initialise,
            "measure": self.measure,
            "aggregate": self.aggregate,
            "pool_statistics": self.pool_statistics,
            "synthesise": self.synthesise,
            "evaluate": self.evaluate,
            "score_updates": self.score_updates,
        }

    def initialise(self, args: dict[str, Any], job: Job) -> dict[str, Any]:
        """Write the run's first model: drawn from the plan's seed, or read from `initial`.

        Raises PlanError if the strategy or the model is unknown, TensorMismatchError if the initial model is
        not of the plan's architecture, StorageError if it is damaged. PlanError also if statistics can't be measured anew
        where the strategy's options ask for it.
        """
        plan = plan_from_json(args["plan"])
        _device(args)
        strategy = load_strategy(plan)
        model = initial_model(plan)
        if strategy.synthesis is not None:
            check_synthesis(plan, model, strategy.synthesis)
        state: Mapping[str, Tensor] = model.state_dict()
        if args["initial"] is not None:
            state = _read_initial(Path(args["initial"]), state)
        layout = _layout_of(model)
        local = strategy.local_tensors(layout.names, layout.norm_names)
        sent = [spec for spec in layout.specs if spec.name not in local]
        measured = strategy.statistics_to_measure(plan, layout.statistics, local)
        return {
            "digest": save_state(Path(args["out"]), state),
            "update_tensors": [
                [spec.name, spec.dtype, list(spec.shape)]
                for spec in coded_specs([*sent, *_extras(strategy, layout)], plan.transfer)
            ],
            "local_tensors": list(local),
            "personal_tensors": list(strategy.personal_tensors(layout.names, layout.norm_names)),
            "objective": strategy.objective,
            "objective_options": dict(strategy.objective_options),
            "shares_state": strategy.shares_state,
            "synthesises_once": strategy.synthesises_once,
            "overlaps": strategy.synthesis is not None and strategy.synthesis.overlap,
            "statistic_tensors": [[spec.name, spec.dtype, list(spec.shape)] for spec in measured],
        }

    def measure(self, args: dict[str, Any], job: Job) -> dict[str, Any]:
        """How many bytes the plan's artifacts have, and what its strategy does with them. Nothing is written.

        Raises as `initialise` does.
        """
        plan = plan_from_json(args["plan"])
        _device(args)
        strategy = load_strategy(plan)
        with torch.random.fork_rng(devices=[]):
            model = build_model(plan.model)
        if strategy.synthesis is not None:
            check_synthesis(plan, model, strategy.synthesis)
        layout = _layout_of(model)
        local = strategy.local_tensors(layout.names, layout.norm_names)
        sent = [spec for spec in layout.specs if spec.name not in local]
        update = coded_specs([*sent, *_extras(strategy, layout)], plan.transfer)
        recalibrates = bool(strategy.statistics_to_measure(plan, layout.statistics, local))
        state = strategy.state_specs(layout.specs, layout.parameters)
        bank = 0 if strategy.synthesis is None else bank_bytes(plan, model.head.in_features)
        return {
            "sizes": {
                "model": _size(layout.specs), "update": _size(update), "state": _size(state), "impressions": bank,
            },
            "objective": strategy.objective,
            "shares_state": strategy.shares_state,
            "synthesises": strategy.synthesis is not None,
            "synthesises_once": strategy.synthesises_once,
            "overlaps": strategy.synthesis is not None and strategy.synthesis.overlap,
            "averages": strategy.options.ema > 0,
            "recalibrates": recalibrates,
        }  # fmt: skip

    def aggregate(self, args: dict[str, Any], job: Job) -> dict[str, Any]:
        """Examine a round's updates, merge those that pass, move the strategy's state on, average the model over rounds.

        The digest is null, and `reason` says why, if too few pass; or, and nothing else is told, if stored updates are
        no longer what arrived: `damaged` names their sites. Raises LearningError, StorageError.
        """
        with ThreadPoolExecutor(1) as beside:  # hashing leaves the processor's other cores to the merge
            reading = beside.submit(_damaged, args["updates"])
            try:
                merged = self._merge(args)
            except FedimpresError:
                if not reading.result():
                    raise
                merged = {}
            damaged = reading.result()
        return {"digest": None, "damaged": damaged} if damaged else {**merged, "damaged": []}

    def _merge(self, args: dict[str, Any]) -> dict[str, Any]:
        plan = plan_from_json(args["plan"])
        _device(args)
        strategy = load_strategy(plan)
        layout = _layout(plan.model.model_dump_json())
        local = strategy.local_tensors(layout.names, layout.norm_names)
        request = MergeRequest(
            round=int(args["round"]),
            model=Path(args["model"]),
            updates=[
                SiteUpdate(Path(update["path"]), SiteReport.of(update["site"], update["report"]))
                for update in args["updates"]
            ],
            local_tensors=local,
            out=Path(args["out"]),
            extras=_extras(strategy, layout),
            parameters=layout.parameters,
            state=_path(args["state"]),
            state_out=Path(args["state_out"]),
            num_sites=int(args["num_sites"]),
            transfer=plan.transfer,
            rule=plan.aggregation,
        )
        late = [_late_file(found) for found in args.get("late", [])]
        found = merge_round(strategy, request, plan, args["registered_examples"], late)
        answer = {
            "rejected": found.rejected,
            "verdicts": {site: verdict.model_dump() for site, verdict in found.verdicts.items()},
            "reason": found.reason,
        }
        if found.merged is None:
            return {**answer, "digest": None}
        released_out = Path(args["released_out"])
        return {
            **answer,
            "digest": found.merged.digest,
            "accepted": list(found.merged.accepted),
            "merge": found.merged.figures.model_dump(),
            "folded": {site: folded.model_dump() for site, folded in found.folded.items()},
            "state_digest": found.merged.state_digest,
            "released_digest": _release(
                strategy, request, previous=_path(args["released"]), out=released_out
            ),
        }

    def pool_statistics(self, args: dict[str, Any], job: Job) -> dict[str, Any]:
        """Put the statistics that sites measured on a model into it.

        The digest is null if stored statistics are no longer what arrived: `damaged` names their sites. Raises as
        `recalibrate`, StorageError if the model is not whole.
        """
        plan = plan_from_json(args["plan"])
        _device(args)
        number = int(args["round"])
        measured, damaged = [], []
        for one in args["statistics"]:
            try:
                tensors = load_intact(Path(one["path"]), one["digest"])
            except StorageError:
                damaged.append(one["site"])
            else:
                measured.append((SiteReport.of(one["site"], one["report"]), tensors))
        if damaged:
            return {"digest": None, "damaged": damaged}
        try:
            model = load_intact(Path(args["model"]["path"]), args["model"]["digest"])
        except StorageError as error:
            raise StorageError(
                f"the merged model of round {number}: missing or damaged on the coordinator's disk"
            ) from error
        found = recalibrate(model, measured, load_strategy(plan), plan, number, Path(args["out"]))
        return {"digest": found.digest, "rejected": dict(found.rejected), "damaged": []}

    def synthesise(self, args: dict[str, Any], job: Job) -> dict[str, Any]:
        """Make a bank of impressions; none, with digest null and the reason as note, while it's too early.

        `previous` is the bank before. `last_model`, the global model of the round before, and
        `validation_accuracy` of the newest round that has one may be missing. Raises LearningError; PlanError if
        the strategy makes none.
        """
        plan = plan_from_json(args["plan"])
        device = _device(args)
        options = load_strategy(plan).synthesis
        if options is None:
            raise PlanError(f"strategy '{plan.strategy}' makes no impressions")
        previous, last_model = _path(args["previous"]), _path(args.get("last_model"))
        decision = ready(
            args.get("validation_accuracy"),
            plan.model.classes,
            options,
            warmup=plan.synthesis.warmup_rounds,
            has_bank=previous is not None,
        )
        if not decision.ready:
            return {"digest": None, "made": 0, "note": decision.reason, "figures": {}}
        made = make_bank(
            plan,
            int(args["round"]),
            load_tensors(Path(args["model"])),
            options,
            device=device,
            job=job,
            previous=None if previous is None else Bank.load(previous),
            last_state=None if last_model is None else load_tensors(last_model),
        )
        digest = made.bank.save(Path(args["out"]))
        return {"digest": digest, "made": len(made.bank), "note": made.note, "figures": made.figures}

    def evaluate(self, args: dict[str, Any], job: Job) -> dict[str, Any]:
        """Score a model on the coordinator's own test set, an npz. Raises DataError, StorageError."""
        plan = plan_from_json(args["plan"])
        device = _device(args)
        images = self._test_images.of(plan, Path(args["data"]))
        model = build_model(plan.model)
        model.load_state_dict(load_tensors(Path(args["model"])))
        found = evaluate(device.place(model), images, plan, device.device, per_class=True, check=job.check)
        return {"splits": [{"split": "test", **asdict(found)}]}

    def score_updates(self, args: dict[str, Any], job: Job) -> dict[str, Any]:
        """Score the model that sites started from and the updates that passed the gate, class by class.

        Raises DataError, StorageError; an update that can't be scored costs that one only.
        """
        plan = plan_from_json(args["plan"])
        device = _device(args)
        layout = _layout(plan.model.model_dump_json())
        strategy = load_strategy(plan)
        own = [*strategy.local_tensors(layout.names, layout.norm_names)]
        own += strategy.personal_tensors(layout.names, layout.norm_names)
        if own:
            # No site starts from the global model as it is here: a score of it would be nobody's.
            note = f"updates not scored: strategy '{plan.strategy}' gives each site {len(own)} tensors of its own"
            return {"class_totals": [], "before": [], "after": {}, "note": note}
        updates = [(update["site"], Path(update["path"])) for update in args["updates"]]
        images = self._scoring_images.of(plan, Path(args["data"]))
        return score_updates(plan, Path(args["model"]), updates, images, device=device, job=job)


def initial_model(plan: Plan) -> FederatedModel:
    """The plan's model, its weights drawn from the plan's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(plan.seed, "initial model"))
        return build_model(plan.model)


def _read_initial(path: Path, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An operator's initial model, from any writer.

    Raises PlanError if it is not of the plan's architecture.
    """
    state = load_tensors(path, canonical=False)
    try:
        check_expected(
            TensorManifest.of(specs_of(state)),
            TensorManifest.of(specs_of(model)),
            f"training.initial: {path.name}",
        )
    except TensorMismatchError as error:
        raise PlanError(error.message, hint="the initial model must be of the plan's architecture") from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise PlanError(f"training.initial: {path.name}: tensor '{name}' holds NaN or Inf")
    return {name: state[name] for name in model}


def _late_file(found: Mapping[str, Any]) -> LateFile:
    return LateFile(
        site=found["site"],
        round=int(found["round"]),
        path=Path(found["path"]),
        started_from=Path(found["model"]),
        report=SiteReport.of(found["site"], found["report"]),
        registered_examples=int(found["registered_examples"]),
    )


def _release(strategy: Strategy, request: MergeRequest, *, previous: Path | None, out: Path) -> str | None:
    """Write the model's average over rounds, as the strategy's option `ema` asks; None if it is the model.

    After r rounds the model of round i weighs ema^(r - i), the sum of weights being one: the first rounds are not
    pulled towards the untrained model. Source of the correction: Kingma & Ba 2015, Adam, arXiv:1412.6980, section 3.
    """
    ema, number = strategy.options.ema, request.round
    if ema == 0 or previous is None:
        return None
    keep = ema * (1 - ema ** (number - 1)) / (1 - ema**number)
    return average_over_rounds(previous, request.out, keep, request.local_tensors, out)


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a model is made of, known without keeping it."""

    specs: tuple[TensorSpec, ...]
    names: tuple[str, ...]
    norm_names: frozenset[str]
    parameters: frozenset[str]
    # Stored means and variances of BatchNorm layers.
    statistics: tuple[TensorSpec, ...]


@lru_cache(maxsize=8)
def _layout(model_section: str) -> _Layout:
    """The layout of a plan's model; a large one is not built in each round."""
    with torch.random.fork_rng(devices=[]):
        return _layout_of(build_model(ModelSection.model_validate_json(model_section)))


def _layout_of(model: FederatedModel) -> _Layout:
    state = model.state_dict()
    specs = tuple(specs_of(state))
    stored = {name for layer in batch_norm_layers(model) for name in statistic_names(layer)}
    return _Layout(
        specs=specs,
        names=tuple(state),
        norm_names=frozenset(norm_tensor_names(model)),
        parameters=frozenset(name for name, p in model.named_parameters() if p.requires_grad),
        statistics=tuple(spec for spec in specs if spec.name in stored),
    )


def _extras(strategy: Strategy, layout: _Layout) -> list[TensorSpec]:
    """What the strategy wants beside the model's tensors. Raises ConfigError for a name that it may not use."""
    extras = strategy.update_extras(layout.specs, layout.parameters)
    for spec in extras:
        if not spec.name.startswith(EXTRA_PREFIX):
            raise ConfigError(
                f"strategy '{strategy.name}': update_extras names '{spec.name}', expected '{EXTRA_PREFIX}...'"
            )
    return extras


def _size(specs: Iterable[TensorSpec]) -> int:
    return sum(spec.size_bytes for spec in specs)


def _damaged(updates: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sites whose update's file has not the digest that it is stored under."""
    return [update["site"] for update in updates if not is_intact(Path(update["path"]), update["digest"])]


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _device(args: dict[str, Any]) -> ComputeDevice:
    config = ComputeConfig.model_validate(args.get("compute", {}))
    return open_device(config.device, config.threads)


def main() -> None:
    """Serve commands on stdin and stdout until stdin ends."""
    serve(ServerCompute().handlers())


if __name__ == "__main__":
    main()
