"""The charts of the benchmark, drawn as SVG: bars of each method or part with intervals, and lift along a number."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

from castlora.bench.parts import MeasuredPart
from castlora.bench.results import DEFAULT_METHOD, Drift, MeanLift
from castlora.config import Regime

_WIDTH, _ROW, _TITLE, _MARGIN = 860, 24, 34, 16
_NAMES, _VALUES = 310, 130
"""Room in pixels for the names on the left and the figures on the right of the bars."""
_CURVES_HEIGHT, _LINE = 360, 16
_DEFAULT_COLOUR, _OTHER_COLOUR, _INK, _FAINT = "#0b6e75", "#8c959f", "#1f2328", "#d0d7de"
_MOST_TICKS = 8
_LEAST_LIFT = 0.1
"""Room for lift that a part adds, where all add less."""
_LINES = (
    (_DEFAULT_COLOUR, "none", 4), ("#b35900", "7 4", 3), ("#6e4fa3", "2 3", 3), ("#57606a", "12 4", 3),
    ("#b02a5b", "8 3 2 3", 3), ("#2f6f2f", "4 2", 3), ("#1f5fbf", "1 5", 3),
)  # fmt: skip
"""Colour, dashes and size of the marks of each line."""
DISTINCT_LINES = len(_LINES)
"""Lines of a chart that differ from one another in colour and dashes."""
_LETTER = 7.5
"""Room in pixels for a letter of a name."""


def lift_chart(means: Sequence[MeanLift], titles: Mapping[Regime, str], reference: str) -> str:
    """One bar per method and regime from lift 0, with its 95 % interval; lines mark a bare and a retrained target.

    Where a method was run on fewer cells than the reference, a ring stands as far from its bar's end as the two differ
    on the cells and seeds that they share: bars over unlike cells say nothing about each other.

    Args:
        means: mean lifts, grouped by regime
        titles: of the regimes
        reference: name of the method that the others are compared with
    """
    most = {mean.regime: mean.cells for mean in means if mean.method == reference}
    rings = [
        mean.lift - mean.comparison.above if mean.comparison and mean.cells < most[mean.regime] else None
        for mean in means
    ]
    bars = [
        _Bar(
            titles[mean.regime], mean.method, mean.lift, f"{mean.lift:z.2f} ({number_of_cells(mean.cells)})",
            mean.method == DEFAULT_METHOD, mean.ci95, ring,
        )
        for mean, ring in zip(means, rings, strict=True)
    ]  # fmt: skip
    return _bar_chart(bars, "Mean lift by method", {0: "bare 0", 1: "retrained 1"}, f"○ {reference}, same cells")


def parts_chart(parts: Sequence[MeasuredPart], titles: Mapping[Regime, str]) -> str:
    """One bar per part and regime from nothing to the lift that the part adds, with its 95 % interval.

    Args:
        parts: in any order
        titles: of the regimes, in the order of the chart
    """
    bars = [
        _Bar(
            title, part.part.change, part.added.above,
            f"{part.added.above:+z.2f} ({number_of_cells(part.added.cells)})", interval=part.added.ci95,
        )
        for regime, title in titles.items()
        for part in parts
        if part.part.regime == regime
    ]  # fmt: skip
    ends = [0.0, _LEAST_LIFT, *(bound for part in parts for bound in (part.added.above, *part.added.ci95))]
    lines = {0.0: "0"} | {tick: f"{tick:+.2g}" for tick in _even_ticks(min(ends), max(ends)) if tick}
    return _bar_chart(bars, "Lift that each part adds", lines)


def drift_chart(drifts: Sequence[Drift], titles: Mapping[Regime, str]) -> str:
    """One bar per method and regime from the bare target's perplexity to its own; a ring has the retrained adapters'.

    Args:
        drifts: grouped by regime
        titles: of the regimes
    """
    bars = [
        _Bar(
            titles[drift.regime], drift.method, math.log(drift.perplexity),
            f"{drift.perplexity:.2f} ({number_of_cells(drift.cells)})", drift.method == DEFAULT_METHOD,
            ring=math.log(drift.retrained),
        )
        for drift in drifts
    ]  # fmt: skip
    factors = [1.0, 2.0, *(factor for drift in drifts for factor in (drift.perplexity, drift.retrained))]
    lines = {0.0: "bare 1"} | {math.log(tick): f"× {tick:g}" for tick in _round_numbers(factors) if tick != 1}
    label = "Perplexity on general text, as a multiple of the bare target's"
    return _bar_chart(bars, label, lines, legend="○ retrained")


@dataclass(frozen=True)
class _Bar:
    """A bar of a chart, in the units of the chart's axis."""

    group: str
    name: str
    end: float
    figures: str
    is_default: bool = False
    interval: tuple[float, ...] = ()
    ring: float | None = None


def _bar_chart(bars: Sequence[_Bar], label: str, lines: Mapping[float, str], legend: str = "") -> str:
    """Bars that begin at 0, in groups one below the other, with named lines across them."""
    ends = [*lines, *(end for bar in bars for end in (bar.end, *bar.interval))]
    ends += [bar.ring for bar in bars if bar.ring is not None]
    names = max([_NAMES, *(_LETTER * len(bar.name) + _MARGIN for bar in bars)])
    low, high = min(ends), max(ends)
    scale = (_WIDTH - names - _VALUES) / (high - low)

    def x(end: float) -> float:
        return names + (end - low) * scale

    parts, y = [], float(_MARGIN)
    for group, of_group in groupby(bars, key=lambda bar: bar.group):
        parts.append(_text(_MARGIN, y + 20, group, weight=600))
        y += _TITLE
        for bar in of_group:
            parts.append(_bar(bar, x, y, names))
            y += _ROW
    marks = [_mark(x(end), y, title) for end, title in lines.items()]
    is_drawn = any(bar.ring is not None for bar in bars)
    explained = [_text(_WIDTH - _MARGIN, _MARGIN + 20, legend, anchor="end")] if is_drawn else []
    return _svg(y + 2 * _MARGIN, label, [*marks, *parts, *explained])


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
    return distinct if len(distinct) <= _MOST_TICKS else _round_numbers(distinct)


def _round_numbers(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten between the least and the greatest of some values above 0."""
    low, high = min(values), max(values)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for decade in decades for step in (1, 2, 5) if low <= (tick := step * 10.0**decade) <= high]


def _even_ticks(low: float, high: float) -> list[float]:
    """Where to label an axis between two numbers: at most eight multiples of 1, 2 or 5 times a power of ten.

    Example:
        >>> _even_ticks(-0.12, 0.33)
        [-0.1, 0.0, 0.1, 0.2, 0.3]
    """
    decade = math.floor(math.log10(high - low)) - 1
    steps = (factor * 10.0**power for power in (decade, decade + 1) for factor in (1, 2, 5))
    step = next(step for step in steps if (high - low) / step < _MOST_TICKS)
    return [round(number * step, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


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


def _bar(bar: _Bar, x: Callable[[float], float], y: float, names: float) -> str:
    """A bar with its name, interval, ring and figures; x turns units of the axis into pixels."""
    colour = _DEFAULT_COLOUR if bar.is_default else _OTHER_COLOUR
    middle, start, end = y + _ROW / 2, *sorted((x(0), x(bar.end)))
    drawn = [
        _text(names - 10, middle + 4, bar.name, anchor="end"),
        f'<rect x="{start:.1f}" y="{y + 4:.1f}" width="{end - start:.1f}" height="{_ROW - 8}" fill="{colour}"/>',
    ]
    if bar.interval:
        low, high = map(x, bar.interval)
        drawn.append(f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}" stroke="{_INK}" stroke-width="1.5"/>')
    if bar.ring is not None:
        drawn.append(f'<circle cx="{x(bar.ring):.1f}" cy="{middle:.1f}" r="5" fill="none" stroke="{_INK}"/>')
    return "\n".join([*drawn, _text(_WIDTH - _VALUES + 12, middle + 4, bar.figures)])


def number_of_cells(cells: int) -> str:
    """As people write it."""
    return "1 cell" if cells == 1 else f"{cells} cells"


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
