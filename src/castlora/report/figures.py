"""Geometry of the report's figures: from numbers to positions, without markup.

Horizontal positions are percentages of the figure's width and vertical ones are pixels, so that a figure stretches to
any screen while its lettering keeps its size.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from castlora.report.formatting import is_interval, is_number, number

Series = Sequence[tuple[int, float]]

MOST_POINTS = 300
_LIFT_LIMITS = (-0.5, 1.5)
_SHADE_LIMIT = 0.6
_MOST_LEVELS = 9
_SMALLEST = 1e-300
"""Numbers below it cannot be divided without a loss."""


@dataclass(frozen=True)
class Axis:
    """A linear scale.

    Attributes:
        low: The value at position 0.
        high: The value at position `length`; larger than `low`.
        length: Extent of the figure, 100 for percentages.
    """

    low: float
    high: float
    length: float = 100.0

    def position(self, value: float) -> float:
        """Returns where a value lies; values off the scale stop at its nearer end."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.length * min(1.0, max(0.0, share)), 2)


def lift_of(score: float | None, bare: float | None, retrained: float | None) -> float | None:
    """Returns (score − bare) / (retrained − bare), or None where retraining gains nothing."""
    if not (is_number(score) and is_number(bare) and is_number(retrained)) or retrained <= bare:
        return None
    lift = (score - bare) / (retrained - bare)
    return lift if math.isfinite(lift) else None


def lift_axis(values: Sequence[float]) -> Axis:
    """Returns a scale that shows 0 and 1 and, within limits, every value.

    The limits keep 0 and 1 at least half of the figure apart, however far off one value is.
    """
    lowest, highest = _LIFT_LIMITS
    return Axis(max(lowest, min(-0.04, *values, 0.0)), min(highest, max(1.04, *values, 1.0)))


@dataclass(frozen=True)
class LiftBar:
    """A bar from lift 0 to a lift, with its interval as a whisker.

    Attributes:
        start: Left end of the bar, in percent of the width.
        width: Width of the bar, in percent of the width.
        whisker: Ends of the interval, in percent of the width.
        off_scale: -1 or 1 where the lift lies beyond the left or the right end of the scale, else 0.
    """

    start: float
    width: float
    whisker: tuple[float, float] | None
    off_scale: int


def lift_bar(lift: float, bounds: tuple[float, float] | None, axis: Axis) -> LiftBar:
    """Places the bar of one lift and its interval on the scale."""
    zero, end = axis.position(0.0), axis.position(lift)
    whisker = (axis.position(bounds[0]), axis.position(bounds[1])) if is_interval(bounds) else None
    off_scale = -1 if lift < axis.low else int(lift > axis.high)
    return LiftBar(min(zero, end), round(abs(end - zero), 2), whisker, off_scale)


@dataclass(frozen=True)
class Line:
    """One line of the loss figure; a line of a single point is drawn as a dot.

    Attributes:
        points: Positions (percent of the width, pixels from the top).
        first: Value at the first step.
        last: Value at the last step.
    """

    name: str
    points: Sequence[tuple[float, float]]
    first: float
    last: float


@dataclass(frozen=True)
class LossFigure:
    """Lines over training steps.

    Attributes:
        lines: The loss, then its components.
        held_out: Positions of the held-out loss before and after training, as far as known.
        levels: Horizontal rules (pixels from the top, value).
        steps: First and last step.
        averaged: Steps behind each point drawn.
        left_out: Points without a finite value.
    """

    lines: Sequence[Line]
    held_out: Sequence[tuple[float, float]]
    levels: Sequence[tuple[float, str]]
    steps: tuple[int, int]
    averaged: int
    left_out: int


def loss_figure(
    series: Mapping[str, Series],
    held_out: tuple[float | None, float | None],
    height: float,
    logarithmic: bool = False,
) -> LossFigure | None:
    """Lays out loss curves and the held-out loss before and after.

    Args:
        series: Curves by name, each a sequence of (step, value) in order of steps.
        held_out: Held-out loss before and after training, drawn at the first and the last step.
        height: Height of the plot in pixels.
        logarithmic: Whether the vertical scale is; values of 0 and less are then left out.

    Returns:
        The figure, or None when no curve has a finite value.
    """

    def has_place(value: float | None) -> TypeGuard[float]:
        return is_number(value) and (value >= sys.float_info.min or not logarithmic)

    finite = {name: [point for point in points if has_place(point[1])] for name, points in series.items()}
    drawn = {name: points for name, points in finite.items() if points}
    if not drawn:
        return None
    averaged = max(math.ceil(len(points) / MOST_POINTS) for points in drawn.values())
    curves = {name: bucket_means(points, averaged) for name, points in drawn.items()}
    ends = [value for value in held_out if has_place(value)]
    values = [value for points in curves.values() for _, value in points] + ends
    levels = (log_levels if logarithmic else nice_levels)(min(values), max(values))
    steps = [step for points in drawn.values() for step, _ in points]
    first_step, last_step = min(steps), max(steps)
    # A single step has no extent: give it one, so that it lands in the middle.
    across = Axis(first_step, last_step) if last_step > first_step else Axis(first_step - 1, last_step + 1)
    scaled = math.log if logarithmic else float
    upward = Axis(scaled(levels[0]), scaled(levels[-1]), height)

    def down(value: float) -> float:
        return round(height - upward.position(scaled(value)), 2)

    return LossFigure(
        lines=[
            Line(name, [(across.position(step), down(value)) for step, value in points], points[0][1], points[-1][1])
            for name, points in curves.items()
        ],
        held_out=[(x, down(value)) for x, value in zip((0.0, 100.0), held_out, strict=True) if has_place(value)],
        levels=[(down(level), f"{level:.6g}".replace("-", "−")) for level in levels],
        steps=(first_step, last_step),
        averaged=averaged,
        left_out=sum(map(len, series.values())) - sum(map(len, finite.values())),
    )


def bucket_means(points: Series, size: int) -> list[tuple[float, float]]:
    """Averages every `size` neighbouring points, steps and values alike."""
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    return [(math.fsum(s for s, _ in b) / len(b), math.fsum(v / len(b) for _, v in b)) for b in buckets]


def nice_levels(low: float, high: float) -> list[float]:
    """Returns three to seven round values that enclose the range; from 0 when the range comes near it."""
    low, high = (0.0 if abs(end) < _SMALLEST else end for end in (low, high))
    if 0 <= low < 0.5 * high:
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.1 * abs(high) or 1.0
        low, high = low - margin, high + margin
    magnitude = 10.0 ** math.floor(math.log10(high - low))
    step = next(m * magnitude for m in (0.2, 0.25, 0.5, 1.0, 2.0) if (high - low) / (m * magnitude) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, last + 1)]


def log_levels(low: float, high: float) -> list[float]:
    """Returns round values that enclose a range above 0 on a logarithmic scale: 1, 2 and 5, or powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    # A logarithm is rounded, past the power that it is next to.
    first -= float(f"1e{first}") > low
    last += float(f"1e{last}") < high
    fine = [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in (1, 2, 5)]
    start = max(index for index, level in enumerate(fine) if level <= low)
    end = max(start + 1, min(index for index, level in enumerate(fine) if level >= high))
    if end - start < _MOST_LEVELS:
        return fine[start : end + 1]
    every = math.ceil((last - first + 1) / _MOST_LEVELS)
    return [10.0**power for power in range(first, last + every, every)]


@dataclass(frozen=True)
class HeatCell:
    """One cell of the heat map.

    Attributes:
        column: Source layer.
        text: Its value, as written in the cell.
        shade: Opacity of its fill, from 0 to the limit up to which the value stays readable on it.
        best: Whether it is marked: the paired source layer, or the one with the largest value.
    """

    column: int
    text: str
    shade: float
    best: bool


def heat_rows(matrix: Sequence[Sequence[float | None]], layer_map: Sequence[int] = ()) -> list[list[HeatCell]]:
    """Shades a matrix (target layers × source layers); values over 1 are scaled, short rows are filled up.

    Args:
        matrix: Weights or similarities; None and NaN where there is no value.
        layer_map: Column to be marked in each row; empty to mark the largest values.
    """
    width = max(map(len, matrix), default=0)
    known = [value for row in matrix for value in row if is_number(value)]
    largest = max([1.0, *known])
    rows = []
    for index, row in enumerate(matrix):
        best = max((value for value in row if is_number(value) and value > 0), default=None)
        marked = layer_map[index] if index < len(layer_map) else None
        cells = [
            HeatCell(
                column,
                _cell_text(value),
                round(_SHADE_LIMIT * max(0.0, value) / largest, 3),
                value == best if marked is None else column == marked,
            )
            if is_number(value)
            else HeatCell(column, "", 0.0, best=column == marked)
            for column, value in enumerate([*row, *[None] * (width - len(row))])
        ]
        rows.append(cells)
    return rows


def _cell_text(value: float) -> str:
    """Writes at most three characters where the value allows it: "0", ".97", "1"."""
    if value in (0, 1):
        return str(int(value))
    if 0 < value < 1:
        return f"{min(value, 0.99):.2f}"[1:]
    return number(value)
