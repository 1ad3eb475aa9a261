"""Figures, statistics, protocol: pure functions with results worked out by hand."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.benchmark_sets import Federation
from fedcore.errors import ConfigError, PlanError
from fedcore.plan import Plan
from fedcore.round_record import RoundRecord, SiteFigures
from fedsim.forgetting import rare_classes, recall_drop
from fedsim.protocol import PROFILES, load_settings, merged, parse_axis, plan_of, profile_of, variants
from fedsim.statistics import estimate, paired_difference, settings_of
from fedsim.summary import curves_of, figures_of
from fedsim.tables import csv_table, markdown


def record(number: int, balanced: float, validation: float, site: float = 0.5) -> RoundRecord:
    return RoundRecord(
        round=number, expected=1, registered=1, started=1, reported=1, aggregated=1,
        accuracy=balanced + 0.1, balanced_accuracy=balanced, validation_accuracy=validation,
        sites={"a": SiteFigures(accuracy=site, num_examples=3),
               "b": SiteFigures(accuracy=0.9, num_examples=3)},
        classes={"x": balanced, "y": 1.0}, bytes_up=100, bytes_down=300, seconds=2.0,
    )  # fmt: skip


def test_rare_classes_include_the_absent() -> None:
    assert rare_classes([0, 1, 100, 899]) == [0, 1]
    assert rare_classes([0, 10, 990]) == [0]


def test_recall_drop_averages_known_classes() -> None:
    assert recall_drop([0.5, None, 1.0], [0.25, None, 0.5], [0, 1, 2]) == pytest.approx(0.375)
    assert recall_drop([None], [None], [0]) is None


def test_figures_are_of_the_picked_round_and_of_the_last_five() -> None:
    values = [0.1, 0.9, 0.5, 0.5, 0.6, 0.7, 0.7]
    validation = [0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.6]
    records = [record(n + 1, b, v) for n, (b, v) in enumerate(zip(values, validation, strict=True))]
    row = figures_of(records, 2, {5: 0.2, 6: None, 7: 0.4})
    assert row["balanced_accuracy"] == 0.9
    assert row["balanced_accuracy_last5"] == pytest.approx(0.6)
    assert row["worst_site_accuracy"] == 0.5
    assert row["worst_class_recall"] == 0.9
    assert row["forgetting"] == pytest.approx(0.3)
    assert (row["bytes_per_round"], row["seconds_per_round"]) == (400.0, 2.0)
    assert row["rounds_to_90_percent"] == 2
    assert curves_of(records)["balanced_accuracy"] == values


def test_figures_of_nothing_are_none() -> None:
    row = figures_of([], None, {})
    assert row["balanced_accuracy"] is None
    assert row["rounds_to_90_percent"] is None


def test_interval_by_student() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.mean, found.deviation, found.count) == (2.0, 1.0, 3)
    assert found.half_width == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    alone = estimate([0.5])
    assert alone is not None
    assert alone.half_width is None
    assert estimate([]) is None


def test_differences_are_paired_by_seed() -> None:
    ours = [{"seed": 2, "x": 0.9}, {"seed": 1, "x": 0.5}, {"seed": 7, "x": 0.1}]
    base = [{"seed": 1, "x": 0.4}, {"seed": 2, "x": 0.6}, {"seed": 3, "x": None}]
    found = paired_difference(ours, base, "x")
    assert found is not None
    assert (found.count, found.mean) == (2, pytest.approx(0.2))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(-1, 1))
def test_constant_difference_has_no_width(values: list[float], shift: float) -> None:
    base = [{"seed": n, "x": value} for n, value in enumerate(values)]
    found = paired_difference([{**row, "x": row["x"] + shift} for row in base], base, "x")
    assert found is not None
    assert found.mean == pytest.approx(shift, abs=1e-9)
    assert found.half_width == pytest.approx(0, abs=1e-6)


def line(strategy: str, seed: int, value: float | None) -> dict[str, object]:
    records = [record(1, value, 0.5)] if value is not None else []
    row = {"profile": "small", "dataset": "digits", "alpha": 0.1, "model": "cnn", "strategy": strategy}
    row |= {
        "ablation": None,
        "seed": seed,
        **figures_of(records, 1 if records else None, {}),
        "hardware": "cpu",
    }
    return {"row": row, "curves": curves_of(records), "spec": {"data": {"sites": 3}}}


def test_tables_of_means_and_differences() -> None:
    lines = [line("fedavg", 0, 0.4), line("fedavg", 1, 0.6), line("pooled", 0, 0.9), line("pooled", 1, 0.7)]
    text = markdown(settings_of(lines))
    assert "## digits, alpha 0.1, 3 sites, cnn, small profile" in text
    assert "| fedavg | 2 | 0.500 ± 0.141 |" in text
    assert "| against fedavg |" in text
    assert "| pooled | +0.300 [" in text
    rows = csv_table([entry["row"] for entry in lines]).splitlines()  # type: ignore[misc]
    assert rows[0].startswith("profile,dataset,alpha,model,strategy,ablation,seed,accuracy,")
    assert len(rows) == 5


def test_run_without_figures_still_makes_a_table() -> None:
    assert "| fedavg | 1 | – |" in markdown(settings_of([line("fedavg", 0, None)]))


def test_plan_follows_profile_and_settings(federation: Federation) -> None:
    settings = {"training": {"learning_rate": 0.5}}
    plan = plan_of(PROFILES["small"], federation, "fedprox", seed=4, settings=settings)
    assert (plan.rounds, plan.training.epochs, plan.training.batch_size) == (20, 3, 32)
    assert (plan.training.learning_rate, plan.training.momentum) == (0.5, 0.9)
    assert (plan.synthesis.warmup_rounds, plan.synthesis.images) == (5, 160)
    assert plan_of(PROFILES["full"], federation, "fedavg", seed=4, rounds=3).rounds == 3
    with pytest.raises(PlanError, match=r"unknown key 'training\.speed'"):
        plan_of(PROFILES["small"], federation, "fedavg", seed=0, settings={"training": {"speed": 1}})
    with pytest.raises(ConfigError, match="known: small, full"):
        profile_of("huge")


def test_merging_changes_neither_part() -> None:
    base = {"a": {"x": 1, "y": 2}, "b": 3}
    assert merged(base, {"a": {"y": 5}, "c": 6}) == {"a": {"x": 1, "y": 5}, "b": 3, "c": 6}
    assert base == {"a": {"x": 1, "y": 2}, "b": 3}


def test_settings_file(tmp_path: Path) -> None:
    path = tmp_path / "tuned.toml"
    path.write_text("[fedavg.training]\nlearning_rate = 0.03\n")
    assert load_settings(path) == {"fedavg": {"training": {"learning_rate": 0.03}}}
    path.write_text("fedavg = 3\n")
    with pytest.raises(ConfigError, match="'fedavg' is 3, expected a table"):
        load_settings(path)


def test_axes_of_a_sweep(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    axes = [parse_axis("training.learning_rate=0.01,0.02"), parse_axis("model.norm=batch,group")]
    found = list(variants(plan, axes))
    assert [chosen for chosen, _ in found] == [
        ("training.learning_rate=0.01", "model.norm=batch"),
        ("training.learning_rate=0.01", "model.norm=group"),
        ("training.learning_rate=0.02", "model.norm=batch"),
        ("training.learning_rate=0.02", "model.norm=group"),
    ]
    assert [(p.training.learning_rate, p.model.norm) for _, p in found][-1] == (0.02, "group")
    with pytest.raises(PlanError, match="expected KEY=VALUE"):
        parse_axis("training.learning_rate")
    with pytest.raises(PlanError, match=r"training\.speed=1: unknown key"):
        list(variants(plan, [parse_axis("training.speed=1")]))
