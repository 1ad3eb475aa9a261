"""The two references of every table: pooled (centralised) training above, the best single site below.

Both take the federation's budget of rounds and local epochs and are scored on the federation's own test sets,
site by site. They are FedAvg runs with one site: the trainer, its schedule and its seeds are those of the
other rows.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedagent.trainer import load_model
from fedcore.data import LabelledImages
from fedcore.data.benchmark_sets import Federation, SiteSplit
from fedcore.device import open_device
from fedcore.errors import LearningError
from fedcore.evaluation import evaluate
from fedcore.models.state_file import load_tensors
from fedcore.plan import Plan
from fedcore.round_record import RoundRecord, SiteFigures
from fedserver.figures import accuracy, pooled, recalls
from fedserver.round_events import Metrics
from fedsim.runs import Result, run, write_result
from fedsim.sites import joined, plan_images
from fedsim.summary import mean

POOLED = "pooled"
SINGLE_SITE = "single_site"


def run_pooled(plan: Plan, federation: Federation, *, threads: int, device: str, out: Path) -> Result:
    """Train on all sites' images together:

    what could be had if they might leave. Raises what `run` raises.
    """
    everything = SiteSplit(
        train=joined([split.train for split in federation.sites.values()]),
        validation=joined([split.validation for split in federation.sites.values()]),
        test=_none_of(federation),
    )
    return _run_alone(plan, federation, "pooled", everything, threads=threads, device=device, out=out)


def run_single_site(plan: Plan, federation: Federation, *, threads: int, device: str, out: Path) -> Result:
    """Train each site on its own images and keep the best one, chosen on the pooled validation images.

    Raises what `run` raises.
    """
    validation = joined([split.validation for split in federation.sites.values()])
    best: tuple[float, str, Result] | None = None
    seconds = 0.0
    for name, split in federation.sites.items():
        alone = SiteSplit(train=split.train, validation=validation, test=_none_of(federation))
        folder = out / "alone" / name
        result = _run_alone(plan, federation, name, alone, threads=threads, device=device, out=folder)
        seconds += result.seconds
        figure = mean([r.validation_accuracy for r in result.records if r.round == result.best_round])
        if best is None or (figure is not None and figure > best[0]):
            best = (figure or 0.0, name, result)
    assert best is not None, "a federation has a site"
    _, name, result = best
    for path in result.folder.iterdir():
        shutil.move(path, out / path.name)
    shutil.rmtree(out / "alone")
    return replace(
        result,
        folder=out,
        seconds=seconds,
        reason=f"best site: {name}",
        model=out / result.model.name if result.model is not None else None,
        best_model=out / result.best_model.name if result.best_model is not None else None,
    )


def _run_alone(
    plan: Plan, federation: Federation, name: str, split: SiteSplit, *, threads: int, device: str, out: Path
) -> Result:
    alone = replace(federation, sites={name: split})
    measured: list[RoundRecord] = []
    score = _site_scorer(plan, federation, device=device, threads=threads)
    result = run(
        reference_plan(plan),
        alone,
        threads=threads,
        device=device,
        out=out,
        forgetting_rounds=0,
        on_round=lambda record, model: measured.append(score(record, model)),
    )
    if not result.records:
        raise LearningError(f"{name}: training failed: {result.reason}")
    scored = replace(result, records=measured, forgetting={})
    write_result(scored, "")
    return scored


def reference_plan(plan: Plan) -> Plan:
    """The plan of a run with one site and nothing federated:

    no impressions, no sampling, one site suffices.
    """
    training = plan.training.model_copy(update={"sites_per_round": None})
    update: dict[str, object] = {
        "strategy": "fedavg",
        "strategy_options": {},
        "sites": None,
        "min_sites": 1,
        "training": training,
    }
    return plan.model_copy(update=update)


def _site_scorer(
    plan: Plan, federation: Federation, *, device: str, threads: int
) -> Callable[[RoundRecord, Path], RoundRecord]:
    """Scores a round's model on every site's test images and puts the figures into the record."""
    tests = {
        name: plan_images(split.test, plan, federation.class_names, f"{name}: test")
        for name, split in federation.sites.items()
    }
    opened = open_device(device, threads)

    def score(record: RoundRecord, path: Path) -> RoundRecord:
        model = load_model(plan, load_tensors(path), opened, "reference")
        found: dict[str, Metrics] = {}
        for name, images in tests.items():
            if len(images):
                split = evaluate(model, images, plan, opened.device, per_class=True)
                found[name] = Metrics(
                    split="test",
                    num_examples=split.num_examples,
                    num_correct=split.num_correct,
                    loss_sum=split.loss_sum,
                    class_totals=split.class_totals,
                    class_correct=split.class_correct,
                )
        return with_site_figures(record, found, plan.class_names)

    return score


def with_site_figures(
    record: RoundRecord, found: dict[str, Metrics], class_names: tuple[str, ...]
) -> RoundRecord:
    """A record whose figures are those of these sites' test images; nothing went over a wire."""
    pool = pooled(found.values())
    by_class = recalls(pool, class_names)
    update = {
        "accuracy": accuracy(pool),
        "balanced_accuracy": sum(by_class.values()) / len(by_class) if by_class else None,
        "balanced_accuracy_note": "",
        "loss": pool.loss_sum / pool.num_examples if pool is not None else None,
        "classes": by_class,
        "sites": {
            name: SiteFigures(accuracy=m.num_correct / m.num_examples, num_examples=m.num_examples)
            for name, m in found.items()
        },
        "bytes_up": 0,
        "bytes_down": 0,
    }
    return record.model_copy(update=update)


def _none_of(federation: Federation) -> LabelledImages:
    return federation.pooled_test.take(np.zeros(0, dtype=np.int64))
