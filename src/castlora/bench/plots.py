"""The chart of the benchmark: mean lift of each method with its interval, drawn as SVG."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby

from castlora.bench.results import DEFAULT_METHOD, MeanLift
from castlora.config import Regime

_WIDTH, _ROW, _TITLE, _MARGIN = 860, 24, 34, 16
_NAMES, _VALUES = 250, 130
"""Room in pixels for the names on the left and the figures on the right of the bars."""
_DEFAULT_COLOUR, _OTHER_COLOUR, _INK, _FAINT = "#0b6e75", "#8c959f", "#1f2328", "#d0d7de"


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
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="Mean lift by method" font-family="system-ui, sans-serif" font-size="13">\n'
        f'<rect width="{_WIDTH}" height="{height:.0f}" fill="#ffffff"/>\n' + "\n".join([*lines, *parts]) + "\n</svg>\n"
    )


def _bar(mean: MeanLift, zero: float, end: float, low: float, high: float, y: float) -> str:
    colour = _DEFAULT_COLOUR if mean.method == DEFAULT_METHOD else _OTHER_COLOUR
    middle = y + _ROW / 2
    plural = "cell" if mean.cells == 1 else "cells"
    figures = f"{mean.lift:.2f} ({mean.cells} {plural})"
    return "\n".join(
        [
            _text(_NAMES - 10, middle + 4, mean.method, anchor="end"),
            f'<rect x="{min(zero, end):.1f}" y="{y + 4:.1f}" width="{abs(end - zero):.1f}" height="{_ROW - 8}" '
            f'fill="{colour}"/>',
            f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}" stroke="{_INK}" stroke-width="1.5"/>',
            _text(_WIDTH - _VALUES + 12, middle + 4, figures),
        ]
    )


def _mark(x: float, height: float, label: str) -> str:
    line = f'<path d="M{x:.1f} {_MARGIN}V{height:.1f}" stroke="{_FAINT}" stroke-dasharray="4 3"/>'
    return line + "\n" + _text(x, height + 18, label, anchor="middle")


def _text(x: float, y: float, text: str, anchor: str = "start", weight: int = 400) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{_INK}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )
