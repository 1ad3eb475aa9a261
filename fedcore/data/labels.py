"""From a site's own labels, names or numbers, to numbers in the plan's class order.

Sites map by name: an unknown name is an error, a class that the site lacks is not. Else two sites that each
lack a class would number the rest differently, in silence.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.data.dataset import LabelArray
from fedcore.errors import DataError, PlanError
from fedcore.plan import Plan


def require_class_names(plan: Plan, who: str) -> tuple[str, ...]:
    """The plan's class names, for data whose labels are names. Raises PlanError if it has none."""
    if plan.data.class_names is None:
        raise PlanError(
            f"{who}: labels are names, but the plan names no classes",
            hint='add [data] class_names = ["...", ...] to the plan, one name for each of model.classes',
        )
    return plan.data.class_names


def labels_from_names(names: Sequence[str], plan: Plan, who: str) -> LabelArray:
    """Map class names to the plan's order.

    Raises DataError that names the unknown ones, how many images have them, and the known ones; PlanError
    if the plan names no classes.
    """
    known = require_class_names(plan, who)
    index = {name: k for k, name in enumerate(known)}
    unknown = Counter(name for name in names if name not in index)
    if unknown:
        listed = ", ".join(f"'{name}' ({count} images)" for name, count in unknown.most_common(5))
        raise DataError(
            f"{who}: unknown class {listed}; the plan's classes: {', '.join(known)}",
            hint="rename the class at the site, or add it to the plan's [data] class_names",
        )
    return np.array([index[name] for name in names], dtype=np.int64)


def labels_from_numbers(
    numbers: NDArray[np.integer], site_names: tuple[str, ...] | None, plan: Plan, who: str
) -> LabelArray:
    """Map label numbers [N] to the plan's order: by name where the site names its numbers, else as they are.

    Raises DataError that names a number out of range, how many images have one, and the range.
    """
    classes = plan.model.classes if site_names is None else len(site_names)
    outside = numbers[(numbers < 0) | (numbers >= classes)]
    if len(outside):
        source = "model.classes of the plan" if site_names is None else "the site's data.class_names"
        raise DataError(
            f"{who}: label {int(outside[0])} is out of range ({len(outside)} images in all), "
            f"expected 0..{classes - 1} ({source})"
        )
    if site_names is None:
        return numbers.astype(np.int64)
    # Only names that occur must be known: the site may name classes that it has no image of.
    return labels_from_names([site_names[int(k)] for k in numbers], plan, who)


def check_label_array(labels: NDArray[Any], count: int, who: str) -> NDArray[Any]:
    """Check labels as stored, [N] or [N, 1], whole numbers or text, one an image, and return them as [N].

    Raises DataError.
    """
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise DataError(
            f"{who}: labels have shape {list(labels.shape)}, expected [N] or [N, 1]",
            hint="this is multi-label data; fedimpres trains one class an image",
        )
    if labels.ndim not in (1, 2) or labels.size != count:
        raise DataError(f"{who}: labels have shape {list(labels.shape)}, expected [{count}] or [{count}, 1]")
    flat = labels.reshape(-1)
    if flat.dtype.kind not in "iuU":
        raise DataError(f"{who}: labels are {flat.dtype}, expected whole numbers or text")
    if flat.dtype.kind == "U" and flat.dtype.itemsize:
        letters = np.ascontiguousarray(flat).view(np.dtype(np.uint32).newbyteorder(flat.dtype.byteorder))
        if len(letters) and int(letters.max()) > sys.maxunicode:
            raise DataError(f"{who}: labels hold bytes that are no text", hint="the file is damaged")
    return flat
