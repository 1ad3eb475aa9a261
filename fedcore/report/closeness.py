"""How close impressions come to the sites' images: what the sites' own checks found, as a table.

Reads `impressions.checks` of round records (`fedcore.impression_check.ImpressionCheck` as objects).
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedcore.impression_check import ImpressionCheck

Record = Mapping[str, Any]
_HEADS = (
    "checked", "refused", "refused in all rounds", "pixels: nearest", "median", "limit",
    "features: nearest", "median", "limit", "means", "covariances",
)  # fmt: skip


def closeness(records: Sequence[Record]) -> str:
    """The card "How close impressions come to the sites' images"; "" if no site has checked any."""
    last: dict[str, tuple[int, ImpressionCheck]] = {}
    refused: dict[str, int] = {}
    for record in records:
        for site, found in ((record.get("impressions") or {}).get("checks") or {}).items():
            check = ImpressionCheck.model_validate(found)
            last[site] = int(record["round"]), check
            refused[site] = refused.get(site, 0) + check.num_refused
    if not last:
        return ""
    newest = max(number for number, _ in last.values())
    rows = "".join(_row(site, *last[site], newest, refused[site]) for site in sorted(last))
    head = "".join(f"<th>{name}</th>" for name in _HEADS)
    note = (
        f"Each site compared the impressions of round {newest} with its own images before it trained on them. Distances are "
        "to the nearest training image; 99 % of the site's held-out images stay above the limit, and an impression that "
        "does not is refused. Pixels: 0 is the same picture, 1.41 has nothing in common. Features: in units of the training "
        "images' spread; alone they refuse nothing. Means and covariances compare the features of impressions and of "
        "training images, class by class; 0 is alike."
    )
    return (
        '<div class="grid"><section class="card wide"><h2>How close impressions come to the sites\' images</h2>'
        f'<p class="soft">{note}</p><div class="scroll"><table><tr><th class="left">site</th>{head}</tr>{rows}</table>'
        "</div></section></div>"
    )


def _row(site: str, number: int, check: ImpressionCheck, newest: int, refused: int) -> str:
    figures = (
        check.pixel_smallest, check.pixel_median, check.pixel_limit,
        check.feature_smallest, check.feature_median, check.feature_limit,
        check.mean_distance, check.covariance_distance,
    )  # fmt: skip
    cells = [str(check.num_checked), str(check.num_refused), str(refused), *map(_distance, figures)]
    name = site if number == newest else f"{site} (round {number})"
    missed = f' class="missed" title="{escape(check.reason)}"' if check.num_refused else ""
    return f'<tr{missed}><td class="left">{escape(name)}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _distance(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.1e}"
