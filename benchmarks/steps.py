"""Lift against the number of steps, by what is known about the task.

    python -m benchmarks.steps --tasks TASKS --text CORPUS/train-05.jsonl.gz

Each number of steps is a run of its own, with a schedule of its own; runs that are already there are skipped. The
records are rendered into docs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality import ZOO, zoo_models
from castlora.bench.plots import Curve, curve_chart
from castlora.bench.quality import run_quality
from castlora.bench.results import MeanLift, make_cells, mean_lifts, read_results
from castlora.bench.spec import BenchmarkSpec
from castlora.bench.tables import REGIME_TITLES, measured_with

Known = Literal["general", "format", "prompts"]
"""What is known about the task."""
STEPS = (50, 100, 200, 400, 800)
PAIRS = ("llama-s:mistral-s", "gpt2-s:gpt2-m")
SKILLS = ("question-type", "operation")
METHODS: dict[Known, tuple[str, ...]] = {
    "general": ("default", "ridge start", "fresh"),
    "format": ("default", "ridge start", "fresh"),
    "prompts": (
        "default", "default, last layer solved", "fresh, rehearsed", "ridge start", "readout start", "fresh",
        "paper start",
    ),
}  # fmt: skip
_BATCH = 4


@dataclass(frozen=True)
class Found:
    """What a folder of records holds."""

    means: dict[int, list[MeanLift]]
    """By number of steps."""
    runs: list[dict[str, Any]]

    @classmethod
    def read(cls, out: Path) -> "Found":
        """The means and all records."""
        means, records = {}, []
        for folder in sorted(out.iterdir(), key=lambda folder: int(folder.name)):
            references, runs = read_results(folder)
            means[int(folder.name)] = mean_lifts(make_cells(references, runs))
            records += runs
        return cls(means, records)

    def under(self, regime: Known) -> dict[int, dict[str, MeanLift]]:
        """Means with one text, by number of steps and method."""
        by_method = {
            steps: {mean.method: mean for mean in means if mean.regime == regime} for steps, means in self.means.items()
        }
        return {steps: of_steps for steps, of_steps in by_method.items() if of_steps}


def render(found: Found, charts: Mapping[Known, str]) -> str:
    """The page: for each text a chart and its numbers.

    Args:
        found: what was measured
        charts: file name of each text's chart
    """
    cells = max(mean.cells for means in found.means.values() for mean in means)
    introduction = (
        f"Mean lift over {cells} pairs and skills, batches of {_BATCH}, seed 0, with a bootstrap 95 % interval over "
        "pairs and skills. Every point is a training of its own whose learning rate falls to zero at its end. "
        "`ridge start`, `readout start` and `fresh` are `default`, `default, last layer solved` and `fresh, rehearsed` "
        "without rehearsal, and `paper start`, maps that are random at first, goes without it."
    )
    sections = ["# Steps against lift", introduction]
    for regime, chart in charts.items():
        title = REGIME_TITLES[regime]
        sections += [f"## {title}", f"![{title}: steps against lift]({chart})", _table(found.under(regime), regime)]
    sections += ["## Environment", measured_with(found.runs)]
    return "\n\n".join(sections) + "\n"


def _table(found: Mapping[int, Mapping[str, MeanLift]], regime: Known) -> str:
    methods = _methods(found, regime)
    rows = ["| steps | " + " | ".join(methods) + " |", "|---" * (1 + len(methods)) + "|"]
    for steps, means in found.items():
        rows.append(f"| {steps} | " + " | ".join(_figure(means.get(method)) for method in methods) + " |")
    return "\n".join(rows)


def _figure(mean: MeanLift | None) -> str:
    if mean is None:
        return "–"
    return f"{mean.lift:.2f} [{mean.ci95[0]:.2f}, {mean.ci95[1]:.2f}]"


def curves(found: Mapping[int, Mapping[str, MeanLift]], regime: Known) -> list[Curve]:
    """A curve per method."""
    return [
        Curve(method, [(steps, means[method].lift) for steps, means in found.items() if method in means])
        for method in _methods(found, regime)
    ]


def _methods(found: Mapping[int, Mapping[str, MeanLift]], regime: Known) -> list[str]:
    """Those that have run, as the page names them."""
    run = {method for means in found.values() for method in means}
    return [method for method in METHODS[regime] if method in run] + sorted(run - set(METHODS[regime]))


def main(
    tasks: Path,
    text: Path,
    out: Path = Path("benchmarks/results/steps"),
    page: Path = Path("docs/steps.md"),
    third_party: Path = Path("../shared/data/models"),
    steps: Sequence[int] = STEPS,
    pairs: Sequence[str] = PAIRS,
    skills: Sequence[str] = SKILLS,
    regimes: Sequence[Known] = tuple(METHODS),
) -> None:
    """Runs what is missing, and renders all that is there.

    Args:
        tasks: folder of task files, one folder per skill
        text: general text
        out: folder of the results, a folder per number of steps
        page: Markdown file to write; the charts go beside it
        third_party: folder of models that the zoo does not hold
        steps: numbers of optimizer steps
        pairs: SOURCE:TARGET, each
        skills: names of skills
        regimes: what is known about the task
    """
    torch.set_num_threads(1)
    disable_progress_bar()
    spec = BenchmarkSpec(zoo_models(ZOO, third_party), list(pairs), list(skills), str(tasks), str(text))
    for regime in regimes:
        with_text = spec.narrowed(regimes=[regime])
        for number in steps:
            run_quality(with_text, out / str(number), METHODS[regime], seeds=1, steps=number, batch_size=_BATCH)
    found = Found.read(out)
    charts = {}
    for regime in METHODS:
        if means := found.under(regime):
            charts[regime] = f"{page.stem}-{regime}.svg"
            chart = curve_chart(curves(means, regime), "optimizer steps", "lift")
            page.with_name(charts[regime]).write_text(chart, encoding="utf-8")
    page.write_text(render(found, charts), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
