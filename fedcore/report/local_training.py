"""What local training did to each class, where the coordinator measured it: forgetting over rounds, recalls by site.

Reads `update_scores` of round records (`fedcore.round_record.UpdateScores` as objects).
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedcore.report.charts import Series, line_chart, percent

Record = Mapping[str, Any]


def local_training(records: Sequence[Record]) -> str:
    """The cards "What local training forgets" and "Recall of each class before and after local training".

    Returns "" if the plan had no images to measure it on.
    """
    asked = [record for record in records if record.get("update_scores")]
    if not asked:
        return ""
    scored = [record for record in asked if record["update_scores"].get("mean_forgetting") is not None]
    began = first_with_impressions(records)
    cards = _forgetting(records, began) if scored else ""
    cards += "".join(_recalls(record, began) for record in rounds_to_compare(scored, began))
    cards += _notes(asked)
    return f'<div class="grid">{cards}</div>'


def first_with_impressions(records: Sequence[Record]) -> int | None:
    """The first round in which a site trained on impressions; None if there is none."""
    return next(
        (int(r["round"]) for r in records if any(((r.get("impressions") or {}).get("used") or {}).values())),
        None,
    )


def rounds_to_compare(scored: Sequence[Record], began: int | None) -> list[Record]:
    """The last scored round before impressions began, if there is one, and the last of all."""
    before = [record for record in scored if began is not None and record["round"] < began]
    last = list(scored[-1:])
    return [*before[-1:], *last] if before and last and before[-1] is not last[0] else last


def _forgetting(records: Sequence[Record], began: int | None) -> str:
    scores = [record.get("update_scores") or {} for record in records]
    means = [score.get("mean_forgetting") for score in scores]
    worst = [max(score.get("forgetting", {}).values(), default=None) for score in scores]
    chart = line_chart(
        [int(record["round"]) for record in records],
        [Series("mean of the sites", means), Series("the site that forgot most", worst, dashed=True)],
        label="Forgetting by round",
        # The same axis in every report, so that two can be laid side by side.
        top=1.0,
        mark=None if began is None else (began, "impressions begin"),
    )
    text = (
        "Forgetting is what a site's training of one round took from the recall of the model that it started from: the mean "
        "over the classes of max(0, before − after), measured by the coordinator on images of its own."
    )
    caution = "It changes as the model gets better, with or without impressions: compare runs with and without them."
    return (
        '<section class="card wide"><h2>What local training forgets</h2><div class="split">'
        f'<div>{chart}</div><div><p class="soft">{text}</p>{_means(records, began)}'
        f'<p class="soft" style="margin-top:12px">{caution}</p></div></div></section>'
    )


def _means(records: Sequence[Record], began: int | None) -> str:
    """The mean over rounds, without and with impressions, in words."""
    parts = []
    for name, chosen in (
        ("without impressions", [r for r in records if began is None or r["round"] < began]),
        ("with impressions", [r for r in records if began is not None and r["round"] >= began]),
    ):
        values = [
            (int(r["round"]), float(value))
            for r in chosen
            if (value := (r.get("update_scores") or {}).get("mean_forgetting")) is not None
        ]
        if values:
            mean = sum(value for _, value in values) / len(values)
            rounds = f"rounds {values[0][0]}–{values[-1][0]}" if len(values) > 1 else f"round {values[0][0]}"
            parts.append(f"<span>{name}, {rounds} <b>{percent(mean)}</b></span>")
    return f'<div class="facts">{"".join(parts)}</div>'


def _recalls(record: Record, began: int | None) -> str:
    scores = record["update_scores"]
    before: Mapping[str, float] = scores["before"]
    images: Mapping[str, int] = scores.get("num_examples") or {}
    phase = "with" if began is not None and record["round"] >= began else "without"
    head = "".join(f'<th class="heat">{escape(name)}</th>' for name in before)
    start = "".join(
        f'<td class="heat" title="{escape(f"{name}: {images.get(name, 0)} images")}">{100 * recall:.0f}</td>'
        for name, recall in before.items()
    )
    rows = [f'<tr class="start"><td class="left">before, all sites</td>{start}<td></td></tr>']
    for site, after in scores["after"].items():
        cells = "".join(_cell(site, name, recall, after[name]) for name, recall in before.items())
        forgot = percent(scores["forgetting"][site])
        rows.append(f'<tr><td class="left">after, {escape(site)}</td>{cells}<td>{forgot}</td></tr>')
    return (
        '<section class="card wide"><h2>Recall of each class before and after local training, '
        f"round {record['round']}, {phase} impressions</h2>"
        '<p class="soft">In percent, of the model that the sites started from and of the model that each sent back; '
        "beside it the change, coloured where a class fell or rose.</p>"
        f'<div class="scroll"><table><tr><th class="left">model</th>{head}<th>forgot</th></tr>{"".join(rows)}</table></div>'
        "</section>"
    )


def _cell(site: str, name: str, before: float, after: float) -> str:
    change = after - before
    points = round(100 * change)
    colour = f"background:rgb(var(--{'fall' if change < 0 else 'heat'}) / {0.55 * min(1.0, abs(change)):.2f})"
    title = f"{site}, {name}: {percent(before)} before, {percent(after)} after"
    shown = f"<small>{'−' if points < 0 else '+'}{abs(points)}</small>" if points else ""
    return f'<td class="heat" style="{colour}" title="{escape(title)}">{100 * after:.0f}{shown}</td>'


def _notes(asked: Sequence[Record]) -> str:
    """Why rounds or sites were not scored, each reason once with its rounds."""
    reasons: dict[str, list[str]] = {}
    for record in asked:
        if note := str(record["update_scores"].get("note") or ""):
            reasons.setdefault(note, []).append(str(record["round"]))
    if not reasons:
        return ""
    items = "".join(
        f'<p class="soft">Round{"s" if len(rounds) > 1 else ""} {escape(", ".join(rounds))}: {escape(note)}</p>'
        for note, rounds in reasons.items()
    )
    return f'<section class="card wide"><h2>What local training forgets: not measured</h2>{items}</section>'
