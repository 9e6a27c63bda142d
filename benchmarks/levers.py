"""What each lever of the default is worth, moved alone: the start, what is trained, its rates, the objective.

    python -m benchmarks.levers --tasks TASKS --text CORPUS/train-05.jsonl.gz

Runs that are already there are skipped. The records are rendered into docs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product, starmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.logging import disable_progress_bar

from benchmarks import lever_starts
from benchmarks.quality import PAIRS as GRID_PAIRS
from benchmarks.quality import ZOO, zoo_models
from benchmarks.zoo.specs import GRID_SKILLS
from castlora.alignment.positions import AlignedPassage, batches
from castlora.bench.grid import Cell, Settings, record_path, write_missing
from castlora.bench.quality import reference_scores
from castlora.bench.reading import Reading
from castlora.bench.results import PooledCell, compare, make_cells, read_results
from castlora.bench.spec import BenchmarkSpec
from castlora.bench.tables import arrow, measured_with
from castlora.bench.trained import Distilled
from castlora.config import Recipe, Tuning
from castlora.distillation.distill import Student
from castlora.distillation.teacher import predict
from castlora.errors import UserError
from castlora.evaluation.changes import update_divergence
from castlora.model_pair import Models

PAIRS = ("llama-s:mistral-s", "gpt2-s:gpt2-m")
SHARED_TOKENIZER = ("gpt2-s:gpt2-m", "llama-s:llama-m", "llama-m:llama-s")
"""Pairs whose logits can be added up."""
SHORT, LONG = STEPS = (200, 800)
_NOT_RUN = "–"
_BATCH, _PASSAGES, _MAX_LENGTH, _RUNNING_LENGTH = 4, 1000, 96, 48
"""As in the grid."""
_EFFECT_BATCH, _LEAST_WEIGHT = 16, 1e-6


@dataclass(frozen=True)
class Begun(Distilled):
    """The default recipe from another start."""

    begin: lever_starts.Begin = lever_starts.unbalanced

    def start_student(self, reading: Reading, recipe: Recipe, seed: int) -> Student:
        """The target with what is trained."""
        return self.begin(reading, recipe, seed)


@dataclass(frozen=True)
class Shifted(Distilled):
    """Taught are the bare target's logits, shifted by what the adapter changes in the source's: proxy tuning."""

    def train(self, reading: Reading, student: Student, recipe: Recipe, seed: int) -> tuple[Student, dict[str, Any]]:
        """The trained student, and how its training went."""
        teacher = ShiftedLogits(reading.models.teacher, student.model)
        shifted = replace(reading, models=replace(reading.models, teacher=teacher))
        return super().train(shifted, student, recipe, seed)


class ShiftedLogits(nn.Module):
    """What the target would predict with the change of logits that the adapter makes in a source of its vocabulary."""

    def __init__(self, teacher: PeftModel, student: PeftModel) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student
        self.config = teacher.config

    def forward(self, **inputs: Tensor) -> CausalLMOutputWithPast:
        """Reads tokens that mean the same to both models."""
        moved = self.teacher(**inputs)
        with self.teacher.disable_adapter(), self.student.disable_adapter():
            before, bare = self.teacher(**inputs), self.student(**inputs)
        return CausalLMOutputWithPast(logits=bare.logits + moved.logits - before.logits)


@dataclass(frozen=True)
class WeighedByEffect(Distilled):
    """A prediction in an answer counts as much as the adapter changes it in the source."""

    def train(self, reading: Reading, student: Student, recipe: Recipe, seed: int) -> tuple[Student, dict[str, Any]]:
        """The trained student, and how its training went."""
        training = weighed_by_effect(reading.models, reading.training)
        return super().train(replace(reading, training=training), student, recipe, seed)


@torch.no_grad()
def weighed_by_effect(models: Models, passages: Sequence[AlignedPassage]) -> list[AlignedPassage]:
    """Gives each place that counts KL(source + LoRA ‖ source) for its weight, scaled so that their mean is 1."""
    of_places = []
    for batch in batches(passages, _EFFECT_BATCH, next(models.teacher.parameters()).device):
        counts = batch["weights"] > 0
        moved = predict(models.teacher, batch, "source").aligned(counts)
        with models.teacher.disable_adapter():
            bare = predict(models.teacher, batch, "source").aligned(counts)
        of_places.append(update_divergence(moved, bare, models.shared.source_classes, models.shared.classes))
    effects = torch.cat(of_places)
    # A place of no weight at all would not be read.
    left = iter((effects / effects.mean()).clamp_min(_LEAST_WEIGHT).tolist())
    return [
        replace(passage, weights=[next(left) if weight > 0 else 0.0 for weight in passage.weights])
        for passage in passages
    ]


@dataclass(frozen=True)
class Lever:
    """One departure from the default."""

    title: str
    method: Distilled
    steps: tuple[int, ...] = STEPS
    pairs: tuple[str, ...] = PAIRS


def _tuned(title: str, steps: tuple[int, ...] = (LONG,), pairs: tuple[str, ...] = PAIRS, **tuning: Any) -> Lever:
    return Lever(title, Distilled("default", "ridge", Tuning(**tuning)), steps, pairs)


def _begun(
    title: str,
    begin: lever_starts.Begin,
    steps: tuple[int, ...] = STEPS,
    pairs: tuple[str, ...] = PAIRS,
    **tuning: Any,
) -> Lever:
    return Lever(title, Begun("default", "ridge", Tuning(**tuning), begin=begin), steps, pairs)


LEVERS: dict[str, dict[str, Lever]] = {
    "Where it starts": {
        "fresh, rehearsed": Lever("a fresh LoRA", Distilled("default", "fresh")),
        "inputs": _begun("A of the closed form, B zero", lever_starts.one_side("a")),
        "outputs": _begun("B of the closed form, A zero", lever_starts.one_side("b"), (SHORT,)),
        "sequential": _begun(
            "each module solved with the earlier ones adapted, in source and target",
            lever_starts.earlier_modules_adapted,
            (SHORT,),
        ),
        "gradients": _begun("`map_from_source` from gradients of the text", lever_starts.outputs_by_gradients),
        "alike": _begun("layers paired by CKA of their hidden states", lever_starts.layers_most_alike, (SHORT,)),
        "reversed": _begun("layers paired in reverse", lever_starts.layers_reversed, (SHORT,)),
    },
    "What is trained, and how fast": {
        "unbalanced": _begun("factors as the maps fold into them, not balanced", lever_starts.unbalanced),
        "whitened": _begun("A beside whitened inputs", lever_starts.whitened(), map_learning_rate_ratio=1.0),
        "fresh-whitened": _begun(
            "a fresh LoRA, A beside whitened inputs",
            lever_starts.whitened(is_fresh=True),
            (SHORT,),
            map_learning_rate_ratio=1.0,
        ),
        "whitened-8": _begun(
            "A beside inputs whose 8 directions of most variance are whitened",
            lever_starts.whitened(directions=8),
            (SHORT,),
            map_learning_rate_ratio=1.0,
        ),
        "b-16": _begun("B sixteen times as fast as A", lever_starts.b_apart, map_learning_rate_ratio=16.0),
        "rate-0.5": _tuned("half the learning rate", STEPS, learning_rate_scale=0.6),
        "rate-2": _tuned("twice the learning rate", STEPS, learning_rate_scale=2.4),
        "rank-4": _begun("rank 4", lever_starts.of_rank(4), (LONG,)),
        "rank-32": _begun("rank 32", lever_starts.of_rank(32), (LONG,)),
    },
    "What is minimised": {
        "temperature-2": _tuned("temperature 2", temperature=2.0),
        "no-chunks": Lever(
            f"no chunk loss (tokens that the tokenizers cut unlike), {arrow(PAIRS[0])}",
            Distilled("default", "ridge", Tuning(chunk_weight=0.0)),
            steps=(LONG,),
            pairs=PAIRS[:1],
        ),
        "by-effect": Lever(
            "places weighed by what the adapter changes there", WeighedByEffect("default", "ridge"), (LONG,)
        ),
        "first-token": _tuned("answers of one token alone", answer_tokens=1),
        "default, hidden states": _tuned("final hidden states taught too", mse_weight=1.0),
    },
    "After few steps, on every pair": {
        "rate-2": _tuned("twice the learning rate", (SHORT,), GRID_PAIRS, learning_rate_scale=2.4),
        "whitened": _begun(
            "A beside whitened inputs", lever_starts.whitened(), (SHORT,), GRID_PAIRS, map_learning_rate_ratio=1.0
        ),
    },
    "The change of predictions instead of the predictions": {
        "shifted": Lever(
            "the target's own logits, shifted by what the adapter changes in the source's",
            Shifted("default", "ridge"),
            steps=(LONG,),
            pairs=SHARED_TOKENIZER,
        ),
    },
}
"""Section of the page → levers by the names of their records."""
DEFAULT = "default"
_DEFAULT = Distilled("default", "ridge")
ALL: dict[str, Lever] = {
    DEFAULT: Lever("the default", _DEFAULT),
    **{name: lever for section in LEVERS.values() for name, lever in section.items()},
}
_INTRODUCTION = f"""
The recipe from closed-form maps, `the default` of this page, with one thing changed, along unlabelled prompts, {_BATCH}
at a step. Lift is the mean over three skills of
each pair, one seed; beside it stands what it is above the default's on the same pairs and skills, with a bootstrap 95 %
interval over them, and on how many it is ahead and behind. Drift is the KL divergence from the bare target on text that
this wrote itself, in nats per position. Six single runs on two pairs tell little
apart, as the intervals say.
Measured elsewhere: [the text, the rehearsal, maps instead of factors](results.md#what-each-part-adds) and
[the number of steps](results.md#steps-against-lift). `python -m benchmarks.levers` runs and renders it.
"""


def run_missing(spec: BenchmarkSpec, out: Path, levers: Sequence[str]) -> None:
    """Runs what is missing of some levers on the pairs of a specification, one JSON file per run."""
    planned = [run for run in planned_runs(spec) if run[2] in levers]
    for settings, cell, name, lever in tqdm(planned, desc="runs", unit="run"):
        path = record_path(out / str(settings.steps), cell, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_missing(path.with_name("references.json"), partial(reference_scores, spec, cell.pair, cell.skill))
        write_missing(path, partial(run_lever, settings, cell, name, lever))


def planned_runs(spec: BenchmarkSpec) -> Iterator[tuple[Settings, Cell, str, Lever]]:
    """Every run that the page asks for; each lever goes over all pairs and skills before the next."""
    shown = [(name, lever) for section in LEVERS.values() for name, lever in section.items()]
    for steps in STEPS:
        settings = Settings(spec, steps, _BATCH, _PASSAGES, _MAX_LENGTH, _RUNNING_LENGTH)
        pairs_of: dict[str, set[str]] = {DEFAULT: set()}
        for name, lever in shown:
            if steps in lever.steps:
                pairs_of.setdefault(name, set()).update(lever.pairs)
                pairs_of[DEFAULT].update(lever.pairs)
        for (name, pairs), pair, skill in product(pairs_of.items(), spec.pairs, spec.skills):
            if pair in pairs:
                yield settings, Cell(pair, skill, "prompts", 0), name, ALL[name]


def run_lever(settings: Settings, cell: Cell, name: str, lever: Lever) -> dict[str, Any]:
    """The record of one run."""
    fields = {"pair": cell.pair, "skill": cell.skill, "regime": cell.regime, "seed": cell.seed, "method": name}
    return {**fields, **lever.method.run(settings, cell)}


@dataclass(frozen=True)
class Found:
    """What was measured after a number of steps."""

    cells: dict[str, list[PooledCell]]
    """By lever."""
    drift: dict[str, dict[tuple[str, str], float]]
    """By lever, pair and skill."""
    runs: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Found":
        """Reads the records of a folder."""
        references, runs = read_results(folder)
        found = cls({}, {}, runs)
        for cell in make_cells(references, runs):
            found.cells.setdefault(cell.method, []).append(cell)
        for run in runs:
            found.drift.setdefault(run["method"], {})[run["pair"], run["skill"]] = run["drift"]
        return found

    def figures(self, name: str, pairs: Sequence[str]) -> list[str]:
        """Mean lift of a lever, what it is above the default's, and its mean drift; dashes where it was not run."""
        cells = self._of(name, pairs)
        if not cells:
            return [_NOT_RUN] * 3
        lift = f"{np.mean([cell.lift.lift for cell in cells]):.2f}"
        drift = f"{np.mean([drift for (pair, _), drift in self.drift[name].items() if pair in pairs]):.2f}"
        comparison = compare(cells, self._of(DEFAULT, pairs)) if name != DEFAULT else None
        if comparison is None:
            return [lift, _NOT_RUN, drift]
        low, high = comparison.ci95
        above = f"{comparison.above:+.2f} [{low:+.2f}, {high:+.2f}], {comparison.ahead} and {comparison.behind}"
        return [lift, above, drift]

    def _of(self, name: str, pairs: Sequence[str]) -> list[PooledCell]:
        return [cell for cell in self.cells.get(name, []) if cell.pair in pairs]


def render(found: dict[int, Found]) -> str:
    """The page: a table for each kind of lever."""
    sections = filter(None, starmap(partial(_section, found), LEVERS.items()))
    environment = measured_with([run for of_steps in found.values() for run in of_steps.runs])
    return "\n\n".join(["# Levers", _INTRODUCTION.strip(), *sections, "## Environment", environment]) + "\n"


def _section(found: dict[int, Found], title: str, levers: dict[str, Lever]) -> str:
    """A table of what was run; nothing where no lever was."""
    shown = [steps for steps in STEPS if any(steps in lever.steps for lever in levers.values())]
    pairs = next(iter(levers.values())).pairs
    rows = {}
    for name, lever in {DEFAULT: Lever("the default", _DEFAULT, STEPS, pairs), **levers}.items():
        figures = [figure for steps in shown for figure in _figures(found[steps], name, lever, steps)]
        if set(figures) != {_NOT_RUN}:
            rows[name] = f"| {lever.title} | " + " | ".join(figures) + " |"
    if rows.keys() <= {DEFAULT}:
        return ""
    heads = " | ".join(f"lift after {steps} steps | against the default | drift" for steps in shown)
    table = [f"| | {heads} |", "|---" * (1 + 3 * len(shown)) + "|", *rows.values()]
    of_pairs = f"{len(pairs)} pairs: " + ", ".join(map(arrow, pairs)) + "."
    return "\n\n".join([f"## {title}", of_pairs, "\n".join(table)])


def _figures(found: Found, name: str, lever: Lever, steps: int) -> list[str]:
    # What was run for another section with other pairs does not stand here.
    return found.figures(name, lever.pairs if steps in lever.steps else ())


def main(
    tasks: Path,
    text: Path,
    out: Path = Path("benchmarks/results/levers"),
    page: Path = Path("docs/levers.md"),
    third_party: Path = Path("../shared/data/models"),
    pairs: Sequence[str] = GRID_PAIRS,
    skills: Sequence[str] = GRID_SKILLS,
    levers: Sequence[str] = tuple(ALL),
) -> None:
    """Runs what is missing, and renders all that is there.

    Args:
        tasks: folder of task files, one folder per skill
        text: general text
        out: folder of the results, a folder per number of steps
        page: Markdown file to write
        third_party: folder of models that the zoo does not hold
        pairs: SOURCE:TARGET, each
        skills: names of skills
        levers: names of levers to run

    Raises:
        UserError: a lever is unknown, or tasks, text or models are not there.
    """
    unknown = [name for name in levers if name not in ALL]
    if unknown:
        raise UserError(f"Lever {unknown[0]!r} is unknown; choose from {'; '.join(ALL)}.")
    torch.set_num_threads(1)
    disable_progress_bar()
    spec = BenchmarkSpec(zoo_models(ZOO, third_party), list(pairs), list(skills), str(tasks), str(text))
    run_missing(spec.narrowed(regimes=["prompts"]), out, levers)
    page.write_text(render({steps: Found.read(out / str(steps)) for steps in STEPS}), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
