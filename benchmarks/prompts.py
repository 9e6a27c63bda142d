"""Lift against the number of prompts that a user has, with variants of them and without.

    python -m benchmarks.prompts --tasks TASKS

Runs that are already there are skipped. The records are rendered into docs.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import auto_cli
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality import ZOO, zoo_models
from benchmarks.zoo.specs import GRID_SKILLS
from castlora.bench.grid import Cell, Settings, record_path, write_missing
from castlora.bench.plots import Curve, curve_chart
from castlora.bench.quality import reference_scores
from castlora.bench.results import PooledCell, compare, make_cells, read_results
from castlora.bench.spec import BenchmarkSpec
from castlora.bench.tables import arrow, mean_with_interval, measured_with
from castlora.bench.trained import Distilled
from castlora.config import DEFAULT, Tuning
from castlora.text.passages import read_prompts

Taken = Literal["with variants", "as given"]
"""How prompts that are few are taken."""
METHODS: dict[Taken, Distilled] = {
    "with variants": Distilled("default", "ridge"),
    "as given": Distilled("default", "ridge", Tuning(fewest_prompts=0)),
}
COUNTS = (64, 16, 256, 1000)
"""Numbers of prompts, in the order in which they are run."""
TUNED_ON = ("llama-s:mistral-s", "gpt2-s:gpt2-m")
"""Pairs on which it was chosen how many variants there are, and how many of their words are exchanged."""
OTHERS, COUNTS_OF_OTHERS = ("llama-s:llama-m", "llama-m:llama-s"), (64,)
_STEPS, _BATCH, _PASSAGES, _MAX_LENGTH = 800, 4, 1000, 96
"""As in the grid."""


@dataclass(frozen=True)
class Run:
    """One transfer from a file of some prompts."""

    cell: Cell
    count: int
    taken: Taken

    @property
    def name(self) -> str:
        """Of its record."""
        return method_name(self.count, self.taken)


def method_name(count: int, taken: Taken) -> str:
    """What the records call a number of prompts and how they were taken."""
    return f"{count} prompts {taken}"


def _counts(cells: Mapping[str, list[PooledCell]]) -> list[int]:
    """The numbers of prompts in the names of some records."""
    return sorted({int(name.split()[0]) for name in cells})


def planned_runs(pairs: Sequence[str], skills: Sequence[str], counts: Sequence[int]) -> Iterator[Run]:
    """Every run; prompts that are enough have no variants."""
    for count, pair, skill, taken in product(counts, pairs, skills, METHODS):
        if pair not in TUNED_ON and count not in COUNTS_OF_OTHERS:
            continue
        if taken == "as given" or count < DEFAULT.fewest_prompts:
            yield Run(Cell(pair, skill, "prompts", 0), count, taken)


def run_missing(spec: BenchmarkSpec, out: Path, runs: Sequence[Run]) -> None:
    """Runs what is missing, one JSON file per run."""
    for run in tqdm(runs, desc="runs", unit="run"):
        cell, path = run.cell, record_path(out, run.cell, run.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_missing(path.with_name("references.json"), partial(reference_scores, spec, cell.pair, cell.skill))
        write_missing(path, partial(transfer_from, spec, run))


def transfer_from(spec: BenchmarkSpec, run: Run) -> dict[str, Any]:
    """The record of one run."""
    with tempfile.TemporaryDirectory() as folder:
        of_few = replace(spec, tasks=folder)
        given = write_few_prompts(Path(spec.tasks) / run.cell.skill, Path(folder) / run.cell.skill, run.count)
        settings = Settings(of_few, _STEPS, _BATCH, _PASSAGES, _MAX_LENGTH, _MAX_LENGTH)
        result = METHODS[run.taken].run(settings, run.cell)
    cell = run.cell
    fields = {"pair": cell.pair, "skill": cell.skill, "regime": cell.regime, "seed": cell.seed, "method": run.name}
    return {**fields, "prompts": given, **result}


def write_few_prompts(skill: Path, out: Path, count: int) -> int:
    """Files of a skill of which only some prompts are left; tells how many."""
    out.mkdir()
    (out / "test.jsonl").symlink_to((skill / "test.jsonl").resolve())
    prompts = read_prompts(str(skill / "prompts.jsonl"), count, seed=0)
    lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (out / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(prompts)


def render(cells: Mapping[str, list[PooledCell]], runs: Sequence[dict[str, Any]], chart: str) -> str:
    """The page.

    Args:
        cells: pairs and skills by the name of the records
        runs: all records
        chart: file name of the chart
    """
    tuned_on, others = _of_pairs(cells, is_tuned_on=True), _of_pairs(cells, is_tuned_on=False)
    skills = ", ".join(sorted({run["skill"] for run in runs}))
    introduction = (
        f"Mean lift of the default recipe from closed-form maps, {_STEPS} steps of {_BATCH}, seed 0, by the number of "
        "unlabelled prompts that are given, of which a fifth, at most 64, are held out (operations have 924 in all); "
        f"intervals are bootstrap 95 % over pairs and skills ({skills}). `as given` learns from these alone. By "
        f"default prompts below {DEFAULT.fewest_prompts} are filled up with variants of themselves, in which up to "
        "half of the words come from other prompts, and source + LoRA answers them too "
        "([how](how-it-works.md#few-prompts))."
    )
    parts = ["# Lift against the number of prompts", introduction, f"![Number of prompts against lift]({chart})"]
    parts += [f"{_pairs(tuned_on)}:", _table(tuned_on)]
    if others:
        parts += [
            f"How many variants there are and how many of their words are exchanged was chosen on these pairs. On "
            f"{_pairs(others)}, which took no part in that:",
            _table(others),
        ]
    parts += ["## By pair and skill", _each(cells), "## Environment", measured_with(runs)]
    return "\n\n".join(parts) + "\n"


def _of_pairs(cells: Mapping[str, list[PooledCell]], is_tuned_on: bool) -> dict[str, list[PooledCell]]:
    kept = {name: [cell for cell in found if (cell.pair in TUNED_ON) == is_tuned_on] for name, found in cells.items()}
    return {name: found for name, found in kept.items() if found}


def _pairs(cells: Mapping[str, list[PooledCell]]) -> str:
    return ", ".join(map(arrow, sorted({cell.pair for found in cells.values() for cell in found})))


def _table(cells: Mapping[str, list[PooledCell]]) -> str:
    heads = ["| prompts | as given | with variants | variants add [95 %], ahead and behind |", "|---|---|---|---|"]
    return "\n".join([*heads, *(_row(cells, count) for count in _counts(cells))])


def _each(cells: Mapping[str, list[PooledCell]]) -> str:
    heads = _heads(cells)
    places = sorted({(cell.pair, cell.skill) for found in cells.values() for cell in found})
    rows = ["| pair | skill | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    return "\n".join([*rows, *(_places_row(cells, pair, skill) for pair, skill in places)])


def _row(cells: Mapping[str, list[PooledCell]], count: int) -> str:
    as_given, varied = (cells.get(method_name(count, taken), []) for taken in ("as given", "with variants"))
    comparison = compare(varied, as_given)
    if comparison is None:
        return f"| {count} | {_mean(as_given)} | {_mean(varied)} | – |"
    low, high = comparison.ci95
    gain = f"{comparison.above:+.2f} [{low:+.2f}, {high:+.2f}], {comparison.ahead} and {comparison.behind}"
    return f"| {count} | {_mean(as_given)} | {_mean(varied)} | {gain} |"


def _mean(cells: Sequence[PooledCell]) -> str:
    return mean_with_interval([cell.lift.lift for cell in cells]) if cells else "–"


def _heads(cells: Mapping[str, list[PooledCell]]) -> list[str]:
    ordered = [method_name(count, taken) for count in _counts(cells) for taken in ("as given", "with variants")]
    return [name for name in ordered if name in cells]


def _places_row(cells: Mapping[str, list[PooledCell]], pair: str, skill: str) -> str:
    lifts = [
        next((f"{cell.lift.lift:.2f}" for cell in cells[name] if (cell.pair, cell.skill) == (pair, skill)), "–")
        for name in _heads(cells)
    ]
    return f"| {arrow(pair)} | {skill} | " + " | ".join(lifts) + " |"


def curves(cells: Mapping[str, list[PooledCell]]) -> list[Curve]:
    """A curve for each way to take the prompts; both end in the same point where prompts need no variants."""
    lines = []
    for taken in METHODS:
        points = []
        for count in _counts(cells):
            of_count = cells.get(method_name(count, taken if count < DEFAULT.fewest_prompts else "as given"), [])
            if of_count:
                points.append((count, float(np.mean([cell.lift.lift for cell in of_count]))))
        if points:
            lines.append(Curve(taken, points))
    return lines


def main(
    tasks: Path,
    out: Path = Path("benchmarks/results/prompts"),
    page: Path = Path("docs/prompts.md"),
    third_party: Path = Path("../shared/data/models"),
    pairs: Sequence[str] = TUNED_ON + OTHERS,
    skills: Sequence[str] = GRID_SKILLS,
    counts: Sequence[int] = COUNTS,
) -> None:
    """Runs what is missing, and renders all that is there.

    Args:
        tasks: folder of task files, one folder per skill
        out: folder of the results
        page: Markdown file to write; the chart goes beside it
        third_party: folder of models that the zoo does not hold
        pairs: SOURCE:TARGET, each; those that nothing was chosen on are run with some of the numbers
        skills: names of skills
        counts: numbers of prompts
    """
    torch.set_num_threads(1)
    disable_progress_bar()
    spec = BenchmarkSpec(zoo_models(ZOO, third_party), list(pairs), list(skills), str(tasks))
    run_missing(spec, out, list(planned_runs(pairs, skills, counts)))
    references, runs = read_results(out)
    cells: dict[str, list[PooledCell]] = {}
    for cell in make_cells(references, runs):
        cells.setdefault(cell.method, []).append(cell)
    chart = page.with_suffix(".svg")
    chart.write_text(curve_chart(curves(_of_pairs(cells, is_tuned_on=True)), "prompts", "lift"), encoding="utf-8")
    page.write_text(render(cells, runs, chart.name), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
