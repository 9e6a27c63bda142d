"""The methods of the quality benchmark: each one moves the adapter of a cell and scores the result."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from peft import PeftModelForCausalLM
from transformers import PreTrainedModel, set_seed

from benchmarks.grid import Cell, Regime, Settings, figures, taught_passages
from benchmarks.zoo.specs import ADAPTER_STEPS
from benchmarks.zoo.train_adapters import LEARNING_RATE, train
from castlora.adapters import LowRank, open_adapter, read_factors
from castlora.baselines.carry import Carry, carry_weights
from castlora.baselines.cross_lora import cross_lora
from castlora.baselines.direct_copy import direct_copy
from castlora.baselines.logit_delta import evaluate_logit_delta
from castlora.baselines.lora_x import attach_constrained, lora_x
from castlora.baselines.nonlinear import attach_networks
from castlora.baselines.synthetic import contrastive_excess, label_by_excess, learn_labels
from castlora.baselines.theseus import theseus
from castlora.config import Recipe, RecipeName, Start, Tuning, resolve_recipe
from castlora.distill import Student, measure_held_out
from castlora.evaluation import evaluate_model
from castlora.manifest import peak_memory_bytes
from castlora.models import linear_slots, load_model
from castlora.positions import AlignedPassage
from castlora.scaling import SOLVED_SCALES, TRAINED_SCALES, keep_best_scale
from castlora.stages import Models, Plan, align_text, load_models, start_student, train_student
from castlora.starts import (
    attach_lora,
    collect_moments,
    fold_maps,
    paper_maps,
    ridge_maps,
    start_from_factors,
    student_factors,
)

WITH_TEXT: tuple[Regime, ...] = ("general", "format", "prompts")


@dataclass(frozen=True)
class Distilled:
    """A recipe with a start, trained."""

    recipe: RecipeName
    start: Start
    tuning: Tuning = field(default_factory=Tuning)
    regimes: tuple[Regime, ...] = WITH_TEXT

    def run(self, settings: Settings, cell: Cell) -> dict[str, Any]:
        """One transfer and its score on held-out test items."""
        started = time.monotonic()
        set_seed(cell.seed)
        recipe = _recipe(settings, cell, self.recipe, self.start, self.tuning)
        plan, models, training, held_out = _read_text(settings, cell, recipe)
        text_seconds = time.monotonic() - started
        student = self.start_student(models, plan, recipe, training, cell.seed)
        measure = partial(measure_held_out, models.teacher, examples=held_out, shared=models.shared, recipe=recipe)
        before = measure(student)
        with tempfile.TemporaryDirectory() as state:
            log = train_student(models, student, training, recipe, cell.seed, Path(state), quiet=True)
        scale = keep_best_scale(student, measure, TRAINED_SCALES)
        after = measure(student)
        train_seconds = time.monotonic() - started - text_seconds
        evaluation = evaluate_model(student.causal_lm(), models.target_tokenizer, settings.test_items(cell.skill))
        return {
            "recipe": asdict(recipe),
            "training_passages": len(training),
            **figures(evaluation),
            "held_out_kl": [before.kl, after.kl],
            "agreement": [before.agreement, after.agreement],
            "last_loss": log[-1]["loss"],
            "scale": asdict(scale),
            "text_seconds": round(text_seconds, 1),
            "train_seconds": round(train_seconds, 1),
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def start_student(
        self, models: Models, plan: Plan, recipe: Recipe, training: list[AlignedPassage], seed: int
    ) -> Student:
        """The target with what is trained."""
        return start_student(models, plan, recipe, training, plan.rank(recipe, None), seed)


@dataclass(frozen=True)
class Nonlinear(Distilled):
    """The maps of a recipe with small networks beside them, run live."""

    def start_student(
        self, models: Models, plan: Plan, recipe: Recipe, training: list[AlignedPassage], seed: int
    ) -> Student:
        """The target with nonlinear maps around the frozen source factors."""
        set_seed(seed)
        model = attach_lora(models.target, plan.target_modules, plan.adapter_rank)
        attach_networks(model, plan.pairing, plan.factors, paper_maps(plan.pairing, plan.factors, seed))
        widths = models.target.config.hidden_size, models.source.config.hidden_size
        return Student(model, *widths, with_head=recipe.mse_weight > 0)


@dataclass(frozen=True)
class Labelled:
    """A fresh LoRA that learns source + LoRA's answers as if they were labels."""

    regimes: tuple[Regime, ...] = WITH_TEXT

    def run(self, settings: Settings, cell: Cell) -> dict[str, Any]:
        """Filters the answers, trains on what is left, and scores."""
        set_seed(cell.seed)
        recipe = _recipe(settings, cell, "default", "fresh", Tuning())
        plan, models, training, _ = _read_text(settings, cell, recipe)
        labelled = label_by_excess(training, contrastive_excess(models.teacher, training, recipe.batch_size))
        student = attach_lora(models.target, plan.target_modules, plan.rank(recipe, None))
        learn_labels(student, labelled, recipe, cell.seed)
        assert isinstance(student, PeftModelForCausalLM)
        evaluation = evaluate_model(student, models.target_tokenizer, settings.test_items(cell.skill))
        return {"recipe": asdict(recipe), "training_passages": len(labelled), **figures(evaluation)}


@dataclass(frozen=True)
class Solved:
    """A method that solves for the update from activations, without training."""

    solve: Literal["theseus", "ridge"]
    regimes: tuple[Regime, ...] = WITH_TEXT

    def run(self, settings: Settings, cell: Cell) -> dict[str, Any]:
        """Solves on the text of the cell, scales by the held-out objective, and scores."""
        set_seed(cell.seed)
        recipe = _recipe(settings, cell, "default", "ridge", Tuning())
        plan, models, training, held_out = _read_text(settings, cell, recipe)
        update = self._solve(plan, models, training, recipe)
        student = _attach_update(models.target, update)
        measure = partial(measure_held_out, models.teacher, examples=held_out, shared=models.shared, recipe=recipe)
        scale = keep_best_scale(student, measure, SOLVED_SCALES)
        evaluation = evaluate_model(student.causal_lm(), models.target_tokenizer, settings.test_items(cell.skill))
        return {
            "training_passages": len(training),
            "scale": asdict(scale),
            **figures(evaluation),
        }

    def _solve(self, plan: Plan, models: Models, training: list[AlignedPassage], recipe: Recipe) -> dict[str, LowRank]:
        with models.teacher.disable_adapter():
            moments = collect_moments(models.source, models.target, plan.pairing, training)
        if self.solve == "theseus":
            return theseus(plan.pairing, plan.factors, moments)
        return fold_maps(plan.pairing, plan.factors, ridge_maps(moments, plan.pairing, recipe.ridge))


@dataclass(frozen=True)
class Weighed:
    """A method that reads weights alone."""

    carry: Carry
    regimes: tuple[Regime, ...] = ("none",)

    def run(self, settings: Settings, cell: Cell) -> dict[str, Any]:
        """Carries by weights, and scores."""
        plan = cell.plan(settings)
        models = load_models(plan)
        update = carry_weights(plan.pairing, plan.factors, plan.source_slots, models.source, models.target, self.carry)
        model = _attach_update(models.target, update).causal_lm() if update else models.target
        evaluation = evaluate_model(model, models.target_tokenizer, settings.test_items(cell.skill))
        return {"carried_modules": [len(update), len(plan.target_modules)], **figures(evaluation)}


@dataclass(frozen=True)
class Constrained:
    """LoRA-X as published: an adapter in the source's singular subspace, trained on the task's labels, then carried."""

    regimes: tuple[Regime, ...] = ("none",)

    def run(self, settings: Settings, cell: Cell) -> dict[str, Any]:
        """Trains on the source as the zoo's adapters are, carries by weights, and scores both models."""
        plan = cell.plan(settings)
        factors, source_score = _constrained_adapter(settings, cell.source, cell.skill)
        models = load_models(plan)
        update = carry_weights(plan.pairing, factors, plan.source_slots, models.source, models.target, lora_x)
        model = _attach_update(models.target, update).causal_lm() if update else models.target
        evaluation = evaluate_model(model, models.target_tokenizer, settings.test_items(cell.skill))
        carried = [len(update), len(plan.target_modules)]
        return {"carried_modules": carried, "source + constrained adapter": source_score, **figures(evaluation)}


@lru_cache(maxsize=4)
def _constrained_adapter(settings: Settings, source: str, skill: str) -> tuple[dict[str, LowRank], float]:
    """The factors of a constrained adapter by module, and what the source scores with it."""
    set_seed(0)
    model, tokenizer = load_model(str(settings.base(source)))
    slots = linear_slots(model, model.config)
    adapted = set(read_factors(open_adapter(str(settings.adapter(source, skill))), model.config))
    adapter = attach_constrained(model, {name: slots[name] for name in adapted})
    train(adapter, tokenizer, settings.training_items(skill), 0, ADAPTER_STEPS, LEARNING_RATE)
    assert isinstance(adapter, PeftModelForCausalLM)
    score = evaluate_model(adapter, tokenizer, settings.test_items(skill)).score
    return student_factors(adapter, adapted), score


@dataclass(frozen=True)
class LogitDelta:
    """The sum of the target's predictions and what the adapter changes in the source's; no adapter comes of it."""

    regimes: tuple[Regime, ...] = ("none",)

    def run(self, settings: Settings, cell: Cell) -> dict[str, Any]:
        """Scores three models together."""
        models = load_models(cell.plan(settings))
        teacher = models.teacher
        assert isinstance(teacher, PeftModelForCausalLM)
        items = settings.test_items(cell.skill)
        return figures(
            evaluate_logit_delta(models.target, models.target_tokenizer, teacher, models.source_tokenizer, items)
        )


Method = Distilled | Labelled | Solved | Weighed | Constrained | LogitDelta
METHODS: dict[str, Method] = {
    "ridge start": Distilled("default", "ridge"),
    "ridge start, maps": Distilled("default", "ridge", Tuning(trained="maps")),
    "paper start": Distilled("default", "paper"),
    "fresh": Distilled("default", "fresh"),
    "ridge start, any prompts": Distilled("default", "ridge", Tuning(candidates=1), regimes=("format",)),
    "ridge start, running text": Distilled("default", "ridge", Tuning(write_answers=False), regimes=("general",)),
    "paper": Distilled("paper", "paper"),
    "paper, KL alone": Distilled("paper", "paper", Tuning(mse_weight=0.0)),
    "paper, MSE alone": Distilled("paper", "paper", Tuning(kl_weight=0.0)),
    "paper, nonlinear": Nonlinear("paper", "paper"),
    "synthetic data": Labelled(),
    "closed form": Solved("ridge"),
    "Theseus": Solved("theseus"),
    "direct copy": Weighed(direct_copy),
    "Cross-LoRA": Weighed(partial(cross_lora, form="aligned")),
    "Cross-LoRA, projected": Weighed(partial(cross_lora, form="projected")),
    "LoRA-X": Weighed(lora_x),
    "LoRA-X, constrained": Constrained(),
    "logit-delta oracle": LogitDelta(),
}
"""The default, its variants, the paper's recipe as a whole, the rivals, and what no adapter can hold."""


def _recipe(settings: Settings, cell: Cell, name: RecipeName, start: Start, tuning: Tuning) -> Recipe:
    tuning = replace(tuning, passages=settings.passages, max_length=settings.max_length)
    recipe = resolve_recipe(name, start, settings.steps, settings.batch_size, tuning)
    reads_running_text = cell.regime == "general" and not recipe.write_answers
    return replace(recipe, max_length=settings.running_length) if reads_running_text else recipe


def _read_text(
    settings: Settings, cell: Cell, recipe: Recipe
) -> tuple[Plan, Models, list[AlignedPassage], list[AlignedPassage]]:
    """The cell's models, and its training and held-out passages."""
    # Only the length of general text depends on the target; prompts serve all targets of a source.
    reading = cell if cell.regime == "general" else replace(cell, pair=f"{cell.source}:{cell.source}")
    passages = taught_passages(settings, reading, replace(recipe, start="fresh", trained="maps"))
    plan = cell.plan(settings)
    models = load_models(plan)
    return plan, models, *align_text(models, passages, recipe)


def _attach_update(target: PreTrainedModel, update: Mapping[str, LowRank]) -> Student:
    """The target with a given update as its LoRA."""
    model = attach_lora(target, update, max(lora.rank for lora in update.values()))
    start_from_factors(model, update)
    return Student(model, target.config.hidden_size, target.config.hidden_size, with_head=False)
