"""Means over seeds, and differences paired by seed. No torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `count` seeds, its standard deviation, half its 95 % interval (None below two)."""

    mean: float
    deviation: float | None
    half_width: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and 95 % interval by Student's t; None without values."""
    if not values:
        return None
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Estimate(mean, deviation, t_quantile(count - 1) * deviation / math.sqrt(count), count)


def t_quantile(degrees: int) -> float:
    """The 0.975 quantile of Student's t."""
    from scipy.stats import t  # type: ignore[import-untyped]

    return float(t.ppf(0.975, degrees))


def paired_difference(rows: Sequence[Row], baseline: Sequence[Row], figure: str) -> Estimate | None:
    """Mean over common seeds of `rows`' figure minus `baseline`'s; None if no seed has both."""
    base = {row["seed"]: row[figure] for row in baseline if row[figure] is not None}
    return estimate(
        [row[figure] - base[row["seed"]] for row in rows if row[figure] is not None and row["seed"] in base]
    )


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that differ in their seed only, under a label for tables and legends."""

    label: str
    strategy: str
    lines: tuple[Mapping[str, Any], ...]

    @property
    def rows(self) -> list[Row]:
        """The rows of the lines."""
        return [line["row"] for line in self.lines]


@dataclass(frozen=True, slots=True)
class Setting:
    """What may be compared with one another: one data set, skew, profile and model."""

    title: str
    groups: tuple[Group, ...]

    @property
    def baseline(self) -> Group | None:
        """FedAvg if it is there, else the first strategy that is no reference; None if there is none."""
        rivals = [group for group in self.groups if group.strategy not in ("pooled", "single_site")]
        return next((g for g in rivals if g.label == "fedavg"), rivals[0] if rivals else None)


def settings_of(lines: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """Group lines into settings, and in these by strategy and ablation, in the order in which they come."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for line in lines:
        row = line["row"]
        title = f"{row['dataset']}{_split_words(line)}, {row['model']}, {row['profile']} profile"
        label = row["strategy"] if row["ablation"] is None else f"{row['strategy']} {row['ablation']}"
        found.setdefault(title, {}).setdefault(label, []).append(line)
    return [
        Setting(
            title, tuple(Group(label, ls[0]["row"]["strategy"], tuple(ls)) for label, ls in groups.items())
        )
        for title, groups in found.items()
    ]


def _split_words(line: Mapping[str, Any]) -> str:
    """How a run's images were dealt, as it stands in a title; lines of older versions know alpha and sites only."""
    alpha, data = line["row"]["alpha"], line["spec"]["data"]
    words = [f"alpha {alpha:g}"] if alpha is not None else []
    if data.get("partition"):
        words = [data["partition"]]
    if data.get("partition_file"):
        words.append(f"split {line['split']} of {data['partition_file']}")
    if data["sites"]:
        words.append(f"{data['sites']} sites")
    return "".join(f", {word}" for word in words)
