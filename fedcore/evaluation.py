# ruff: noqa: N806 - shape suffixes
"""Scoring a model on labelled images, and figures from scores. torch is imported by `evaluate` only.

Scores are counts and sums, so those of several sites add up to those of the pooled images.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcore.plan import Plan

if TYPE_CHECKING:
    import torch

    from fedcore.data.dataset import LabelledImages


@dataclass(frozen=True, slots=True)
class SplitMetrics:
    """Counts over one set of images. `loss_sum` adds cross-entropies, in nats.

    `class_totals` and `class_correct` are one number a class, or empty where they are not shared.
    """

    num_examples: int
    num_correct: int
    loss_sum: float
    class_totals: tuple[int, ...] = ()
    class_correct: tuple[int, ...] = ()


def evaluate(
    model: "torch.nn.Module",
    images: "LabelledImages",
    plan: Plan,
    device: "torch.device | str",
    *,
    batch_size: int = 64,
    per_class: bool = False,
    check: Callable[[], None] = lambda: None,
) -> SplitMetrics:
    """Score `model`, which must be on `device`, in inference mode; its training mode is restored.

    `check` is called before each batch: what it raises ends the evaluation. No images give all zeros.
    """
    import torch

    from fedcore.data.transforms import normalise

    classes = plan.model.classes
    # On the device until the end: reading a number back each batch would stall it.
    totals, correct = (torch.zeros(classes, dtype=torch.int64, device=device) for _ in range(2))
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                check()
                part = slice(start, start + batch_size)
                pixels = torch.tensor(images.images[part]).permute(0, 3, 1, 2).to(device)
                labels_N = torch.tensor(images.labels[part]).to(device)
                logits_NK = model(normalise(pixels, plan)).float()
                losses_N = torch.nn.functional.cross_entropy(logits_NK, labels_N, reduction="none")
                loss_sum += losses_N.double().sum()
                totals += torch.bincount(labels_N, minlength=classes)
                correct += torch.bincount(labels_N[logits_NK.argmax(1) == labels_N], minlength=classes)
    finally:
        model.train(was_training)
    return SplitMetrics(
        num_examples=int(totals.sum()),
        num_correct=int(correct.sum()),
        loss_sum=float(loss_sum),
        class_totals=tuple(totals.tolist()) if per_class else (),
        class_correct=tuple(correct.tolist()) if per_class else (),
    )


def accuracy(metrics: SplitMetrics) -> float | None:
    """Share of images classified right; None if there are none."""
    return metrics.num_correct / metrics.num_examples if metrics.num_examples else None


def recalls(metrics: SplitMetrics) -> list[float | None]:
    """Share of each class that was classified right; None for a class without images."""
    return [
        right / total if total else None
        for right, total in zip(metrics.class_correct, metrics.class_totals, strict=True)
    ]


def balanced_accuracy(metrics: SplitMetrics) -> float | None:
    """Mean recall over the classes that occur; None without images or without per-class counts."""
    known = [recall for recall in recalls(metrics) if recall is not None]
    return sum(known) / len(known) if known else None


def pool(parts: Iterable[SplitMetrics]) -> SplitMetrics:
    """Add up scores, in the order given. Per-class counts survive if every part with images has them."""
    counted = [part for part in parts if part.num_examples]
    if not counted:
        return SplitMetrics(0, 0, 0.0)
    shared = all(part.class_totals for part in counted)
    return SplitMetrics(
        num_examples=sum(part.num_examples for part in counted),
        num_correct=sum(part.num_correct for part in counted),
        loss_sum=sum(part.loss_sum for part in counted),
        class_totals=_add([part.class_totals for part in counted]) if shared else (),
        class_correct=_add([part.class_correct for part in counted]) if shared else (),
    )


def _add(rows: list[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip(*rows, strict=True))
