"""Methods of the benchmark that train on the target; each one moves the adapter of a cell and scores the result."""

import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModelForCausalLM
from transformers import set_seed

from castlora.adapters.live import attach_lora
from castlora.alignment.positions import AlignedPassage
from castlora.alignment.vocabulary import SharedVocabulary
from castlora.baselines.nonlinear import attach_networks
from castlora.baselines.synthetic import contrastive_excess, label_by_excess, learn_labels
from castlora.bench.grid import Cell, Settings, score
from castlora.bench.reading import Reading, cell_recipe, read_text
from castlora.config import Recipe, RecipeName, Regime, Start, Tuning
from castlora.distillation.distill import Student, measure_held_out
from castlora.distillation.rehearsal import measure_drift
from castlora.distillation.training import peak_learning_rate, train_student
from castlora.maps.copied_start import copied_start, gentle_recipe, keep_better_start
from castlora.maps.scaling import SOLVED_SCALES, TRAINED_SCALES, keep_best_scale
from castlora.maps.starts import paper_maps
from castlora.models.loading import best_device, load_model
from castlora.publishing.manifest import peak_memory_bytes
from castlora.stages import hold_bare_target, hold_teacher, last_layer_to_solve, start_last_layer, start_student

WITH_TEXT: tuple[Regime, ...] = ("general", "format", "prompts")


@dataclass(frozen=True)
class Distilled:
    """A recipe with a start, trained or as it begins."""

    recipe: RecipeName
    start: Start | None
    """None leaves it to the recipe, the text and the number of steps."""
    tuning: Tuning = field(default_factory=Tuning)
    regimes: tuple[Regime, ...] = WITH_TEXT
    is_trained: bool = True

    def run(self, settings: Settings, cell: Cell) -> dict[str, Any]:
        """One transfer and its score on held-out test items."""
        return self.transfer_and_test(settings, cell, cell.skill)

    def transfer_and_test(self, settings: Settings, cell: Cell, tested: str) -> dict[str, Any]:
        """Transfers the cell's adapter, and scores it on the test items of a skill."""
        started = time.monotonic()
        set_seed(cell.seed)
        recipe = cell_recipe(settings, cell, self.recipe, self.start, self.tuning)
        recipe = recipe if self.is_trained else replace(recipe, steps=0)
        reading = read_text(settings, cell, recipe)
        text_seconds = time.monotonic() - started
        student, trained = self.train(reading, self.start_student(reading, recipe, cell.seed), recipe, cell.seed)
        train_seconds = time.monotonic() - started - text_seconds
        return {
            "recipe": asdict(recipe),
            "training_passages": len(reading.training),
            **score(settings.spec, student.causal_lm(), reading.models.target_tokenizer, tested),
            **trained,
            "text_seconds": round(text_seconds, 1),
            "train_seconds": round(train_seconds, 1),
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def train(self, reading: Reading, student: Student, recipe: Recipe, seed: int) -> tuple[Student, dict[str, Any]]:
        """The trained student, and how its training went."""
        return student, _train(reading, student, recipe, seed)

    def start_student(self, reading: Reading, recipe: Recipe, seed: int) -> Student:
        """The target with what is trained."""
        models, plan = reading.models, reading.plan
        last_layer = last_layer_to_solve(models, plan, recipe)
        return start_student(models, plan, recipe, reading.training, plan.rank(recipe, None), seed, last_layer)[0]


@dataclass(frozen=True)
class OtherSkill(Distilled):
    """A control: the adapter of another skill, moved and then tested on the skill of the cell."""

    def run(self, settings: Settings, cell: Cell) -> dict[str, Any]:
        """Moves the adapter of the skill that follows in the specification, and tests this one."""
        skills = settings.spec.skills
        other = skills[(skills.index(cell.skill) + 1) % len(skills)]
        return {"moved": other, **self.transfer_and_test(settings, replace(cell, skill=other), cell.skill)}


@dataclass(frozen=True)
class Nonlinear(Distilled):
    """The maps of a recipe with small networks beside them, run live."""

    def start_student(self, reading: Reading, recipe: Recipe, seed: int) -> Student:
        """The target with nonlinear maps around the frozen source factors."""
        set_seed(seed)
        models, plan = reading.models, reading.plan
        model = attach_lora(models.target, plan.target_modules, plan.adapter_rank)
        attach_networks(model, plan.pairing, plan.factors, paper_maps(plan.pairing, plan.factors, seed))
        widths = models.target.config.hidden_size, models.source.config.hidden_size
        return Student(model, *widths, with_head=recipe.mse_weight > 0).to(best_device())


@dataclass(frozen=True)
class DistilledNetworks(Nonlinear):
    """A plain LoRA that learns what the target with nonlinear maps predicts, so that engines can load it."""

    def train(self, reading: Reading, student: Student, recipe: Recipe, seed: int) -> tuple[Student, dict[str, Any]]:
        """Trains the nonlinear maps, and a fresh LoRA on another copy of the target with them as its teacher."""
        networks = _train(reading, student, recipe, seed)
        models, plan = reading.models, reading.plan
        target, _ = load_model(plan.target, None, best_device())
        vocabulary = plan.target_config.vocab_size
        spelled = models.target_bytes
        shared = SharedVocabulary.of(spelled, spelled, vocabulary, vocabulary)
        again = replace(models, source=models.target, teacher=student.model, target=target, shared=shared)
        torch.manual_seed(seed)
        model = attach_lora(target, plan.target_modules, plan.rank(recipe, None))
        width = target.config.hidden_size
        plain = Student(model, width, width, with_head=recipe.mse_weight > 0).to(best_device())
        own, own_held_out = (list(map(_within_target, passages)) for passages in (reading.training, reading.held_out))
        trained = _train(Reading(plan, again, own, own_held_out, reading.rehearsed), plain, recipe, seed)
        return plain, {**trained, "networks": networks}


@dataclass(frozen=True)
class Labelled:
    """A fresh LoRA that learns source + LoRA's answers as if they were labels."""

    regimes: tuple[Regime, ...] = WITH_TEXT

    def run(self, settings: Settings, cell: Cell) -> dict[str, Any]:
        """Filters the answers, trains on what is left, and scores."""
        set_seed(cell.seed)
        recipe = cell_recipe(settings, cell, "default", "fresh", Tuning(rehearsal_weight=0.0))
        reading = read_text(settings, cell, recipe)
        plan, models, training = reading.plan, reading.models, reading.training
        labelled = label_by_excess(training, contrastive_excess(models.teacher, training, recipe.batch_size))
        student = attach_lora(models.target, plan.target_modules, plan.rank(recipe, None))
        rate = peak_learning_rate(recipe, models.target.config.hidden_size)
        learn_labels(student, labelled, recipe.steps, recipe.batch_size, rate, cell.seed)
        assert isinstance(student, PeftModelForCausalLM)
        scored = score(settings.spec, student, models.target_tokenizer, cell.skill)
        return {"recipe": asdict(recipe), "training_passages": len(labelled), **scored}


def _within_target(passage: AlignedPassage) -> AlignedPassage:
    """A passage for a teacher and a student that both are the target."""
    return replace(passage, source_ids=passage.target_ids, source_positions=passage.target_positions)


def _train(reading: Reading, student: Student, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Trains a student to the end and keeps its best scale; the figures are those of held-out text."""
    teacher, held_out_teacher = hold_teacher(reading.models, reading.training, reading.held_out, recipe)
    shared = reading.models.shared
    measure = partial(measure_held_out, held_out_teacher, examples=reading.held_out, shared=shared, recipe=recipe)
    last_layer = last_layer_to_solve(reading.models, reading.plan, recipe)
    rehearsal = hold_bare_target(student.model, reading.models.target, reading.rehearsed, recipe)
    copied = copied_start(reading.plan, recipe, reading.plan.rank(recipe, None), reading.training)
    choice = keep_better_start(student, copied, measure)
    start_last_layer(student, last_layer, reading.models, teacher, reading.training, measure, rehearsal, recipe)
    before = measure(student)
    paced = gentle_recipe(recipe, choice)
    with tempfile.TemporaryDirectory() as state:
        log = train_student(
            teacher, student, shared, reading.training, paced, seed, Path(state), quiet=True, rehearsal=rehearsal
        )  # fmt: skip
    scale = keep_best_scale(student, measure, TRAINED_SCALES if log else SOLVED_SCALES)
    after = measure(student)
    return {
        "drift": measure_drift(rehearsal.held_out_bare, student.model, rehearsal.held_out),
        "held_out_kl": [before.kl, after.kl],
        "agreement": [before.agreement, after.agreement],
        "last_loss": log[-1]["loss"] if log else None,
        "scale": asdict(scale),
        **({"start_choice": asdict(choice)} if choice else {}),
    }
