"""Renders the results of the quality benchmark into a page of tables and a JSON summary."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from castlora.bench.methods import METHODS
from castlora.lift import Lift, lift_with_interval

REGIME_TITLES = {
    "none": "Weights alone",
    "general": "General text only",
    "format": "General text inside the adapter's prompt format",
    "prompts": "Unlabelled task prompts",
}
METHOD_ORDER = tuple(METHODS)
DEFAULT_METHOD = METHOD_ORDER[0]
COUNTABLE_POINTS = 20

INTRODUCTION = """
Measured on held-out test items that no training, transfer or selection has seen. Lift is (transferred − bare target) /
(retrained − bare target) with a bootstrap 95 % interval over items and seeds; ratio is transferred / retrained. A lift
is shown where retraining gains at least 5 points. `ridge start` is the default recipe: the closed-form maps are folded,
and the balanced factors trained. `maps` trains the maps themselves, `paper start` maps that are random at first,
`fresh` a plain LoRA; `any prompts` goes without the choice of filled prompts, `running text` reads general text as it
runs. `paper` is the paper's recipe as a whole, for the same number of steps, also with one of its two losses, and with
a small network beside each map (`nonlinear`, which no LoRA can hold). `synthetic data` trains a fresh LoRA on the
answers that source + LoRA writes, filtered by contrastive excess. Without training: `closed form` is the
fold of the closed-form maps and `Theseus` that of rotations, both scaled by the held-out objective; direct copy,
Cross-LoRA and LoRA-X read weights alone, with castlora's pairing of modules, and leave the target bare where they can
carry no module of a pair; `LoRA-X, constrained` trains its adapter on the task's labels in the form that the paper asks
for. Controls, which must carry nothing, move random maps, the closed form of positions paired at random, or the adapter
of another skill. The logit-delta oracle adds up the predictions of three models at inference, which no adapter
can do.
"""

References = dict[tuple[str, str], dict[str, Any]]
"""(pair, skill) → model → figures."""


@dataclass(frozen=True)
class Cell:
    """All seeds of one method on one pair, skill and text."""

    pair: str
    skill: str
    regime: str
    method: str
    seeds: int
    score: float
    nll: float
    lift: Lift


def read_results(folder: Path) -> tuple[References, list[dict[str, Any]]]:
    """References by (pair, skill), and all runs."""
    references, runs = {}, []
    for path in sorted(folder.rglob("*.json")):
        record = json.loads(path.read_text())
        if path.name == "references.json":
            references[record["pair"], record["skill"]] = record["references"]
        else:
            runs.append(record)
    return references, runs


def make_cells(references: References, runs: Iterable[dict[str, Any]]) -> list[Cell]:
    """Pools the seeds of every cell; the interval resamples items and seeds."""
    grouped: dict[tuple[str, str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        grouped[run["pair"], run["skill"], run["regime"], run["method"]].append(run)
    cells = []
    for (pair, skill, regime, method), group in sorted(grouped.items()):
        reference = references[pair, skill]
        lift = lift_with_interval(_items([reference["bare target"]]), _items(group), _items([reference["retrained"]]))
        score, nll = (float(np.mean([run[field] for run in group])) for field in ("score", "nll"))
        cells.append(Cell(pair, skill, regime, method, len(group), score, nll, lift))
    return cells


def render(references: References, runs: Sequence[dict[str, Any]], cells: Sequence[Cell]) -> str:
    """The page: references, one table per text regime, and the environment."""
    sections = ["# Results", _introduction(runs), "## What the models can do", _reference_table(references)]
    for regime, title in REGIME_TITLES.items():
        table = _regime_table([cell for cell in cells if cell.regime == regime])
        if table:
            sections += [f"## {title}", table]
    sections += ["## Mean lift by method", _mean_table(cells), "## Environment", _environment(runs)]
    return "\n\n".join(sections) + "\n"


def _items(group: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([[float(score) for score in run["scores"]] for run in group])


def _introduction(runs: Sequence[dict[str, Any]]) -> str:
    trained = [run["recipe"] for run in runs if "recipe" in run]
    steps = sorted({recipe["steps"] for recipe in trained})
    batches = sorted({recipe["batch_size"] for recipe in trained})
    return (
        f"{len(trained)} transfers of {_listed(steps)} steps × {_listed(batches)} passages, and "
        f"{len(runs) - len(trained)} without training. {' '.join(INTRODUCTION.split())}"
    )


def _reference_table(references: References) -> str:
    rows = ["| pair | skill | bare target | source + LoRA | retrained | to gain |", "|---|---|---|---|---|---|"]
    for (pair, skill), scores in references.items():
        values = [scores[name]["score"] for name in ("bare target", "source + LoRA", "retrained")]
        gain = 100 * (values[2] - values[0])
        note = "" if gain >= COUNTABLE_POINTS else " (under 20)"
        cells = " | ".join(f"{value:.3f}" for value in values)
        rows.append(f"| {arrow(pair)} | {skill} | {cells} | {gain:.0f} points{note} |")
    return "\n".join(rows)


def _regime_table(cells: Sequence[Cell]) -> str:
    methods = [method for method in METHOD_ORDER if any(cell.method == method for cell in cells)]
    if not methods:
        return ""
    rows = [f"| pair | skill | {' | '.join(methods)} |", "|---" * (2 + len(methods)) + "|"]
    for pair, skill in dict.fromkeys((cell.pair, cell.skill) for cell in cells):
        found = {cell.method: cell for cell in cells if (cell.pair, cell.skill) == (pair, skill)}
        rows.append(f"| {arrow(pair)} | {skill} | {' | '.join(_cell(found.get(method)) for method in methods)} |")
    return "Each cell: lift [95 % interval] · ratio · number of seeds.\n\n" + "\n".join(rows)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    if not cell.lift.countable or math.isnan(cell.lift.lift):
        return f"score {cell.score:.3f} (nothing to gain)"
    low, high = cell.lift.ci95
    return f"{cell.lift.lift:.2f} [{low:.2f}, {high:.2f}] · {cell.lift.ratio:.2f} · {cell.seeds}"


def _mean_table(cells: Sequence[Cell]) -> str:
    rows = [
        "| text | method | cells | mean lift | mean ratio | lift above the default's on the same cells |",
        "|---|---|---|---|---|---|",
    ]
    for regime, title in REGIME_TITLES.items():
        countable = [cell for cell in cells if cell.regime == regime and cell.lift.countable]
        default = {(c.pair, c.skill): c.lift.lift for c in countable if c.method == DEFAULT_METHOD}
        for method in METHOD_ORDER:
            group = [cell for cell in countable if cell.method == method]
            if not group:
                continue
            lift, ratio = np.mean([c.lift.lift for c in group]), np.mean([c.lift.ratio for c in group])
            above = [c.lift.lift - default[c.pair, c.skill] for c in group if (c.pair, c.skill) in default]
            compared = f"{np.mean(above):+.2f} ({len(above)})" if above and method != DEFAULT_METHOD else "–"
            rows.append(f"| {title} | {method} | {len(group)} | {lift:.2f} | {ratio:.2f} | {compared} |")
    return "Means are over the cells that have been run; the last column compares like with like.\n\n" + "\n".join(rows)


def _environment(runs: Sequence[dict[str, Any]]) -> str:
    commits = _listed(sorted({run["environment"]["commit"][:10] for run in runs}))
    machines = _listed(sorted({run["environment"]["machine"] for run in runs}))
    packages = {f"{k} {v}" for run in runs for k, v in run["environment"]["versions"].items()}
    seeds = _listed(sorted({run["seed"] for run in runs}))
    return f"Commits {commits}; seeds {seeds}; {machines}; {_listed(sorted(packages))}."


def _summary(cell: Cell) -> dict[str, Any]:
    fields = ("pair", "skill", "regime", "method", "seeds", "score", "nll")
    lift = {"lift": cell.lift.lift, "lift_ci95": cell.lift.ci95, "ratio": cell.lift.ratio}
    return {**{field: vars(cell)[field] for field in fields}, **lift, "countable": cell.lift.countable}


def arrow(pair: str) -> str:
    """SOURCE:TARGET as people read it."""
    return pair.replace(":", " → ")


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def write_page(results: Path, page: Path) -> list[Cell]:
    """Writes the tables of a folder of results, and beside the folder a summary of its cells as JSON.

    Args:
        results: folder of the runs
        page: Markdown file to write

    Returns:
        all cells
    """
    references, runs = read_results(results)
    cells = make_cells(references, runs)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(references, runs, cells), encoding="utf-8")
    summary = [_summary(cell) for cell in cells]
    results.with_name(f"{results.name}-summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return cells
