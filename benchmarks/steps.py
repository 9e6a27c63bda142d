"""Lift against the number of steps, with unlabelled prompts, for each start.

    python -m benchmarks.steps --tasks TASKS --text CORPUS/train-05.jsonl.gz

Each number of steps is a run of its own, with a schedule of its own; runs that are already there are skipped. The
records are rendered into docs.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import auto_cli
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality import ZOO, zoo_models
from castlora.bench.plots import Curve, curve_chart
from castlora.bench.quality import run_quality
from castlora.bench.results import MeanLift, make_cells, mean_lifts, read_results
from castlora.bench.spec import BenchmarkSpec

STEPS = (50, 100, 200, 400, 800)
PAIRS = ("llama-s:mistral-s", "gpt2-s:gpt2-m")
SKILLS = ("question-type", "operation")
METHODS = (
    "default", "default, last layer solved", "fresh, rehearsed", "ridge start", "readout start", "fresh", "paper start",
)  # fmt: skip
_BATCH = 4


def read_means(out: Path) -> dict[int, dict[str, MeanLift]]:
    """Mean lift by number of steps and method."""
    found = {}
    for folder in sorted(out.iterdir(), key=lambda folder: int(folder.name)):
        means = mean_lifts(make_cells(*read_results(folder)))
        found[int(folder.name)] = {mean.method: mean for mean in means}
    return found


def render(found: dict[int, dict[str, MeanLift]], chart_name: str) -> str:
    """The page: a chart and its numbers."""
    methods = _methods(found)
    rows = ["| steps | " + " | ".join(methods) + " |", "|---" * (1 + len(methods)) + "|"]
    for steps, means in found.items():
        rows.append(f"| {steps} | " + " | ".join(_figure(means.get(method)) for method in methods) + " |")
    cells = max(mean.cells for means in found.values() for mean in means.values())
    introduction = (
        f"Mean lift over {cells} pairs and skills with unlabelled prompts, batches of {_BATCH}, seed 0, with a "
        "bootstrap 95 % interval over pairs and skills. Every point is a training of its own whose learning rate falls "
        "to zero at its end. `ridge start`, `readout start` and `fresh` are `default`, `default, last layer solved` "
        "and `fresh, rehearsed` without rehearsal, and `paper start`, maps that are random at first, goes without it."
    )
    return (
        "\n\n".join(["# Steps against lift", introduction, f"![Steps against lift]({chart_name})", "\n".join(rows)])
        + "\n"
    )


def _figure(mean: MeanLift | None) -> str:
    if mean is None:
        return "–"
    return f"{mean.lift:.2f} [{mean.ci95[0]:.2f}, {mean.ci95[1]:.2f}]"


def curves(found: dict[int, dict[str, MeanLift]]) -> list[Curve]:
    """A curve per method."""
    return [
        Curve(method, [(steps, means[method].lift) for steps, means in found.items() if method in means])
        for method in _methods(found)
    ]


def _methods(found: dict[int, dict[str, MeanLift]]) -> list[str]:
    """Those that have run, as the page names them."""
    run = {method for means in found.values() for method in means}
    return [method for method in METHODS if method in run] + sorted(run - set(METHODS))


def main(
    tasks: Path,
    text: Path,
    out: Path = Path("benchmarks/results/steps"),
    page: Path = Path("docs/steps.md"),
    third_party: Path = Path("../shared/data/models"),
    steps: Sequence[int] = STEPS,
    pairs: Sequence[str] = PAIRS,
    skills: Sequence[str] = SKILLS,
    methods: Sequence[str] = METHODS,
) -> None:
    """Runs what is missing, and renders it.

    Args:
        tasks: folder of task files, one folder per skill
        text: general text
        out: folder of the results, a folder per number of steps
        page: Markdown file to write
        third_party: folder of models that the zoo does not hold
        steps: numbers of optimizer steps
        pairs: SOURCE:TARGET, each
        skills: names of skills
        methods: names of methods
    """
    torch.set_num_threads(1)
    disable_progress_bar()
    models = zoo_models(ZOO, third_party)
    spec = BenchmarkSpec(models, list(pairs), list(skills), str(tasks), str(text)).narrowed(regimes=["prompts"])
    for number in steps:
        run_quality(spec, out / str(number), methods, seeds=1, steps=number, batch_size=_BATCH)
    found = read_means(out)
    chart = page.with_suffix(".svg")
    page.write_text(render(found, chart.name), encoding="utf-8")
    chart.write_text(curve_chart(curves(found), "optimizer steps", "lift"), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
