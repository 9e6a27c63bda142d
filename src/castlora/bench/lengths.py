"""Lift against the number of steps: the benchmark at several lengths, and what a page shows of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castlora.bench.grid import Settings
from castlora.bench.methods import depends_on_steps
from castlora.bench.plots import DISTINCT_LINES, Curve, curve_chart, number_of_cells
from castlora.bench.quality import hold_to_settings, possible_methods, run_quality
from castlora.bench.results import METHOD_ORDER, MeanLift, make_cells, mean_lifts, read_results
from castlora.bench.spec import BenchmarkSpec
from castlora.bench.tables import REGIME_TITLES, arrow, image, measured_with
from castlora.config import Regime
from castlora.execution.run_directory import write_whole

Run = dict[str, Any]
"""A record."""


@dataclass(frozen=True)
class Lengths:
    """What runs of several lengths have in common."""

    means: dict[int, list[MeanLift]]
    """By number of steps, of the methods that train."""
    runs: list[Run]
    """The runs that the means are of."""

    @classmethod
    def read(cls, folder: Path) -> "Lengths":
        """Reads a folder of results per number of steps.

        A method's means are over the pairs, skills and seeds that it was run on at all lengths at which it was run, so
        that its points differ in nothing else.
        """
        found = {steps: read_results(folder / str(steps)) for steps in lengths_in(folder)}
        common = _in_common(runs for _, runs in found.values())
        means, kept = {}, []
        for steps, (references, runs) in found.items():
            shared = [run for run in runs if depends_on_steps(run["method"]) and _place(run) in common[_line(run)]]
            means[steps] = mean_lifts(make_cells(references, shared))
            kept += shared
        return cls(means, kept)

    def under(self, regime: Regime) -> dict[int, dict[str, MeanLift]]:
        """Means with one text, by number of steps and method."""
        by_method = {
            steps: {mean.method: mean for mean in means if mean.regime == regime} for steps, means in self.means.items()
        }
        return {steps: of_steps for steps, of_steps in by_method.items() if of_steps}


def lengths_in(folder: Path) -> list[int]:
    """Numbers of steps of which a folder holds results, ascending."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def run_lengths(
    spec: BenchmarkSpec, out: Path, methods: Sequence[str] | None, seeds: int, lengths: Sequence[int], batch_size: int
) -> None:
    """Runs what is missing of the grid at several numbers of steps, the greatest first.

    Methods that do not depend on it are run at the greatest of the folder alone, and references are measured once.

    Args:
        spec: models, pairs, skills, regimes and text
        out: folder of the results, one folder per number of steps
        methods: names of methods; by default all that the files of the skills allow
        seeds: number of seeds
        lengths: numbers of optimizer steps
        batch_size: passages per step

    Raises:
        UserError: as of `run_quality`.
    """
    held = lengths_in(out)
    for steps in held:
        hold_to_settings(Settings(spec, steps, batch_size), out / str(steps))
    longest = max([*lengths, *held])
    for steps in sorted({*lengths, longest}, reverse=True):
        due = [
            name
            for name in methods or possible_methods(spec)
            if (steps in lengths if depends_on_steps(name) else steps == longest)
        ]
        if due:
            _copy_references(out, out / str(steps))
            run_quality(spec, out / str(steps), due, seeds, steps, batch_size)


def _copy_references(out: Path, folder: Path) -> None:
    for references in out.glob("*/*/*/references.json"):
        beside = folder / Path(*references.parts[-3:])
        if not beside.exists():
            beside.parent.mkdir(parents=True, exist_ok=True)
            write_whole(beside, references.read_bytes())


def steps_section(lengths: Lengths, name: str) -> tuple[str, dict[str, str]]:
    """Steps against lift as a section of a page, and the charts that go beside it.

    Args:
        lengths: what was measured
        name: what file names of charts begin with

    Returns:
        Markdown and SVG by file name, both empty where nothing was trained at two lengths
    """
    sections, charts = [], {}
    for regime, title in REGIME_TITLES.items():
        found = lengths.under(regime)
        if drawn := _curves(found):
            chart = f"{name}-steps-{regime}.svg"
            charts[chart] = curve_chart(drawn[:DISTINCT_LINES], "optimizer steps", "lift")
            more = f" The chart has the first {DISTINCT_LINES} methods." if len(drawn) > DISTINCT_LINES else ""
            sections += [f"### {title}", f"{image(f'{title}: steps against lift', chart)}{more}", _table(found, drawn)]
    if not sections:
        return "", {}
    note = (
        "Every point is a training of its own, whose learning rate falls to zero at its end: a mean lift, in the "
        "tables with a bootstrap 95 % interval over pairs and skills. A line is of the pairs, skills and seeds that "
        "its method was run on at all of its lengths."
    )
    return "\n\n".join([note, *sections, f"{_measured_on(lengths.runs)} {measured_with(lengths.runs)}"]), charts


def _measured_on(runs: Sequence[Run]) -> str:
    pairs, skills = (", ".join(sorted({run[name] for run in runs})) for name in ("pair", "skill"))
    batches = ", ".join(map(str, sorted({run["recipe"]["batch_size"] for run in runs})))
    return f"Pairs {arrow(pairs)}; skills {skills}; batches of {batches}."


def _curves(found: Mapping[int, Mapping[str, MeanLift]]) -> list[Curve]:
    """A curve per method that was run at two lengths or more."""
    curves = []
    for method in METHOD_ORDER:
        points = [(steps, means[method].lift) for steps, means in found.items() if method in means]
        if len(points) > 1:
            curves.append(Curve(method, points))
    return curves


def _table(found: Mapping[int, Mapping[str, MeanLift]], drawn: Sequence[Curve]) -> str:
    methods = [curve.name for curve in drawn]
    cells = {method: number_of_cells(mean.cells) for means in found.values() for method, mean in means.items()}
    rows = [
        f"| steps | {' | '.join(f'{method} ({cells[method]})' for method in methods)} |",
        "|---" * (1 + len(methods)) + "|",
    ]
    for steps, means in found.items():
        rows.append(f"| {steps} | {' | '.join(_figure(means.get(method)) for method in methods)} |")
    return "\n".join(rows)


def _figure(mean: MeanLift | None) -> str:
    if mean is None:
        return "–"
    low, high = mean.ci95
    return f"{mean.lift:z.2f} [{low:z.2f}, {high:z.2f}]" if mean.cells > 1 else f"{mean.lift:z.2f}"


def _line(run: Run) -> tuple[str, str]:
    return run["regime"], run["method"]


def _place(run: Run) -> tuple[str, str, int]:
    return run["pair"], run["skill"], run["seed"]


def _in_common(lengths: Iterable[Sequence[Run]]) -> dict[tuple[str, str], set[tuple[str, str, int]]]:
    """Where each line was run at every length at which it was run at all."""
    common: dict[tuple[str, str], set[tuple[str, str, int]]] = {}
    for runs in lengths:
        places: dict[tuple[str, str], set[tuple[str, str, int]]] = {}
        for run in runs:
            places.setdefault(_line(run), set()).add(_place(run))
        for line, here in places.items():
            common[line] = common.get(line, here) & here
    return common
