"""`write_report`: the page itself, section by section. Every text from outside is escaped."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcore.errors import StorageError
from fedcore.report.charts import Series, bars, line_chart, percent, stacked_columns
from fedcore.report.closeness import closeness
from fedcore.report.local_training import local_training
from fedcore.report.style import CSS
from fedcore.update_verdict import gate_summary

if TYPE_CHECKING:
    from fedcore.report.pictures import Pictures

Record = Mapping[str, Any]
_STATE_CHIP = {"DONE": "good", "DEGRADED": "warn"}


def write_report(
    path: Path,
    *,
    title: str,
    records: Sequence[Record],
    facts: Mapping[str, str] | None = None,
    state: str = "",
    impressions: Sequence["Pictures"] = (),
    class_names: Sequence[str] = (),
    holdings: Mapping[str, Mapping[str, int]] | None = None,
    command: str = "",
    plan_toml: str = "",
) -> None:
    """Write the report of a run to `path`, whole or not at all.

    `records` are round records (`RoundRecord` as objects, oldest first). `facts` stand below the title.
    `impressions` holds the pictures of some rounds, oldest first; all of the last are shown, and one a class
    over those rounds. `holdings` is how many training images of each class a site has, where that is no secret (demo,
    simulation). `command` and `plan_toml` say how to repeat the run. Raises StorageError if the file can't
    be written.
    """
    sections = [
        _header(title, state, facts or {}),
        _tiles(records),
        _curves(records),
        _final_bars(records),
        _holdings(holdings or {}),
        local_training(records),
        _impressions(impressions, tuple(class_names)),
        closeness(records),
        _round_table(records),
        _repeat(command, plan_toml),
    ]
    document = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # No script and nothing from elsewhere, whatever a name in the data contains.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        f"{''.join(sections)}<footer>Made by fedimpres. Accuracy pools the sites' held-out images; "
        "balanced accuracy is the mean recall of the classes.</footer></main></body></html>\n"
    )
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            file.write(document)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise StorageError(f"{path}: the report can't be written: {error}") from error


def worst_site(record: Record) -> tuple[str, float] | None:
    """The site with the lowest accuracy in a record, and that accuracy; None if no site has reported one."""
    figures = record.get("sites") or {}
    if not figures:
        return None
    site = min(sorted(figures), key=lambda name: float(figures[name]["accuracy"]))
    return site, float(figures[site]["accuracy"])


def _header(title: str, state: str, facts: Mapping[str, str]) -> str:
    chip = f'<span class="chip {_STATE_CHIP.get(state, "bad")}">{escape(state)}</span>' if state else ""
    items = "".join(f"<span>{escape(key)} <b>{escape(value)}</b></span>" for key, value in facts.items())
    return f'<h1>{escape(title)}{chip}</h1><div class="facts">{items}</div>'


def _tiles(records: Sequence[Record]) -> str:
    if not records:
        return '<div class="card" style="margin-top:20px">No round has finished.</div>'
    last = records[-1]
    worst = worst_site(last)
    made = sum(int((record.get("impressions") or {}).get("made", 0)) for record in records)
    best = max(
        (r for r in records if r.get("validation_accuracy") is not None),
        key=lambda r: float(r["validation_accuracy"]),
        default=None,
    )
    tiles = [
        (_share(last.get("accuracy")), f"accuracy after round {last['round']}"),
        (_share(last.get("balanced_accuracy")), last.get("balanced_accuracy_note") or "balanced accuracy"),
        (_share(worst[1] if worst else None), f"worst site{f': {worst[0]}' if worst else ''}"),
        (str(best["round"]) if best else "–", "best round, by validation"),
        (f"{made:,}", "impressions made"),
        (_seconds(sum(float(r.get("seconds", 0)) for r in records)), f"for {len(records)} rounds"),
        (_bytes(sum(r.get("bytes_up", 0) + r.get("bytes_down", 0) for r in records)), "moved, up and down"),
    ]
    items = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(t)}</span></div>' for v, t in tiles)
    return f'<div class="tiles">{items}</div>'


def _curves(records: Sequence[Record]) -> str:
    if not records:
        return ""
    rounds = [int(r["round"]) for r in records]

    def values(key: str) -> list[float | None]:
        return [r.get(key) for r in records]

    accuracy = line_chart(
        rounds,
        [
            Series("accuracy", values("accuracy")),
            Series("balanced accuracy", values("balanced_accuracy")),
            Series("validation accuracy", values("validation_accuracy"), dashed=True),
        ],
        label="Accuracy by round",
        top=1.0,
    )
    loss = line_chart(
        rounds, [Series("loss", values("loss"))], label="Loss by round", show=lambda v: f"{v:.3g}"
    )
    sites = sorted({site for r in records for site in r.get("sites") or {}})
    by_site = ""
    if 0 < len(sites) <= 8:
        lines = [
            Series(site, [((r.get("sites") or {}).get(site) or {}).get("accuracy") for r in records])
            for site in sites
        ]
        by_site = line_chart(rounds, lines, label="Accuracy at each site by round", top=1.0)
    phases = list(dict.fromkeys(phase for r in records for phase in r.get("phases_s") or {}))
    parts = {p: [float((r.get("phases_s") or {}).get(p, 0.0)) for r in records] for p in phases}
    timing = stacked_columns(rounds, parts, label="Seconds by round and phase", show=_seconds)
    charts = [
        ("Accuracy by round", accuracy), ("Loss on held-out images", loss),
        ("Accuracy at each site", by_site), ("Where the time goes", timing),
    ]  # fmt: skip
    cards = "".join(
        f'<section class="card"><h2>{name}</h2>{chart}</section>' for name, chart in charts if chart
    )
    return f'<div class="grid">{cards}</div>'


def _final_bars(records: Sequence[Record]) -> str:
    if not records:
        return ""
    last = records[-1]
    cards = []
    figures = last.get("sites") or {}
    if figures:
        used = (last.get("impressions") or {}).get("used") or {}
        rows = []
        for site, figure in sorted(figures.items()):
            drew = f", {used[site]} impressions used" if used.get(site) else ""
            rows.append((site, float(figure["accuracy"]), f"{figure['num_examples']:,} images{drew}"))
        cards.append(_card(f"Each site after round {last['round']}", bars(rows, colour=1)))
    classes = last.get("classes") or {}
    if classes:
        recalls = [(name, recall, "") for name, recall in classes.items()]
        cards.append(_card(f"Recall of each class after round {last['round']}", bars(recalls, colour=3)))
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def _holdings(holdings: Mapping[str, Mapping[str, int]]) -> str:
    if not holdings:
        return ""
    classes = list(dict.fromkeys(name for counts in holdings.values() for name in counts))
    largest = max((n for counts in holdings.values() for n in counts.values()), default=0) or 1
    head = "".join(f'<th class="heat">{escape(name)}</th>' for name in classes)
    rows = []
    for site, counts in holdings.items():
        cells = "".join(_heat(counts.get(name, 0), largest) for name in classes)
        rows.append(f'<tr><td class="left">{escape(site)}</td>{cells}<td>{sum(counts.values()):,}</td></tr>')
    table = f'<table><tr><th class="left">site</th>{head}<th>all</th></tr>{"".join(rows)}</table>'
    note = '<p class="soft">Training images of each class at each site.</p>'
    return (
        f'<div class="grid">{_card("Who holds what", f"""{note}<div class="scroll">{table}</div>""")}</div>'
    )


def _heat(count: int, largest: int) -> str:
    if not count:
        return '<td class="heat"><small>·</small></td>'
    # The square root keeps small counts visible beside large ones.
    opacity = 0.08 + 0.5 * (count / largest) ** 0.5
    return f'<td class="heat" style="background:rgb(var(--heat) / {opacity:.2f})">{count:,}</td>'


def _impressions(impressions: Sequence["Pictures"], class_names: tuple[str, ...]) -> str:
    if not impressions:
        return ""
    from fedcore.report.pictures import picture_rows
    from fedcore.report.timeline import timeline

    last = impressions[-1]
    note = (
        f'<p class="soft">Made by the coordinator from the global model alone, after round {last.round}; '
        "the sites mix them with their own images.</p>"
    )
    body = f"{note}{picture_rows(last, class_names)}"
    return (
        f'<div class="grid">{timeline(impressions, class_names)}'
        f"{_card(f'{len(last.labels)} impressions', body)}</div>"
    )


def _round_table(records: Sequence[Record]) -> str:
    if not records:
        return ""
    heads = ["round", "accuracy", "balanced", "validation", "expected", "registered", "started", "reported"]
    heads += ["aggregated", "passed the gate", "made / used", "seconds", "up", "down"]
    notes = [_notes(record) for record in records]
    rows = []
    for record, note in zip(records, notes, strict=True):
        impressions = record.get("impressions") or {}
        counts = [record.get(k, 0) for k in ("expected", "registered", "started", "reported", "aggregated")]
        used = sum((impressions.get("used") or {}).values())
        shares = [_share(record.get(k)) for k in ("accuracy", "balanced_accuracy", "validation_accuracy")]
        cells = [str(record["round"]), *shares, *map(str, counts)]
        cells += [gate_summary(record.get("gate") or {})]
        cells += [f"{impressions.get('made', 0)} / {used}", f"{record.get('seconds', 0.0):.1f}"]
        cells += [_bytes(record.get("bytes_up", 0)), _bytes(record.get("bytes_down", 0))]
        missed = ' class="missed"' if record.get("missing") or counts[-1] < counts[0] else ""
        last = f'<td class="left">{escape(note)}</td>' if any(notes) else ""
        rows.append(f"<tr{missed}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}{last}</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    head += '<th class="left">missing, notes</th>' if any(notes) else ""
    table = f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    intro = (
        '<p class="soft">Five counts of sites a round: expected by the plan, registered when it opened, '
        "started, reported (update durable at the coordinator), aggregated. "
        "A round that missed a site stands out. Passed the gate: updates, and the longest of them in medians of the "
        "round. Impressions: made after it, used by all sites in it.</p>"
    )
    return f'<div class="grid">{_card("Every round", intro + table)}</div>'


def _notes(record: Record) -> str:
    texts = [f"{site}: {reason}" for site, reason in (record.get("missing") or {}).items()]
    texts.append(str((record.get("impressions") or {}).get("note") or ""))
    return "; ".join(text for text in texts if text)


def _repeat(command: str, plan_toml: str) -> str:
    if not command and not plan_toml:
        return ""
    shown = f"<pre>{escape(command)}</pre>" if command else ""
    plan = (
        f"<details><summary>the plan</summary><pre>{escape(plan_toml)}</pre></details>" if plan_toml else ""
    )
    return f'<div class="grid">{_card("How to repeat it", shown + plan)}</div>'


def _card(name: str, body: str) -> str:
    return f'<section class="card"><h2>{escape(name)}</h2>{body}</section>'


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)


def _seconds(value: float) -> str:
    if value >= 120:
        return f"{int(value // 60)}m {int(value % 60):02d}s"
    return f"{value:.1f} s" if value < 10 and value != int(value) else f"{value:.0f} s"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
