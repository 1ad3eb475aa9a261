"""docs/results.md, docs/results.json and their pictures, from the finished runs. Nothing is typed by hand but prose."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import study

from fedsim.plots import write_curves
from fedsim.protocol import stored_settings
from fedsim.statistics import Estimate, estimate, paired_difference, settings_of
from fedsim.tables import NOTE, body_of, head_of, table

Line = Mapping[str, Any]
Row = Mapping[str, Any]
HEAD = """# Results

Made by `make results` from the {runs} runs in [results/runs.jsonl](results/runs.jsonl) ({hours:.1f} core hours); one row
a run in [results.json](results.json). `fedsim compare` makes any row again, with the stored tuned settings.

Data: rebuilt BloodMNIST, own split (8 sites, Dirichlet label skew); WBC, four real sites, four classes, the large one
capped. Model `cnn`; training in bf16 and scoring in fp32 on the CPU. *small*: 3,000 training images, 20 rounds of 3
epochs, batch 32. *full*: all images, 40 rounds of 2 epochs, batch 64. SGD with momentum 0.9 and a constant rate. Six
tuning trials a method on seed 100, chosen by validation accuracy; the test set chooses nothing.
"""
RECALIBRATED_TEXT = """Each merged site passes its images once through the *merged* model, and the coordinator pools the
BatchNorm statistics that they measure (`recalibrate`, an option of every strategy). Merged statistics describe the
sites' models before they were merged, and that alone costs FedAvg much of what it loses to skew. So most of the lead in
the tables above is a lead over a fault that can be mended without impressions; what is left of it when everybody has
mended it stands here."""
OURS, BASELINE, WITHOUT_IMPRESSIONS = "fedimpres", "fedavg", "fedlc"
JSON_KEYS = (
    "profile", "dataset", "alpha", "model", "strategy", "ablation", "seed", "accuracy", "balanced_accuracy",
    "balanced_accuracy_last5", "worst_site_accuracy", "worst_class_recall", "forgetting", "bytes_per_round",
    "seconds_per_round", "hardware", "accuracy_last5", "worst_site_accuracy_last5", "worst_class_recall_last5",
    "rounds_to_90_percent", "validation_accuracy",
)  # fmt: skip


def write_pages(lines: Sequence[Line], docs: Path) -> None:
    """Write results.json, results.md and results/curves-*.{svg,png} into the documentation folder."""
    kept = [line for line in lines if not is_trial(line)]
    kept.sort(key=_order)
    rows = [{key: line["row"].get(key) for key in JSON_KEYS} for line in kept]
    (docs / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    main = [line for line in kept if line["row"]["ablation"] is None]
    pictures = write_curves(settings_of(main), docs / "results") if main else []
    text = "\n".join(
        [
            *_head(lines),
            *_claims(main),
            *_tables(main, pictures),
            *_recalibrated(kept),
            *_ablations(kept),
            *_tuning(lines),
        ]
    )
    notes = docs / "results" / "notes.md"
    ending = notes.read_text(encoding="utf-8") if notes.exists() else ""
    (docs / "results.md").write_text(f"{text}\n{ending}", encoding="utf-8")


def is_trial(line: Line) -> bool:
    """Whether a run belongs to the tuning."""
    return str(line["row"]["ablation"] or "").startswith("trial ")


def of(lines: Iterable[Line], task: study.Task, strategy: str, profile: str = "small") -> list[Row]:
    """Rows of a strategy on a task."""
    rows = (line["row"] for line in lines)
    return [
        row
        for row in rows
        if (row["dataset"], row["alpha"], row["strategy"], row["profile"])
        == (task.dataset, task.alpha, strategy, profile)
    ]


@dataclass(frozen=True, slots=True)
class Claim:
    """A difference that was aimed at, in points of a figure."""

    text: str
    task: study.Task
    against: str
    figure: str
    target: float


def _claims(main: Sequence[Line]) -> list[str]:
    found = [
        Claim("balanced accuracy, last five rounds", task, against, "balanced_accuracy_last5", target)
        for task, against, target in (
            (study.SKEW, BASELINE, 16),
            (study.STRONG_SKEW, BASELINE, 20),
            (study.SKEW, best_rival(main, study.SKEW), 6),
            (study.STRONG_SKEW, best_rival(main, study.STRONG_SKEW), 5),
            (study.SKEW, WITHOUT_IMPRESSIONS, 6),
            (study.STRONG_SKEW, WITHOUT_IMPRESSIONS, 3),
            (study.MILD_SKEW, BASELINE, 0),
            (study.MILD_SKEW, best_rival(main, study.MILD_SKEW), 0),
        )
    ]
    found += [
        Claim("worst site, last five rounds", study.REAL_SITES, BASELINE, "worst_site_accuracy_last5", 5),
        Claim("worst site, last five rounds", study.REAL_SITES, "fedbn", "worst_site_accuracy_last5", 0),
    ]
    body = [_claim(claim, main) for claim in found]
    body += [_speed_claim(task, main) for task in (study.SKEW, study.STRONG_SKEW)]
    body += [_common_level_claim(task, main) for task in (study.SKEW, study.STRONG_SKEW)]
    return [
        "## What was aimed at, and what came out", "",
        "Points of `fedimpres` over the other, paired by seed, with Student's 95 % interval. `fedlc` is ours with synthesis "
        "off: the same computation, seed for seed (a test holds it).", "",
        "**Read with it** the section on statistics measured after the merge: with them the lead over FedLC is gone.", "",
        table(["task", "figure", "against", "aim", "measured", "seeds", "met"], body), "",
    ]  # fmt: skip


def best_rival(main: Sequence[Line], task: study.Task) -> str:
    """The strategy other than ours with the highest mean of the last five rounds' balanced accuracy on the test set."""
    means = {name: estimate(_known(of(main, task, name))) for name in study.STRATEGIES if name != OURS}
    there = {name: found.mean for name, found in means.items() if found is not None}
    return max(there, key=lambda name: there[name]) if there else WITHOUT_IMPRESSIONS


def _known(rows: Sequence[Row], figure: str = "balanced_accuracy_last5") -> list[float]:
    return [row[figure] for row in rows if row[figure] is not None]


def _claim(claim: Claim, main: Sequence[Line]) -> list[str]:
    difference = paired_difference(
        of(main, claim.task, OURS), of(main, claim.task, claim.against), claim.figure
    )
    aim = f"≥ {claim.target:+g}" if claim.target else "≥ 0"
    if difference is None:
        return [claim.task.name, claim.text, claim.against, aim, "not run yet", "0", "–"]
    met = "yes" if difference.mean * 100 >= claim.target else "**no**"
    return [claim.task.name, claim.text, claim.against, aim, points(difference), str(difference.count), met]


def _speed_claim(task: study.Task, main: Sequence[Line]) -> list[str]:
    ours, without = (
        _known(of(main, task, name), "rounds_to_90_percent") for name in (OURS, WITHOUT_IMPRESSIONS)
    )
    text, aim = "rounds to 90 % of its final value, share", "≤ 0.67"
    if not ours or not without:
        return [task.name, text, WITHOUT_IMPRESSIONS, aim, "not run yet", "0", "–"]
    share = (sum(ours) / len(ours)) / (sum(without) / len(without))
    count = str(min(len(ours), len(without)))
    return [
        task.name,
        text,
        WITHOUT_IMPRESSIONS,
        aim,
        f"{share:.2f}",
        count,
        "yes" if share <= 2 / 3 else "**no**",
    ]


def _common_level_claim(task: study.Task, main: Sequence[Line]) -> list[str]:
    """The same with one level for both: 90 % of what the run without impressions comes to in the end."""
    curves = {
        (name, line["row"]["seed"]): line["curves"]["balanced_accuracy"]
        for name in (OURS, WITHOUT_IMPRESSIONS)
        for line in main
        if of([line], task, name)
    }
    seeds = [seed for name, seed in curves if name == OURS and (WITHOUT_IMPRESSIONS, seed) in curves]
    text, aim = f"rounds to 90 % of the final value of `{WITHOUT_IMPRESSIONS}`, share", "≤ 0.67"
    if not seeds:
        return [task.name, text, WITHOUT_IMPRESSIONS, aim, "not run yet", "0", "–"]
    rounds = {OURS: 0, WITHOUT_IMPRESSIONS: 0}
    for seed in seeds:
        without = curves[WITHOUT_IMPRESSIONS, seed]
        level = 0.9 * sum(without[-5:]) / 5
        for name in rounds:
            curve = curves[name, seed]
            rounds[name] += next((n for n, value in enumerate(curve, 1) if value >= level), len(curve))
    share = rounds[OURS] / rounds[WITHOUT_IMPRESSIONS]
    met = "yes" if share <= 2 / 3 else "**no**"
    return [task.name, text, WITHOUT_IMPRESSIONS, aim, f"{share:.2f}", str(len(seeds)), met]


def points(difference: Estimate) -> str:
    """A difference in points with its interval."""
    mean = 100 * difference.mean
    if difference.half_width is None:
        return f"{mean:+.1f}"
    return (
        f"{mean:+.1f} [{mean - 100 * difference.half_width:+.1f}, {mean + 100 * difference.half_width:+.1f}]"
    )


def _head(lines: Sequence[Line]) -> list[str]:
    hours = math.fsum(line["seconds"] for line in lines) / 3600
    return [HEAD.format(runs=len(lines), hours=hours)]


def _tables(main: Sequence[Line], pictures: Sequence[Path]) -> list[str]:
    parts = ["## Tables", "", NOTE, ""]
    for setting in settings_of(main):
        parts += [f"### {setting.title}", "", table(head_of(), body_of(setting)), ""]
    parts += [f"![curves](results/{path.name})" for path in pictures if path.suffix == ".png"]
    hardware = sorted({line["row"]["hardware"] for line in main})
    return [*parts, "", f"Hardware: {'; '.join(hardware)}.", ""]


def _recalibrated(kept: Sequence[Line]) -> list[str]:
    """Rows with BatchNorm statistics measured after the merge, and what is left of the lead there."""
    found = [line for line in kept if line["row"]["ablation"] == study.RECALIBRATED]
    if not found:
        return []
    plain = [line for line in kept if line["row"]["ablation"] is None]
    figure = "balanced_accuracy_last5"
    body = []
    for task in study.RECALIBRATED_TASKS:
        ours = of(found, task, OURS)
        pairs = [
            (f"{OURS} against {name}", ours, of(found, task, name))
            for name in (BASELINE, WITHOUT_IMPRESSIONS)
        ]
        pairs += [
            (f"{name} against itself without", of(found, task, name), of(plain, task, name))
            for name in study.CLAIMED
        ]
        for text, rows, others in pairs:
            difference = paired_difference(rows, others, figure)
            if difference is not None:
                body.append([task.name, text, points(difference), str(difference.count)])
    parts = ["## Statistics measured after the merge", "", RECALIBRATED_TEXT, ""]
    for setting in settings_of(found):
        parts += [f"### {setting.title}", "", table(head_of(), body_of(setting)), ""]
    parts += [table(["task", "balanced accuracy, last five rounds, points", "measured", "seeds"], body), ""]
    settings = [f"`{name}`: `{json.dumps(part)}`" for name, part in study.RECALIBRATED_SETTINGS.items()]
    return [*parts, f"Settings: {'; '.join(settings)}.", ""]


def _ablations(kept: Sequence[Line]) -> list[str]:
    changed = [line["row"] for line in kept if line["row"]["ablation"] not in (None, study.RECALIBRATED)]
    ours = of([line for line in kept if line["row"]["ablation"] is None], study.SKEW, OURS)
    names = list(dict.fromkeys(row["ablation"] for row in changed))
    body = []
    for name in names:
        rows = [row for row in changed if row["ablation"] == name]
        figures = [
            estimate(_known(rows, figure))
            for figure in ("balanced_accuracy_last5", "forgetting", "seconds_per_round")
        ]
        difference = paired_difference(rows, ours, "balanced_accuracy_last5")
        shown = [f"{found.mean:.3f}" if found else "–" for found in figures]
        body.append([name, str(len(rows)), shown[0], points(difference) if difference else "–", *shown[1:]])
    if not body:
        return []
    head = ["changed", "seeds", "balanced, last 5", "against ours, points", "forgetting", "s a round"]
    return ["## Ablations", "", "Ours, tuned, alpha 0.1, with one thing changed.", "", table(head, body), ""]


def _tuning(lines: Sequence[Line]) -> list[str]:
    parts = ["## Tuning", ""]
    for task in study.TUNED_ON:
        settings = stored_settings(task.dataset)
        body = []
        for name in study.STRATEGIES:
            trials = [
                line for line in lines
                if is_trial(line) and line["row"]["strategy"] == name and line["row"]["dataset"] == task.dataset
            ]  # fmt: skip
            figures = sorted(
                (line["row"]["ablation"], sum(line["curves"]["validation_accuracy"][-5:]) / 5)
                for line in trials
            )
            shown = " ".join(f"{figure:.3f}" for _, figure in figures)
            if trials:
                body.append([name, shown, f"`{json.dumps(settings.get(name, {}))}`"])
        if body:
            head = ["strategy", "validation accuracy of the trials 0-5", "chosen"]
            parts += [f"{task.name}, seed {study.TUNING_SEED}:", "", table(head, body), ""]
    return parts


def _order(line: Line) -> tuple[Any, ...]:
    row = line["row"]
    names = (*study.STRATEGIES, *study.REFERENCES)
    return (
        row["profile"] != "small", row["dataset"], row["alpha"] or 0, row["ablation"] or "",
        names.index(row["strategy"]) if row["strategy"] in names else 99, row["seed"],
    )  # fmt: skip
