"""Time to a lift: a whole transfer beside the plain loop of the paper and beside retraining on labels.

    python -m benchmarks.race --tasks TASKS

All three learn from the same task: the transfer and the loop from its unlabelled prompts, retraining from its labelled
examples. Entries that are already in the record are skipped. The record is rendered into docs.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from peft import get_peft_model
from transformers import TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality import ZOO, zoo_models
from benchmarks.steps import PAIRS, SKILLS
from benchmarks.zoo.train_adapters import BATCH_SIZE, LEARNING_RATE, lora_config, train
from castlora import evaluate, transfer
from castlora.bench.grid import environment
from castlora.bench.plots import Curve, curve_chart
from castlora.bench.spec import SKILL_SLOT, BenchmarkModel
from castlora.config import Tuning, resolve_recipe
from castlora.distillation.teacher import LiveTeacher
from castlora.distillation.training import train_student
from castlora.evaluation.accuracy import evaluate_model
from castlora.evaluation.tasks import load_task
from castlora.execution.run_directory import write_whole
from castlora.model_pair import align_text, load_models
from castlora.models.loading import load_model
from castlora.plan import plan_transfer
from castlora.stages import start_student
from castlora.teaching.curriculum import TextSource, teach_text

TRANSFER, LOOP, RETRAINING = "castlora", "the paper's loop", "retraining"
LOOP_STEPS = 1000
STEPS: Mapping[str, Sequence[int]] = {
    TRANSFER: (50, 100, 200, 400, 800),
    LOOP: (50, 100, 200, 300, 400, 600, 800, LOOP_STEPS),
    RETRAINING: (25, 50, 100, 200, 400),
}
"""Where each one is scored."""
_BATCH = 4
_TEXT = Tuning(passages=1000, max_length=96)
_INTRODUCTION = """
Processor seconds from files to a finished adapter, scoring left out, on one thread, seed 0. Transfer and loop learn
from the same unlabelled prompts, {batch} at a time, the transfer from closed-form maps;
retraining learns from the task's labels, {labels} at a time, as
the zoo's adapters were trained. Every point of the transfer and of retraining is a run of its own, whose learning
rate falls to zero at its end; those of the loop lie along one run of {steps} steps. The loop is the method as the
paper states it: random maps that are not folded, KL divergence and mean squared error of hidden states, both models
run at each step. It starts from answered prompts, since text as it runs carries nothing between these models
([results](results-200x16.md)). The seconds of the transfer hold all that `castlora transfer` does, its checks and its
report as well. Times between points are interpolated.
"""


@dataclass(frozen=True)
class Point:
    """What a runner had reached at some time."""

    steps: int
    seconds: float
    """Of the processor, from files on."""
    score: float


@dataclass(frozen=True)
class Task:
    """Where the parts of a cell lie."""

    adapter: str
    source: str
    target: str
    retrained: str
    folder: Path

    @classmethod
    def of(cls, models: Mapping[str, BenchmarkModel], pair: str, skill: str, tasks: Path) -> "Task":
        """The cell of a pair and a skill."""
        source, target = (models[name] for name in pair.split(":"))
        adapter, retrained = (model.adapters.replace(SKILL_SLOT, skill) for model in (source, target))
        return cls(adapter, source.base, target.base, retrained, tasks / skill)

    @property
    def prompts(self) -> str:
        """File of unlabelled prompts."""
        return str(self.folder / "prompts.jsonl")

    @property
    def test(self) -> str:
        """File of held-out items."""
        return str(self.folder / "test.jsonl")


def run_transfer(task: Task) -> list[Point]:
    """Whole transfers, each with a schedule of its own."""
    points = []
    for steps in STEPS[TRANSFER]:
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "adapter")
            started = time.process_time()
            transfer(
                task.adapter, task.target, out, task.source,
                prompts=task.prompts, start="ridge", steps=steps, batch_size=_BATCH, tuning=_TEXT,
            )  # fmt: skip
            seconds = time.process_time() - started
            points.append(Point(steps, seconds, evaluate(task.target, task.test, out)["score"]))
    return points


class ScoreAlong(TrainerCallback):
    """Scores a model at some steps of its training, with the clock stopped."""

    def __init__(self, score: Callable[[], float], started: float) -> None:
        self.score = score
        self.started = started
        self.points: list[Point] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds a point where one is due."""
        if state.global_step in STEPS[LOOP]:
            paused = time.process_time()
            self.points.append(Point(state.global_step, paused - self.started, self.score()))
            self.started += time.process_time() - paused


def run_loop(task: Task) -> list[Point]:
    """The paper's loop on the answered prompts of the task."""
    started = time.process_time()
    set_seed(0)
    answered = {**asdict(_TEXT), "write_answers": True, "context_weight": 0.0}
    recipe = resolve_recipe("paper", None, LOOP_STEPS, _BATCH, Tuning(**answered))
    plan = plan_transfer(task.adapter, task.target, task.source)
    models = load_models(plan)
    passages = teach_text(models, TextSource(prompts=task.prompts), (), recipe, seed=0)
    training, _ = align_text(models, passages, recipe)
    student, _ = start_student(models, plan, recipe, training, plan.rank(recipe, None), seed=0)
    items = load_task(task.test)

    def score() -> float:
        return evaluate_model(student.causal_lm(), models.target_tokenizer, items).score

    along = ScoreAlong(score, started)
    with tempfile.TemporaryDirectory() as state:
        teacher = LiveTeacher(models.teacher, with_hidden=True)
        train_student(
            teacher, student, models.shared, training, recipe, 0, Path(state), quiet=True, callbacks=[along]
        )  # fmt: skip
    return along.points


def run_retraining(task: Task) -> list[Point]:
    """LoRA adapters trained on the task's labels, each with a schedule of its own."""
    description = json.loads((task.folder / "skill.json").read_text(encoding="utf-8"))
    points = []
    for steps in STEPS[RETRAINING]:
        started = time.process_time()
        base, tokenizer = load_model(task.target)
        set_seed(0)
        model = get_peft_model(base, lora_config(description, base))
        train(model, tokenizer, load_task(task.folder / "train.jsonl"), 0, steps, LEARNING_RATE)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
        seconds = time.process_time() - started
        points.append(Point(steps, seconds, evaluate_model(model, tokenizer, load_task(task.test)).score))
    return points


RUNNERS: Mapping[str, Callable[[Task], list[Point]]] = {
    TRANSFER: run_transfer,
    LOOP: run_loop,
    RETRAINING: run_retraining,
}


def reference_scores(task: Task) -> dict[str, float]:
    """What lift is measured by: the bare target, and the target with its own adapter."""
    return {
        "bare": evaluate(task.target, task.test)["score"],
        "retrained": evaluate(task.target, task.test, task.retrained)["score"],
    }


def time_to(points: Sequence[tuple[float, float]], lift: float) -> float | None:
    """Seconds until a lift is first reached, along straight lines between points; None if it is not.

    Args:
        points: (seconds, lift) in the order of time
        lift: to reach

    Example:
        >>> time_to([(10.0, 0.2), (20.0, 0.6)], 0.4)
        15.0
    """
    for (start, low), (end, high) in pairwise([(points[0][0], -np.inf), *points]):
        if high >= lift:
            return float(np.interp(lift, (low, high), (start, end))) if np.isfinite(low) else end
    return None


@dataclass(frozen=True)
class Outcome:
    """One cell, with all three runners."""

    pair: str
    skill: str
    lifts: Mapping[str, Sequence[tuple[float, float]]]
    """Runner → (seconds, lift) in the order of time."""

    def seconds_to(self, lift: float) -> dict[str, float | None]:
        """Seconds of each runner until a lift is first reached."""
        return {runner: time_to(points, lift) for runner, points in self.lifts.items()}


def read_outcomes(record: Mapping[str, Any]) -> list[Outcome]:
    """The cells on which all three have run."""
    outcomes = []
    for cell in record["cells"]:
        if cell["points"].keys() >= RUNNERS.keys():
            gain = cell["retrained"] - cell["bare"]
            lifts = {
                runner: [(point["seconds"], (point["score"] - cell["bare"]) / gain) for point in points]
                for runner, points in cell["points"].items()
            }
            outcomes.append(Outcome(cell["pair"], cell["skill"], lifts))
    return outcomes


def render(record: Mapping[str, Any], chart_name: str) -> str:
    """The page: a chart and its numbers."""
    outcomes = read_outcomes(record)
    introduction = _INTRODUCTION.format(batch=_BATCH, labels=BATCH_SIZE, steps=LOOP_STEPS)
    made_with = record["environment"]
    sections = [
        "# Time to a lift",
        " ".join(introduction.split()),
        f"![Lift against seconds]({chart_name})",
        "## Beside the paper's loop",
        f"Seconds until 0.9 of what the loop has after its {LOOP_STEPS} steps is reached. The target is a factor of 5.",
        _table(outcomes, LOOP, lambda outcome: 0.9 * outcome.lifts[LOOP][-1][1]),
        "## Beside retraining",
        "Seconds until the lift of the longest transfer is reached. The target is a factor of 2.",
        _table(outcomes, RETRAINING, lambda outcome: outcome.lifts[TRANSFER][-1][1]),
        "## All points",
        f"Means over {len(outcomes)} pairs and skills.",
        _all_points(outcomes),
        f"Commit {made_with['commit'][:10]}; {made_with['machine']}; torch {made_with['versions']['torch']}.",
    ]
    return "\n\n".join(sections) + "\n"


def curves(outcomes: Sequence[Outcome]) -> list[Curve]:
    """A curve per runner."""
    return [Curve(runner, [(seconds, lift) for _, seconds, lift in _means(outcomes, runner)]) for runner in RUNNERS]


def _table(outcomes: Sequence[Outcome], other: str, goal: Callable[[Outcome], float]) -> str:
    rows = [f"| pair | skill | lift to reach | {other} | {TRANSFER} | times faster |", "|---|---|---|---|---|---|"]
    for outcome in outcomes:
        seconds = outcome.seconds_to(goal(outcome))
        slow, fast = seconds[other], seconds[TRANSFER]
        figures = ["not reached" if value is None else f"{value:.0f} s" for value in (slow, fast)]
        factor = f"{slow / fast:.1f}" if slow is not None and fast is not None else "–"
        pair = outcome.pair.replace(":", " → ")
        rows.append(f"| {pair} | {outcome.skill} | {goal(outcome):.2f} | {' | '.join(figures)} | {factor} |")
    return "\n".join(rows)


def _all_points(outcomes: Sequence[Outcome]) -> str:
    rows = ["| | steps | seconds | lift |", "|---|---|---|---|"]
    for runner in RUNNERS:
        rows += [
            f"| {runner} | {steps} | {seconds:.0f} | {lift:.2f} |" for steps, seconds, lift in _means(outcomes, runner)
        ]
    return "\n".join(rows)


def _means(outcomes: Sequence[Outcome], runner: str) -> list[tuple[int, float, float]]:
    """Steps, mean seconds and mean lift of each point."""
    means = np.array([outcome.lifts[runner] for outcome in outcomes]).mean(0)
    return [(steps, float(seconds), float(lift)) for steps, (seconds, lift) in zip(STEPS[runner], means, strict=True)]


def main(
    tasks: Path,
    record: Path = Path("benchmarks/results/race.json"),
    page: Path = Path("docs/race.md"),
    third_party: Path = Path("../shared/data/models"),
    pairs: Sequence[str] = PAIRS,
    skills: Sequence[str] = SKILLS,
) -> None:
    """Runs what is missing of the record, and renders it.

    Args:
        tasks: folder of task files, one folder per skill
        record: JSON file of the results
        page: Markdown file to write
        third_party: folder of models that the zoo does not hold
        pairs: SOURCE:TARGET, each
        skills: names of skills
    """
    torch.set_num_threads(1)
    disable_progress_bar()
    models = zoo_models(ZOO, third_party)
    cells = json.loads(record.read_text(encoding="utf-8"))["cells"] if record.exists() else []
    for pair, skill in product(pairs, skills):
        task = Task.of(models, pair, skill, tasks)
        cell = next((cell for cell in cells if (cell["pair"], cell["skill"]) == (pair, skill)), None)
        if cell is None:
            cell = {"pair": pair, "skill": skill, **reference_scores(task), "points": {}}
            cells.append(cell)
        for runner in [runner for runner in RUNNERS if runner not in cell["points"]]:
            cell["points"][runner] = [asdict(point) for point in RUNNERS[runner](task)]
            write_whole(record, json.dumps({"cells": cells, "environment": environment()}, indent=1) + "\n")
    found = json.loads(record.read_text(encoding="utf-8"))
    chart = page.with_suffix(".svg")
    page.write_text(render(found, chart.name), encoding="utf-8")
    chart.write_text(curve_chart(curves(read_outcomes(found)), "processor seconds", "lift"), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
