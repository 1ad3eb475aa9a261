"""Charts as inline SVG. Colours are CSS classes (`s1` ... `s8`), so that one file serves light and dark
screens.

Numbers are shown on hover by SVG titles; nothing needs a script.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8
_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 34


@dataclass(frozen=True, slots=True)
class Series:
    """A named line: one value a round, None where there is none."""

    name: str
    values: Sequence[float | None]
    dashed: bool = False


def percent(value: float) -> str:
    """0.853 -> 85.3 %."""
    return f"{100 * value:.1f} %"


def line_chart(
    rounds: Sequence[int],
    series: Sequence[Series],
    *,
    label: str,
    top: float | None = None,
    show: Callable[[float], str] = percent,
    mark: tuple[int, str] | None = None,
) -> str:
    """Lines over rounds. `top` ends the y axis, which starts at 0; without it, the largest value does.

    `mark` is a round, one of `rounds`, that an upright line with a word beside it points out.
    Series without a value are left out; returns "" when none is left.
    """
    lines = [s for s in series if any(v is not None for v in s.values)]
    if not lines:
        return ""
    largest = max(v for s in lines for v in s.values if v is not None)
    ticks = nice_ticks(top if top is not None else largest)
    place = _Placement(rounds, ticks[-1])
    body = [_axes(place, rounds, ticks, show)]
    if mark is not None:
        body.append(_mark(place.x(mark[0]), mark[1]))
    for index, line in enumerate(lines):
        body.append(_line(place, rounds, line, index % COLOURS + 1, show))
    return _svg(body, label) + (legend([s.name for s in lines]) if len(lines) > 1 else "")


def stacked_columns(
    rounds: Sequence[int], parts: Mapping[str, Sequence[float]], *, label: str, show: Callable[[float], str]
) -> str:
    """A column a round, made of named parts. Returns "" if all parts are 0."""
    totals = [sum(values[i] for values in parts.values()) for i in range(len(rounds))]
    if not totals or max(totals) <= 0:
        return ""
    ticks = nice_ticks(max(totals))
    place = _Placement(rounds, ticks[-1])
    body = [_axes(place, rounds, ticks, show, between=True)]
    slot = (_WIDTH - _LEFT - _RIGHT) / len(rounds)
    width = max(1.0, min(34.0, slot * 0.72))
    for i, round_ in enumerate(rounds):
        base = 0.0
        for index, (name, values) in enumerate(parts.items()):
            value = values[i]
            if value <= 0:
                continue
            y, low = place.y(base + value), place.y(base)
            x = _LEFT + slot * (i + 0.5) - width / 2
            title = f"<title>round {round_}: {escape(name)} {escape(show(value))}</title>"
            body.append(
                f'<rect class="f{index % COLOURS + 1}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{max(0.0, low - y):.1f}">{title}</rect>'
            )
            base += value
    return _svg(body, label) + legend(list(parts))


def bars(rows: Sequence[tuple[str, float | None, str]], *, colour: int = 1) -> str:
    """Horizontal bars of shares in [0, 1], as HTML: (label, share, note in grey)."""
    out = []
    for name, share, note in rows:
        width = 0.0 if share is None else 100 * min(1.0, max(0.0, share))
        value = "–" if share is None else percent(share)
        out.append(
            f'<div class="bar"><span class="name">{escape(name)}</span>'
            f'<span class="track"><span class="fill b{colour}" style="width:{width:.1f}%"></span></span>'
            f'<span class="value">{value}</span><span class="note">{escape(note)}</span></div>'
        )
    return f'<div class="bars">{"".join(out)}</div>'


def legend(names: Sequence[str]) -> str:
    """The names of colours 1, 2, ... as HTML."""
    items = (
        f'<span><i class="b{index % COLOURS + 1}"></i>{escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(items)}</div>'


def nice_ticks(largest: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to at least `largest`, about `count` steps."""
    if not math.isfinite(largest) or largest <= 0:
        return [0.0, 1.0]
    raw = largest / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    steps = math.ceil(largest / step - 1e-9)
    return [round(i * step, 10) for i in range(steps + 1)]


class _Placement:
    """From rounds and values to pixels."""

    def __init__(self, rounds: Sequence[int], top: float) -> None:
        self._first = rounds[0]
        self._span = max(1, rounds[-1] - rounds[0])
        self._top = top
        self._single = len(rounds) == 1

    def x(self, round_: int) -> float:
        inner = _WIDTH - _LEFT - _RIGHT - 12
        share = 0.5 if self._single else (round_ - self._first) / self._span
        return _LEFT + 6 + inner * share

    def y(self, value: float) -> float:
        inner = _HEIGHT - _TOP - _BOTTOM
        return _TOP + inner * (1 - min(1.0, max(0.0, value / self._top)))


def _axes(
    place: _Placement,
    rounds: Sequence[int],
    ticks: Sequence[float],
    show: Callable[[float], str],
    between: bool = False,
) -> str:
    out = []
    for tick in ticks:
        y = place.y(tick)
        text = show(tick).replace(".0 %", " %")
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
        )
    slot = (_WIDTH - _LEFT - _RIGHT) / len(rounds)
    low = _HEIGHT - _BOTTOM + 17
    step = max(1, math.ceil(len(rounds) / 12))
    for i, round_ in enumerate(rounds):
        # The last round is labelled always; its neighbour gives way where they would touch.
        if i != len(rounds) - 1 and (i % step or len(rounds) - 1 - i < step):
            continue
        x = _LEFT + slot * (i + 0.5) if between else place.x(round_)
        out.append(f'<text class="tick" x="{x:.1f}" y="{low}" text-anchor="middle">{round_}</text>')
    x = (_LEFT + _WIDTH - _RIGHT) / 2
    out.append(f'<text class="tick" x="{x:.0f}" y="{_HEIGHT - 3}" text-anchor="middle">round</text>')
    return "".join(out)


def _mark(x: float, text: str) -> str:
    """An upright line, its word on the side that has more room."""
    left = x > (_LEFT + _WIDTH - _RIGHT) / 2
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        f'<text class="tick" x="{x - 6 if left else x + 6:.1f}" y="{_TOP + 10}" '
        f'text-anchor="{"end" if left else "start"}">{escape(text)}</text>'
    )


def _line(
    place: _Placement, rounds: Sequence[int], line: Series, colour: int, show: Callable[[float], str]
) -> str:
    path, pen = [], "M"
    dots = []
    few = len(rounds) <= 40
    for round_, value in zip(rounds, line.values, strict=True):
        if value is None:
            pen = "M"
            continue
        x, y = place.x(round_), place.y(value)
        path.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
        title = f"<title>round {round_}: {escape(line.name)} {escape(show(value))}</title>"
        if few:
            dots.append(f'<circle class="f{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        dots.append(f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="9">{title}</circle>')
    dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
    return f'<path class="line s{colour}" d="{" ".join(path)}"{dashes}/>' + "".join(dots)


def _svg(body: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{''.join(body)}</svg>"
    )
