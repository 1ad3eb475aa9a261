"""How impressions change over rounds: one picture a class and round, the same one for as long as it was kept.

A bank does not number its pictures; what it keeps stays in order. So a picture is followed by its class, the round in
which it was begun, and its place among those: exact, unless the gate turned down one before it.

Legend: M impressions.
"""

from collections.abc import Sequence
from html import escape

import numpy as np

from fedcore.report.pictures import Pictures, png_data_uri

# The choice of one class in one round: position in the bank, and the round in which that picture was begun.
Choice = tuple[int, int | None]


def timeline(pictures: Sequence[Pictures], class_names: tuple[str, ...]) -> str:
    """A card of pictures, classes by rounds, oldest round first. Returns "" for fewer than two rounds."""
    if len(pictures) < 2:
        return ""
    labels = sorted({int(label) for bank in pictures for label in bank.labels})
    head = "".join(f"<th>round {bank.round}</th>" for bank in pictures)
    rows = []
    for label in labels:
        name = class_names[label] if 0 <= label < len(class_names) else str(label)
        cells = "".join(
            _cell(bank, choice, name) for bank, choice in zip(pictures, follow(pictures, label), strict=True)
        )
        rows.append(f'<tr><td class="left">{escape(name)}</td>{cells}</tr>')
    known = any(bank.born is not None for bank in pictures)
    note = "One of each class"
    note += (
        ", the same for as long as it was kept; below it, the round in which it was begun." if known else "."
    )
    return (
        '<section class="card"><h2>Impressions over rounds</h2>'
        f'<p class="soft">{note}</p><div class="scroll tall"><table class="timeline">'
        f'<tr><th class="left">class</th>{head}</tr>{"".join(rows)}</table></div></section>'
    )


def follow(pictures: Sequence[Pictures], label: int) -> list[Choice | None]:
    """Which picture of a class to show in each round: the one shown before if it is there, else the newest.

    None where the round has none of this class.
    """
    choices: list[Choice | None] = []
    begun: int | None = None
    for bank in pictures:
        own = np.flatnonzero(bank.labels == label)
        if not len(own):
            choices.append(None)
            continue
        if bank.born is None:
            choices.append((int(own[0]), None))
            continue
        births = bank.born[own]
        if begun is None or begun not in births:
            begun = int(births.max())
        choices.append((int(own[np.flatnonzero(births == begun)[0]]), begun))
    return choices


def _cell(bank: Pictures, choice: Choice | None, name: str) -> str:
    if choice is None:
        return "<td>–</td>"
    position, begun = choice
    since = "" if begun is None else f", begun in round {begun}"
    caption = "" if begun is None else f"<small>begun in {begun}</small>"
    return (
        f'<td><img src="{png_data_uri(bank.images[position])}" '
        f'alt="impression of {escape(name)}, round {bank.round}{since}">{caption}</td>'
    )
