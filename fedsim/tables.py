"""What many runs came to, as tables in CSV and Markdown: means over seeds, paired differences."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.statistics import Estimate, Setting, estimate, paired_difference

# The figures that people read first, as in the table's head.
COLUMNS = {
    "balanced_accuracy_last5": "balanced, last 5",
    "balanced_accuracy": "balanced, picked",
    "accuracy_last5": "accuracy, last 5",
    "accuracy": "accuracy, picked",
    "worst_site_accuracy": "worst site",
    "worst_class_recall": "worst class",
    "forgetting": "forgetting",
    "rounds_to_90_percent": "rounds to 90 %",
    "bytes_per_round": "MB a round",
    "seconds_per_round": "s a round",
}
NOTE = (
    "Mean over seeds ± standard deviation, test images. "
    "*picked*: the round with the best validation accuracy; "
    "*last 5*: the mean of the last five rounds. Worst site and worst class are those of the picked round. "
    "*forgetting*: mean over sites of the drop in recall, during local training, of classes below 1 % "
    "of the site's images, last five rounds (less is better). "
    "Differences are paired by seed, with Student's 95 % interval."
)


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows as CSV; empty cells where there is no figure."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(settings: Sequence[Setting]) -> str:
    """Tables of means over seeds and of differences to the baseline, a pair for each setting."""
    parts = []
    for setting in settings:
        parts += [f"## {setting.title}", "", table(head_of(), body_of(setting)), ""]
        differences = differences_of(setting)
        if differences:
            assert setting.baseline is not None
            head = [f"against {setting.baseline.label}", "balanced, last 5", "balanced, picked", "seeds"]
            parts += [table(head, differences), ""]
    hardware = sorted({line["row"]["hardware"] for s in settings for g in s.groups for line in g.lines})
    parts += [NOTE, "", f"Hardware: {'; '.join(hardware)}.", ""]
    return "\n".join(parts)


def head_of() -> list[str]:
    """Headings of the table of means."""
    return ["strategy", "seeds", *COLUMNS.values()]


def body_of(setting: Setting) -> list[list[str]]:
    """Cells of the table of means, a row a strategy."""
    body = []
    for group in setting.groups:
        cells = [group.label, str(len(group.lines))]
        for name in COLUMNS:
            known = [row[name] for row in group.rows if row[name] is not None]
            cells.append(_cell(name, estimate(known)))
        body.append(cells)
    return body


def differences_of(setting: Setting) -> list[list[str]]:
    """Cells of the table of paired differences; empty if there is nothing to compare."""
    baseline = setting.baseline
    if baseline is None:
        return []
    body = []
    for group in setting.groups:
        if group is baseline:
            continue
        found = [
            paired_difference(group.rows, baseline.rows, figure)
            for figure in ("balanced_accuracy_last5", "balanced_accuracy")
        ]
        if any(found):
            count = max(difference.count for difference in found if difference is not None)
            body.append([group.label, *(_difference(difference) for difference in found), str(count)])
    return body


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column left, the others right."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in body)])


def _cell(name: str, found: Estimate | None) -> str:
    if found is None:
        return "–"
    scale, digits = {
        "bytes_per_round": (1e-6, 2),
        "seconds_per_round": (1, 2),
        "rounds_to_90_percent": (1, 1),
    }.get(name, (1, 3))
    spread = "" if found.deviation is None else f" ± {found.deviation * scale:.{digits}f}"
    return f"{found.mean * scale:.{digits}f}{spread}"


def _difference(found: Estimate | None) -> str:
    if found is None:
        return "–"
    if found.half_width is None:
        return f"{found.mean:+.3f}"
    low, high = found.mean - found.half_width, found.mean + found.half_width
    return f"{found.mean:+.3f} [{low:+.3f}, {high:+.3f}]"
