"""Methods of the benchmark that solve or carry without training on the target, and the oracle."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from peft import PeftModelForCausalLM
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from castlora.adapters.factors import LowRank, read_factors
from castlora.adapters.files import open_adapter
from castlora.adapters.live import attach_lora, start_from_factors, student_factors
from castlora.alignment.positions import AlignedPassage
from castlora.baselines.carry import Carry, carry_weights
from castlora.baselines.logit_delta import evaluate_logit_delta
from castlora.baselines.lora_x import attach_constrained, lora_x
from castlora.baselines.synthetic import IGNORED_LABEL, LabelledPassage, learn_labels
from castlora.baselines.theseus import theseus
from castlora.bench.grid import Cell, Settings, figures, score
from castlora.bench.reading import cell_recipe, read_text
from castlora.bench.trained import WITH_TEXT
from castlora.config import Recipe, Regime, Tuning
from castlora.distillation.distill import Student, measure_held_out
from castlora.distillation.teacher import RecordedTeacher
from castlora.evaluation.accuracy import evaluate_model
from castlora.evaluation.tasks import TaskItem
from castlora.maps.fitting import collect_moments, ridge_factors
from castlora.maps.scaling import SOLVED_SCALES, keep_best_scale
from castlora.maps.starts import fold_maps, random_maps
from castlora.model_pair import Models, load_models
from castlora.models.completions import encode_completion
from castlora.models.loading import best_device, context_length, load_model
from castlora.models.modules import linear_slots
from castlora.plan import Plan

_LABELLED_STEPS, _LABELLED_BATCH, _LABELLED_RATE = 400, 32, 4e-3
"""How the constrained adapter is trained on a task's labels: as the zoo's adapters are."""


@dataclass(frozen=True)
class Solved:
    """A method that solves for the update from activations, without training."""

    solve: Literal["ridge", "theseus", "permuted", "random"]
    """`permuted` and `random` are controls: the closed form of positions paired at random, and random rotations."""
    regimes: tuple[Regime, ...] = WITH_TEXT

    def run(self, settings: Settings, cell: Cell) -> dict[str, Any]:
        """Solves on the text of the cell, scales by the held-out objective, and scores."""
        set_seed(cell.seed)
        recipe = cell_recipe(settings, cell, "default", "ridge", Tuning(rehearsal_weight=0.0))
        reading = read_text(settings, cell, recipe)
        plan, models, training, held_out = reading.plan, reading.models, reading.training, reading.held_out
        update = self._solve(plan, models, training, recipe, cell.seed)
        student = attach_update(models.target, update)
        teacher = RecordedTeacher(models.teacher, held_out, with_hidden=False)
        measure = partial(measure_held_out, teacher, examples=held_out, shared=models.shared, recipe=recipe)
        scale = keep_best_scale(student, measure, SOLVED_SCALES)
        return {
            "training_passages": len(training),
            "scale": asdict(scale),
            **score(settings.spec, student.causal_lm(), models.target_tokenizer, cell.skill),
        }

    def _solve(
        self, plan: Plan, models: Models, training: list[AlignedPassage], recipe: Recipe, seed: int
    ) -> dict[str, LowRank]:
        if self.solve == "random":
            return fold_maps(plan.pairing, plan.factors, random_maps(plan.pairing, plan.factors, seed))
        permutation = torch.Generator().manual_seed(seed) if self.solve == "permuted" else None
        with models.teacher.disable_adapter():
            moments = collect_moments(models.source, models.target, plan.pairing, training, permutation)
        if self.solve == "theseus":
            return theseus(plan.pairing, plan.factors, moments)
        return ridge_factors(moments, plan.pairing, plan.factors, recipe.ridge)


@dataclass(frozen=True)
class Weighed:
    """A method that reads weights alone."""

    carry: Carry
    regimes: tuple[Regime, ...] = ("none",)

    def run(self, settings: Settings, cell: Cell) -> dict[str, Any]:
        """Carries by weights, and scores."""
        plan = cell.plan(settings.spec)
        models = load_models(plan)
        update = carry_weights(plan.pairing, plan.factors, plan.source_slots, models.source, models.target, self.carry)
        model = attach_update(models.target, update).causal_lm() if update else models.target
        scored = score(settings.spec, model, models.target_tokenizer, cell.skill)
        return {"carried_modules": [len(update), len(plan.target_modules)], **scored}


@dataclass(frozen=True)
class Constrained:
    """LoRA-X as published: an adapter in the source's singular subspace, trained on the task's labels, then carried."""

    regimes: tuple[Regime, ...] = ("none",)

    def run(self, settings: Settings, cell: Cell) -> dict[str, Any]:
        """Trains on the source as the zoo's adapters are, carries by weights, and scores both models."""
        plan = cell.plan(settings.spec)
        factors, source_score = _constrained_adapter(settings, cell.source, cell.skill)
        models = load_models(plan)
        update = carry_weights(plan.pairing, factors, plan.source_slots, models.source, models.target, lora_x)
        model = attach_update(models.target, update).causal_lm() if update else models.target
        scored = score(settings.spec, model, models.target_tokenizer, cell.skill)
        carried = [len(update), len(plan.target_modules)]
        return {"carried_modules": carried, "source + constrained adapter": source_score, **scored}


@lru_cache(maxsize=4)
def _constrained_adapter(settings: Settings, source: str, skill: str) -> tuple[dict[str, LowRank], float]:
    """The factors of a constrained adapter by module, and what the source scores with it."""
    set_seed(0)
    spec = settings.spec
    model, tokenizer = load_model(spec.base(source), device=best_device())
    slots = linear_slots(model, model.config)
    adapted = set(read_factors(open_adapter(spec.adapter(source, skill)), model.config))
    adapter = attach_constrained(model, {name: slots[name] for name in adapted})
    longest = context_length(model.config) - 1
    labelled = [_labelled(tokenizer, item, longest) for item in spec.training_items(skill)]
    learn_labels(adapter, labelled, _LABELLED_STEPS, _LABELLED_BATCH, _LABELLED_RATE, seed=0)
    assert isinstance(adapter, PeftModelForCausalLM)
    score = evaluate_model(adapter, tokenizer, spec.test_items(skill)).score
    return student_factors(adapter, adapted), score


def _labelled(tokenizer: PreTrainedTokenizerFast, item: TaskItem, max_length: int) -> LabelledPassage:
    """An item of which the completion and the end of the text are learned."""
    tokens = encode_completion(tokenizer, item.prompt, item.completion, max_length)
    ids = [*tokens.ids, int(tokenizer.eos_token_id or 0)]
    labels = [IGNORED_LABEL] * tokens.start + ids[tokens.start :]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


@dataclass(frozen=True)
class LogitDelta:
    """The sum of the target's predictions and what the adapter changes in the source's; no adapter comes of it."""

    regimes: tuple[Regime, ...] = ("none",)

    def run(self, settings: Settings, cell: Cell) -> dict[str, Any]:
        """Scores three models together."""
        models = load_models(cell.plan(settings.spec))
        teacher = models.teacher
        assert isinstance(teacher, PeftModelForCausalLM)
        items = settings.spec.test_items(cell.skill)
        return figures(
            evaluate_logit_delta(models.target, models.target_tokenizer, teacher, models.source_tokenizer, items)
        )


def attach_update(target: PreTrainedModel, update: Mapping[str, LowRank]) -> Student:
    """The target with a given update as its LoRA."""
    model = attach_lora(target, update, max(lora.rank for lora in update.values()))
    start_from_factors(model, update)
    return Student(model, target.config.hidden_size, target.config.hidden_size, with_head=False)
