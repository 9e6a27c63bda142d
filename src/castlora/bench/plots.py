"""The charts of the benchmark, drawn as SVG: mean lift of each method with its interval, and lift along a number."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

from castlora.bench.results import DEFAULT_METHOD, MeanLift
from castlora.config import Regime

_WIDTH, _ROW, _TITLE, _MARGIN = 860, 24, 34, 16
_NAMES, _VALUES = 310, 130
"""Room in pixels for the names on the left and the figures on the right of the bars."""
_CURVES_HEIGHT, _LINE = 360, 16
_DEFAULT_COLOUR, _OTHER_COLOUR, _INK, _FAINT = "#0b6e75", "#8c959f", "#1f2328", "#d0d7de"
_MOST_TICKS = 8
_LINES = (
    (_DEFAULT_COLOUR, "none", 4), ("#b35900", "7 4", 3), ("#6e4fa3", "2 3", 3), ("#57606a", "12 4", 3),
    ("#b02a5b", "8 3 2 3", 3), ("#2f6f2f", "4 2", 3), ("#1f5fbf", "1 5", 3),
)  # fmt: skip
"""Colour, dashes and size of the marks of each line."""
_LETTER = 7.5
"""Room in pixels for a letter of a name."""


def lift_chart(means: Sequence[MeanLift], titles: Mapping[Regime, str]) -> str:
    """One bar per method and regime from lift 0, with its 95 % interval; lines mark a bare and a retrained target.

    Args:
        means: mean lifts, grouped by regime
        titles: of the regimes
    """
    low = min([0.0, *(mean.ci95[0] for mean in means)])
    high = max([1.0, *(mean.ci95[1] for mean in means)])
    scale = (_WIDTH - _NAMES - _VALUES) / (high - low)

    def x(lift: float) -> float:
        return _NAMES + (lift - low) * scale

    parts, y = [], float(_MARGIN)
    for regime, group in groupby(means, key=lambda mean: mean.regime):
        parts.append(_text(_MARGIN, y + 20, titles[regime], weight=600))
        y += _TITLE
        for mean in group:
            parts.append(_bar(mean, x(0), x(mean.lift), x(mean.ci95[0]), x(mean.ci95[1]), y))
            y += _ROW
    lines = [_mark(x(0), y, "bare 0"), _mark(x(1), y, "retrained 1")]
    height = y + 2 * _MARGIN
    return _svg(height, "Mean lift by method", [*lines, *parts])


@dataclass(frozen=True)
class Curve:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """x above 0 and y, in ascending x."""


def curve_chart(curves: Sequence[Curve], x_title: str, y_title: str) -> str:
    """Lines over a logarithmic x axis, each with its own mark and its name at its end; y from 0 to 1 or beyond.

    Args:
        curves: the lines, each with at least one point
        x_title: what x is
        y_title: what y is
    """
    every = [point for curve in curves for point in curve.points]
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    low, high = (f(bound, *(y for _, y in every)) for f, bound in ((min, 0.0), (max, 1.0)))
    longest = max(len(curve.name) for curve in curves)
    left, right, top, bottom = 60, _WIDTH - max(_VALUES, _LETTER * longest + _MARGIN), 2 * _MARGIN, _CURVES_HEIGHT - 50

    def place(x: float, y: float) -> tuple[float, float]:
        along = math.log(x / first) / math.log(last / first) if first < last else 0.5
        return left + along * (right - left), bottom - (y - low) / (high - low) * (bottom - top)

    parts = [_text(left, bottom + 40, x_title), _text(left, top - 12, y_title)]
    for tick in logarithmic_ticks([x for x, _ in every]):
        x, _ = place(tick, 0)
        parts.append(_text(x, bottom + 20, f"{tick:g}", anchor="middle"))
    for level in (0.0, 0.5, 1.0):
        _, y = place(first, level)
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="{_FAINT}"/>')
        parts.append(_text(left - 8, y + 4, f"{level:.1f}", anchor="end"))
    ends = _apart([place(*curve.points[-1])[1] for curve in curves])
    for number, (curve, end) in enumerate(zip(curves, ends, strict=True)):
        parts.append(_curve(curve.name, [place(x, y) for x, y in curve.points], number, end))
    return _svg(_CURVES_HEIGHT, f"{y_title} against {x_title}", parts)


def logarithmic_ticks(values: Iterable[float]) -> list[float]:
    """Where to label a logarithmic axis: at its values, or where these are many at round numbers between them.

    Args:
        values: above 0

    Example:
        >>> logarithmic_ticks([50, 100, 100])
        [50, 100]
        >>> logarithmic_ticks(range(7, 120))
        [10.0, 20.0, 50.0, 100.0]
    """
    distinct = sorted(set(values))
    if len(distinct) <= _MOST_TICKS:
        return distinct
    low, high = distinct[0], distinct[-1]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for decade in decades for step in (1, 2, 5) if low <= (tick := step * 10.0**decade) <= high]


def _apart(heights: Sequence[float]) -> list[float]:
    """Heights of labels, moved down where they would overlap the one above."""
    moved = list(heights)
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + _LINE)
    return moved


def _curve(name: str, places: Sequence[tuple[float, float]], number: int, label_height: float) -> str:
    """A line, told from the others by colour, dashes and marks."""
    colour, dashes, size = _LINES[number % len(_LINES)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    marks = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{colour}"/>' for x, y in places]
    line = f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'
    return "\n".join([line, *marks, _text(places[-1][0] + 10, label_height + 4, name, colour=colour)])


def _bar(mean: MeanLift, zero: float, end: float, low: float, high: float, y: float) -> str:
    colour = _DEFAULT_COLOUR if mean.method == DEFAULT_METHOD else _OTHER_COLOUR
    middle = y + _ROW / 2
    plural = "cell" if mean.cells == 1 else "cells"
    figures = f"{mean.lift:z.2f} ({mean.cells} {plural})"
    return "\n".join(
        [
            _text(_NAMES - 10, middle + 4, mean.method, anchor="end"),
            f'<rect x="{min(zero, end):.1f}" y="{y + 4:.1f}" width="{abs(end - zero):.1f}" height="{_ROW - 8}" '
            f'fill="{colour}"/>',
            f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}" stroke="{_INK}" stroke-width="1.5"/>',
            _text(_WIDTH - _VALUES + 12, middle + 4, figures),
        ]
    )


def _svg(height: float, label: str, parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}" font-family="system-ui, sans-serif" font-size="13">\n'
        f'<rect width="{_WIDTH}" height="{height:.0f}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _mark(x: float, height: float, label: str) -> str:
    line = f'<path d="M{x:.1f} {_MARGIN}V{height:.1f}" stroke="{_FAINT}" stroke-dasharray="4 3"/>'
    return line + "\n" + _text(x, height + 18, label, anchor="middle")


def _text(x: float, y: float, text: str, anchor: str = "start", weight: int = 400, colour: str = _INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )
