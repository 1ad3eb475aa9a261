"""The report of a comparison as one HTML file that needs nothing from elsewhere."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

from fedcore.errors import StorageError
from fedcore.report.charts import Series, line_chart
from fedcore.report.style import CSS
from fedsim.figure_files import Picture
from fedsim.plots import CURVES, spread
from fedsim.statistics import Group, Setting
from fedsim.tables import body_of, differences_of, head_of


def page(
    settings: Sequence[Setting], note: str, pictures: Mapping[str, Sequence[Picture]] | None = None
) -> str:
    """The page: for each setting the table of means, the paired differences, the curves, the pictures, and the runs.

    `pictures` are by the setting's title and go into the page whole. Raises StorageError if one can't be read.
    """
    sections = [
        section
        for setting in settings
        for section in _sections(setting, (pictures or {}).get(setting.title, ()))
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>fedsim</title><style>{CSS}</style></head><body><main><h1>Strategies compared</h1>"
        f'<p class="soft">{escape(note)}</p>{"".join(sections)}'
        "<footer>Made by fedsim.</footer></main></body></html>\n"
    )


def _sections(setting: Setting, pictures: Sequence[Picture]) -> list[str]:
    cards = [_card(setting.title, _table(head_of(), body_of(setting)))]
    differences = differences_of(setting)
    if differences and setting.baseline is not None:
        head = [f"against {setting.baseline.label}", "balanced, last 5", "balanced, picked", "seeds"]
        cards.append(_card("Paired differences, 95 % interval", _table(head, differences)))
    charts = "".join(_chart(setting.groups, name, title) for name, title in CURVES.items())
    runs = [
        [group.label, str(line["row"]["seed"]), line["config"], line["model"][:16], f"{line['seconds']:.0f}"]
        for group in setting.groups
        for line in group.lines
    ]
    listed = _table(["strategy", "seed", "configuration", "model", "seconds"], runs)
    cards.append(f'<div class="grid">{charts}</div>')
    cards += [_card(picture.title, _image(picture)) for picture in pictures]
    cards.append(_card("Runs", f"<details><summary>{len(runs)} runs</summary>{listed}</details>"))
    return cards


def _chart(groups: Sequence[Group], name: str, title: str) -> str:
    points = [{number: mean for number, mean, _, _ in spread(group, name)} for group in groups]
    rounds = sorted({number for means in points for number in means})
    if not rounds:
        return ""
    series = [
        Series(
            group.label,
            [means.get(number) for number in rounds],
            dashed=group.strategy in ("pooled", "single_site"),
        )
        for group, means in zip(groups, points, strict=True)
    ]
    chart = line_chart(rounds, series, label=title, top=1.0)
    return f'<section class="card"><h2>{escape(title.capitalize())}, mean over seeds</h2>{chart}</section>'


def _image(picture: Picture) -> str:
    try:
        data = base64.b64encode(picture.png.read_bytes()).decode("ascii")
    except OSError as error:
        raise StorageError(f"{picture.png}: can't be read: {error}") from error
    style = "display:block;max-width:100%;margin:auto;border-radius:8px"
    return f'<img src="data:image/png;base64,{data}" alt="{escape(picture.title)}" style="{style}">'


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [_row("td", cells) for cells in body]
    return f'<div class="scroll"><table>{_row("th", head)}{"".join(rows)}</table></div>'


def _row(tag: str, cells: Sequence[str]) -> str:
    first, *others = (escape(cell) for cell in cells)
    return f'<tr><{tag} class="left">{first}</{tag}>{"".join(f"<{tag}>{c}</{tag}>" for c in others)}</tr>'


def _card(name: str, body: str) -> str:
    return f'<div class="grid"><section class="card"><h2>{escape(name)}</h2>{body}</section></div>'
