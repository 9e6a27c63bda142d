"""Renders the results of the quality benchmark into a page of tables and a JSON summary."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from castlora.bench.parts import MeasuredPart, measured_parts
from castlora.bench.plots import drift_chart, lift_chart, parts_chart
from castlora.bench.results import (
    METHOD_ORDER,
    Comparison,
    Drift,
    PooledCell,
    References,
    drifts,
    make_cells,
    mean_lifts,
    read_results,
    reference_method,
)
from castlora.config import Regime
from castlora.lift import bootstrap_interval

REGIME_TITLES: dict[Regime, str] = {
    "none": "Weights alone",
    "general": "General text only",
    "format": "General text inside the adapter's prompt format",
    "prompts": "Unlabelled task prompts",
}
COUNTABLE_POINTS = 20
INTRODUCTION = """
Measured on held-out test items that no training, transfer or selection has seen. Lift is (transferred − bare target) /
(retrained − bare target) with a bootstrap 95 % interval over items and seeds; ratio is transferred / retrained. A lift
is shown where retraining gains at least 5 points. `default` is the default recipe: a LoRA is trained, and the target
rehearses text that it wrote itself before. With unlabelled prompts, 400 steps or more and a target of other shapes than
the source's it is a plain LoRA, as in `fresh, rehearsed`; else it starts from the closed-form maps, folded and
balanced, as in `ridge start, rehearsed`. With `prompts taught` the
tokens of the prompts count too, a tenth as much as those of the answers; with `hidden states` final hidden states are
taught beside the answers, those inside prompts included.
Of the other methods `default, last layer solved` rehearses and what has `rehearsed` in its name; `ridge start` goes
from the closed-form maps without it, and
`readout start` has the target's last layer solved for what source + LoRA predicts. `maps` trains the maps themselves,
`paper start` maps that are random at first, `fresh` a plain LoRA. To a target of the source's shapes closed-form starts
that general text teaches are the adapter as it is where held-out text has that nearer to source + LoRA.
General text alone is put into the prompt formats that the adapter listens to, one to three
sentences each, of which the most telling of 32 is kept; with `single sentences` one sentence, of 8; `generic formats`
puts these into common formats instead, `any prompts` goes without the choice, and `running text` reads general text as
it runs. `paper` is the paper's recipe as a whole, for the same number of steps, also with one of its two
losses, and with a small network beside each map (`nonlinear`, which no LoRA can hold; `distilled`, a plain LoRA that
learns what such a target predicts). `synthetic data` trains a fresh
LoRA on the answers that source + LoRA writes, filtered by contrastive excess. Without training: `closed form` is the
fold of the closed-form maps and `Theseus` that of rotations, both scaled by the held-out objective; `last layer
solved` adds to the former the last layer of `readout start`; `bridge` is a fold with maps that are fitted once for a
pair, on general text, and draw towards the identity where target and source are related; direct copy,
Cross-LoRA and LoRA-X read weights alone, with castlora's pairing of modules, and leave the target bare where they can
carry no module of a pair; `LoRA-X, constrained` trains its adapter on the task's labels in the form that the paper asks
for. Controls, which must carry nothing, move random maps, the closed form of positions paired at random, or the adapter
of another skill. The logit-delta oracle adds up the predictions of three models at inference, which no adapter can do.
"""


def render(
    references: References,
    runs: Sequence[dict[str, Any]],
    cells: Sequence[PooledCell],
    name: str,
    steps: str = "",
) -> tuple[str, dict[str, str]]:
    """The page, and the charts that go beside it.

    Args:
        references: what methods are compared with
        runs: records of the runs
        cells: the runs, pooled
        name: what file names of charts begin with
        steps: a section on steps against lift

    Returns:
        Markdown, and SVG by file name
    """
    charts = {f"{name}.svg": lift_chart(mean_lifts(cells), REGIME_TITLES, reference_method(cells))}
    sections = ["# Results", _introduction(runs), "## What the models can do", _reference_table(references)]
    for regime, title in REGIME_TITLES.items():
        table = _regime_table([cell for cell in cells if cell.regime == regime])
        if table:
            sections += [f"## {title}", table]
    sections += ["## Mean lift by method", image("Mean lift by method", f"{name}.svg"), _mean_table(cells)]
    if steps:
        sections += ["## Steps against lift", steps]
    if parts := measured_parts(cells):
        chart = f"{name}-parts.svg"
        charts[chart] = parts_chart(parts, REGIME_TITLES)
        sections += ["## What each part adds", image("Lift that each part adds", chart), _parts_table(parts)]
    if measured := drifts(references, cells):
        chart = f"{name}-drift.svg"
        charts[chart] = drift_chart(measured, REGIME_TITLES)
        sections += ["## General ability", image("Perplexity on general text", chart), _drift_table(measured)]
    sections += ["## Environment", measured_with(runs)]
    return "\n\n".join(sections) + "\n", charts


def image(title: str, file: str) -> str:
    """A chart beside a page."""
    return f"![{title}]({file})"


def _introduction(runs: Sequence[dict[str, Any]]) -> str:
    trained = [run["recipe"] for run in runs if run.get("recipe", {}).get("steps")]
    steps = sorted({recipe["steps"] for recipe in trained})
    batches = sorted({recipe["batch_size"] for recipe in trained})
    return (
        f"{len(trained)} transfers of {_listed(steps)} steps × {_listed(batches)} passages, and "
        f"{len(runs) - len(trained)} without training. {' '.join(INTRODUCTION.split())}"
    )


def _reference_table(references: References) -> str:
    rows = [
        "| pair | skill | bare target | source + LoRA | retrained | to gain | lift of source + LoRA |",
        "|---|---|---|---|---|---|---|",
    ]
    lifts = []
    for (pair, skill), scores in references.items():
        bare, teacher, retrained = (scores[name]["score"] for name in ("bare target", "source + LoRA", "retrained"))
        gain = retrained - bare
        note, written = " (under 20)", "–"
        if 100 * gain >= COUNTABLE_POINTS:
            lifts.append((teacher - bare) / gain)
            note, written = "", f"{lifts[-1]:.2f}"
        scores_written = f"{bare:.3f} | {teacher:.3f} | {retrained:.3f}"
        rows.append(f"| {arrow(pair)} | {skill} | {scores_written} | {100 * gain:.0f} points{note} | {written} |")
    mean = f"; its mean is {sum(lifts) / len(lifts):.2f}" if lifts else ""
    return "\n".join([f"The last column is the lift that a perfect copy of source + LoRA would have{mean}.", "", *rows])


def _regime_table(cells: Sequence[PooledCell]) -> str:
    methods = [method for method in METHOD_ORDER if any(cell.method == method for cell in cells)]
    if not methods:
        return ""
    rows = [f"| pair | skill | {' | '.join(methods)} |", "|---" * (2 + len(methods)) + "|"]
    for pair, skill in dict.fromkeys((cell.pair, cell.skill) for cell in cells):
        found = {cell.method: cell for cell in cells if (cell.pair, cell.skill) == (pair, skill)}
        rows.append(f"| {arrow(pair)} | {skill} | {' | '.join(_cell(found.get(method)) for method in methods)} |")
    return "Each cell: lift [95 % interval] · ratio · number of seeds.\n\n" + "\n".join(rows)


def _cell(cell: PooledCell | None) -> str:
    if cell is None:
        return "–"
    if not cell.lift.countable or math.isnan(cell.lift.lift):
        return f"score {cell.score:.3f} (nothing to gain)"
    low, high = cell.lift.ci95
    return f"{cell.lift.lift:z.2f} [{low:z.2f}, {high:z.2f}] · {cell.lift.ratio:.2f} · {cell.seeds}"


def _mean_table(cells: Sequence[PooledCell]) -> str:
    rows = [
        f"| text | method | cells | mean lift | mean ratio | above `{reference_method(cells)}`, same cells and seeds | "
        "ahead, behind |",
        "|---|---|---|---|---|---|---|",
    ]
    for mean in mean_lifts(cells):
        low, high = mean.ci95
        compared = "– | –" if mean.comparison is None else _comparison(mean.comparison)
        lift = f"{mean.lift:z.2f} [{low:z.2f}, {high:z.2f}]" if mean.cells > 1 else f"{mean.lift:z.2f}"
        title = REGIME_TITLES[mean.regime]
        rows.append(f"| {title} | {mean.method} | {mean.cells} | {lift} | {mean.ratio:.2f} | {compared} |")
    note = (
        "Means are over the cells that have been run, with a bootstrap 95 % interval over pairs and skills; the last "
        "columns compare like with like, as does a ring in the chart, where a method was run on fewer cells."
    )
    return "\n".join([note, "", *rows])


def _comparison(comparison: Comparison) -> str:
    low, high = comparison.ci95
    interval = f" [{low:+z.2f}, {high:+z.2f}]" if comparison.cells > 1 else ""
    return f"{comparison.above:+z.2f}{interval} ({comparison.cells}) | {comparison.ahead}, {comparison.behind}"


def _parts_table(parts: Sequence[MeasuredPart]) -> str:
    note = (
        "Each row changes one thing and compares lift on the same cells and seeds, with a bootstrap 95 % interval over "
        "pairs and skills; ahead and behind count cells. The chart has the same numbers."
    )
    rows = [note, "", "| part | text | lift added, cells | ahead, behind |", "|---|---|---|---|"]
    for part in parts:
        rows.append(f"| {part.part.change} | {REGIME_TITLES[part.part.regime]} | {_comparison(part.added)} |")
    return "\n".join(rows)


def _drift_table(measured: Sequence[Drift]) -> str:
    rows = [
        "| text | method | cells | perplexity ÷ bare target's | retrained ÷ bare target's |",
        "|---|---|---|---|---|",
    ]
    for drift in measured:
        title = REGIME_TITLES[drift.regime]
        rows.append(f"| {title} | {drift.method} | {drift.cells} | {drift.perplexity:.2f} | {drift.retrained:.2f} |")
    note = (
        "Perplexity on held-out general text, geometric means over cells: what an adapter does to all that it was not "
        "made for, beside what retraining on the task does (in the chart, the rings)."
    )
    return "\n".join([note, "", *rows])


def measured_with(runs: Sequence[dict[str, Any]]) -> str:
    """Commits, seeds, machines and versions of some runs, as a sentence."""
    commits = _listed(sorted({run["environment"]["commit"][:10] for run in runs}))
    machines = _listed(sorted({run["environment"]["machine"] for run in runs}))
    packages = {f"{k} {v}" for run in runs for k, v in run["environment"]["versions"].items()}
    seeds = _listed(sorted({run["seed"] for run in runs}))
    return f"Commits {commits}; seeds {seeds}; {machines}; {_listed(sorted(packages))}."


def _summary(cell: PooledCell) -> dict[str, Any]:
    fields = ("pair", "skill", "regime", "method", "seeds", "score", "nll")
    lift = {"lift": cell.lift.lift, "lift_ci95": cell.lift.ci95, "ratio": cell.lift.ratio}
    rest = {"countable": cell.lift.countable, "text_loss_added": cell.text_loss_added}
    return {**{field: vars(cell)[field] for field in fields}, **lift, **rest}


def mean_with_interval(lifts: Sequence[float]) -> str:
    """Mean of the lifts of some pairs and skills, with a bootstrap 95 % interval over these."""
    low, high = bootstrap_interval(np.array(lifts))
    return f"{np.mean(lifts):.2f} [{low:.2f}, {high:.2f}]"


def arrow(pair: str) -> str:
    """SOURCE:TARGET as people read it."""
    return pair.replace(":", " → ")


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def write_page(
    results: Path, page: Path, steps: tuple[str, Mapping[str, str]] = ("", {})
) -> tuple[References, list[PooledCell]]:
    """Writes the tables and the charts of a folder of results, and beside the folder a summary of its cells as JSON.

    Args:
        results: folder of the runs
        page: Markdown file to write
        steps: a section on steps against lift, and its charts by file name

    Returns:
        what methods are compared with, and all cells
    """
    references, runs = read_results(results)
    cells = make_cells(references, runs)
    section, charts_of_steps = steps
    text, charts = render(references, runs, cells, page.stem, section)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    for name, chart in {**charts, **charts_of_steps}.items():
        page.with_name(name).write_text(chart, encoding="utf-8")
    summary = [_summary(cell) for cell in cells]
    results.with_name(f"{results.name}-summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return references, cells
