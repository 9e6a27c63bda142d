"""Steering: the target runs with hidden states that were predicted from those of source + LoRA.

Method: ridge regression from the teacher's activations to the student's at one layer, "Thinking in Different Spaces",
arXiv 2603.20406. It needs both models for every answer and yields no adapter; `castlora transfer` does.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import set_seed

from castlora.alignment.positions import AlignedPassage, Batch, align_passages, batches, counted_places
from castlora.config import DEFAULT, Recipe, check_seed
from castlora.distillation.objective import chunk_log_probabilities
from castlora.errors import UserError
from castlora.evaluation.accuracy import Evaluation, judge_choices
from castlora.evaluation.tasks import TaskItem, load_task
from castlora.execution.run_directory import check_absent, write_new_file
from castlora.maps.solvers import ridge_map
from castlora.maps.statistics import Moments
from castlora.model_pair import Models, align_text, load_models
from castlora.models.capture import capture, change_output
from castlora.models.loading import context_length, public_name
from castlora.models.modules import layer_path, number_of_layers
from castlora.models.pairing import relative_depth
from castlora.plan import Plan, plan_transfer
from castlora.publishing.manifest import versions
from castlora.teaching.curriculum import TextSource, draw_text, prompt_formats
from castlora.text.passages import Passage

STEERED, CONTROL = "steered", "permuted pairs"
_DEPTH = 2 / 3
"""Where the target is steered unless told otherwise, as a share of its depth."""
_PASSAGES = 1024
"""Passages that the bridge is fitted on."""


@dataclass(frozen=True)
class Bridge:
    """An affine map from the source's hidden states to the target's."""

    weight: Tensor
    """Shape (d_target, d_source)."""
    source_mean: Tensor
    target_mean: Tensor

    @classmethod
    def fit(cls, moments: Moments, ridge: float) -> "Bridge":
        """Ridge regression with an offset.

        Args:
            moments: x: source hidden states, y: target hidden states
            ridge: strength of the penalty relative to the mean variance of the source's states
        """
        weight = ridge_map(*moments.covariances(), ridge)
        means = moments.sum_x / moments.count, moments.sum_y / moments.count
        return cls(weight.float(), *(mean.float() for mean in means))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Source states (..., d_source) → target states (..., d_target)."""
        offset = hidden.float() - self.source_mean.to(hidden.device)
        return offset @ self.weight.T.to(hidden.device) + self.target_mean.to(hidden.device)


@dataclass(frozen=True)
class Layers:
    """Module paths of the two decoder layers whose outputs are joined, inside the bare models."""

    source: str
    target: str

    @classmethod
    def at(cls, plan: Plan, target_layer: int | None) -> "Layers":
        """The given target layer, or the one at two thirds of the depth, and the source layer at the same depth.

        Raises:
            UserError: the target has no such layer.
        """
        depths = number_of_layers(plan.source_slots), number_of_layers(plan.target_slots)
        layer = round(_DEPTH * (depths[1] - 1)) if target_layer is None else target_layer
        if not 0 <= layer < depths[1]:
            raise UserError(f"--layer is {layer}, but the target has layers 0 to {depths[1] - 1}; give one of these.")
        partner = relative_depth(*depths)[layer]
        return cls(layer_path(plan.source_slots, partner), layer_path(plan.target_slots, layer))


@dataclass(frozen=True)
class Steering:
    """What steering does to the answers of a task."""

    evaluation: Evaluation
    corrected: float | None
    """Share of the items that the bare target answers wrong which are right now; None if it answers none wrong."""
    spoiled: float | None
    """Share of the items that the bare target answers right which are wrong now; None if it answers none right."""
    r_squared: float
    """Share of the variance of the target's hidden states that the bridge explains on held-out text."""


def steer(
    adapter: str,
    target: str,
    task: str,
    source: str | None = None,
    text: str | None = None,
    prompts: str | None = None,
    layer: int | None = None,
    strength: float = 1.0,
    seed: int = 0,
    out: str | None = None,
) -> dict[str, Any]:
    """Steers the target with source + LoRA on a task with choices, beside a control with permuted pairs.

    Args:
        adapter: folder or hub id of a PEFT LoRA
        target: folder or hub id of the model to steer
        task: JSON lines with `prompt`, `completion` and `choices`
        source: base model of the adapter, if not the one that its configuration names
        text: general text on which the bridge is fitted; by default allenai/c4
        prompts: file of unlabelled prompts to fit the bridge on instead
        layer: decoder layer of the target whose output is replaced; by default at two thirds of the depth
        strength: 0 keeps the target's own hidden states, 1 replaces them
        seed: of the draw of text and of the control's permutation
        out: JSON file to write

    Returns:
        scores of the bare target, the steered one and the control, correction rates and alignment R²

    Raises:
        UserError: bad input; nothing has been written.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"--strength is {strength}; give a number from 0 to 1.")
    check_seed(seed)
    if out is not None:
        check_absent(out)
    items = load_task(task)
    if items[0].choices is None:
        raise UserError(f"{task}: steering is measured on choices, and the items have none; give items with 'choices'.")
    set_seed(seed)
    plan = plan_transfer(adapter, target, source)
    layers = Layers.at(plan, layer)
    text_source = TextSource(text=text, prompts=prompts)
    text_source.check()
    models = load_models(plan)
    recipe = _reading_recipe(plan)
    formats = prompt_formats(models, text_source, recipe, seed)
    training, held_out = align_text(models, draw_text(models, text_source, formats, recipe, seed), recipe)
    bare = evaluate_steered(models, layers, items, None, 0.0)
    steered = {
        name: _steer_and_compare(models, layers, items, bare, training, held_out, strength, recipe, generator)
        for name, generator in ((STEERED, None), (CONTROL, torch.Generator().manual_seed(seed)))
    }
    record = {
        "adapter": public_name(adapter),
        "source": public_name(plan.source),
        "target": public_name(target),
        "task": Path(task).name,
        "text": text_source.regime,
        "layers": asdict(layers),
        "strength": strength,
        "seed": seed,
        "n": bare.n,
        "bare target": {"score": bare.score, "ci95": list(bare.ci95)},
        **{name: _figures(result) for name, result in steered.items()},
        "versions": versions(),
    }
    if out is not None:
        write_new_file(out, json.dumps(record, indent=1) + "\n")
    return record


def describe(record: Mapping[str, Any]) -> str:
    """What `steer` found, as a table for the terminal."""
    layers = record["layers"]
    lines = [
        f"{layers['source']} of {record['source']} + LoRA → {layers['target']} of {record['target']}",
        "                 accuracy  corrected  spoiled     R²",
        f"{'bare target':<16} {record['bare target']['score']:>8.3f}",
    ]
    for name in (STEERED, CONTROL):
        result = record[name]
        shares = ["–" if share is None else f"{share:.3f}" for share in (result["corrected"], result["spoiled"])]
        lines.append(f"{name:<16} {result['score']:>8.3f}  {shares[0]:>9}  {shares[1]:>7}  {result['r_squared']:>5.2f}")
    return "\n".join(lines)


@torch.no_grad()
def collect_residuals(
    models: Models, layers: Layers, passages: Sequence[AlignedPassage], permutation: torch.Generator | None = None
) -> Moments:
    """Moments of both layers' outputs over aligned positions.

    Args:
        models: source + LoRA and the bare target
        layers: whose outputs
        passages: the text, aligned
        permutation: pairs the positions of a batch at random, the control that must explain nothing
    """
    widths = models.source.config.get_text_config().hidden_size, models.target.config.get_text_config().hidden_size
    moments = Moments.zeros(*widths)
    for at_source, at_target in _paired_residuals(models, layers, passages):
        order = torch.arange(len(at_source))
        if permutation is not None:
            order = torch.randperm(len(at_source), generator=permutation)
        moments.update(at_source[order.to(at_source.device)], at_target)
    return moments


@torch.no_grad()
def explained_variance(models: Models, layers: Layers, passages: Sequence[AlignedPassage], bridge: Bridge) -> float:
    """R² of the bridge: 1 - Σ|y - bridge(x)|² / Σ|y - mean(y)|² over the aligned positions of held-out passages."""
    pairs = list(_paired_residuals(models, layers, passages))
    y = torch.cat([at_target for _, at_target in pairs]).float()
    predicted = torch.cat([bridge(at_source) for at_source, _ in pairs])
    return float(1 - (y - predicted).square().sum() / (y - y.mean(0)).square().sum())


@torch.no_grad()
def evaluate_steered(
    models: Models, layers: Layers, items: Sequence[TaskItem], bridge: Bridge | None, strength: float
) -> Evaluation:
    """Accuracy of the target by total log-likelihood of the choices, with its hidden states steered.

    Args:
        models: source + LoRA and the bare target
        layers: whose outputs are joined
        items: items with choices
        bridge: from the source's states to the target's; None leaves the target alone
        strength: share of the target's state that is replaced

    Raises:
        UserError: an item does not fit into both models, or log-likelihoods are not finite.
    """
    passages = [
        Passage(item.prompt + choice, len(item.prompt.encode())) for item in items for choice in item.choices or ()
    ]
    length = min(context_length(models.source.config), context_length(models.target.config))
    # One token more than fits, so that a cut is noticed: it would take the answer away.
    aligned = list(align_passages(passages, models.source_bytes, models.target_bytes, length + 1, context_weight=1e-6))
    if any(one.length > length for one in aligned):
        raise UserError(
            f"A task item is longer than the {length} tokens that both models can read; shorten its prompt."
        )
    if len(aligned) != len(passages):
        raise UserError("A task item has no place where both tokenizers agree; give longer prompts.")
    flat = []
    device = next(models.target.parameters()).device
    total = math.ceil(len(aligned) / DEFAULT.batch_size)
    for batch in tqdm(batches(aligned, DEFAULT.batch_size, device), desc="answers the task", total=total, unit="batch"):
        with _steered(models, layers, batch, bridge, strength) if bridge is not None else nullcontext():
            logits = models.target(
                input_ids=batch["target_ids"], attention_mask=batch["target_mask"], use_cache=False
            ).logits
        chunks = chunk_log_probabilities(logits, batch["target_ids"], batch["target_positions"])
        is_answer = batch["weights"][:, :-1] == 1
        is_text = batch["target_positions"].diff(dim=-1) > 0
        flat += (chunks * (is_answer & is_text)).sum(-1).double().tolist()
    if not np.isfinite(flat).all():
        raise UserError("Steering drives the target's log-likelihoods out of bounds; give a smaller --strength.")
    ends = np.cumsum([len(item.choices or ()) for item in items])
    return judge_choices(items, np.split(np.array(flat), ends[:-1]))


def _steer_and_compare(
    models: Models,
    layers: Layers,
    items: Sequence[TaskItem],
    bare: Evaluation,
    training: Sequence[AlignedPassage],
    held_out: Sequence[AlignedPassage],
    strength: float,
    recipe: Recipe,
    permutation: torch.Generator | None,
) -> Steering:
    bridge = Bridge.fit(collect_residuals(models, layers, training, permutation), recipe.ridge)
    evaluation = evaluate_steered(models, layers, items, bridge, strength)
    was_right, is_right = bare.scores == 1, evaluation.scores == 1
    return Steering(
        evaluation,
        corrected=_share(is_right[~was_right]),
        spoiled=_share(~is_right[was_right]),
        r_squared=explained_variance(models, layers, held_out, bridge),
    )


def _paired_residuals(
    models: Models, layers: Layers, passages: Sequence[AlignedPassage]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs of both layers at the aligned positions of each batch: (positions, d_source), (positions, d_target)."""
    device = next(models.target.parameters()).device
    total = math.ceil(len(passages) / DEFAULT.batch_size)
    for batch in tqdm(batches(passages, DEFAULT.batch_size, device), desc="reads the text", total=total, unit="batch"):
        counts = batch["weights"] > 0
        at_source = _residuals(models.source, layers.source, batch["source_ids"], batch["source_mask"])
        at_target = _residuals(models.target, layers.target, batch["target_ids"], batch["target_mask"])
        yield (
            at_source[counted_places(batch["source_positions"], counts)],
            at_target[counted_places(batch["target_positions"], counts)],
        )


def _residuals(model: nn.Module, layer: str, ids: Tensor, mask: Tensor) -> Tensor:
    with capture(model, [layer]) as seen:
        model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    return seen[layer].outputs


def _steered(
    models: Models, layers: Layers, batch: Batch, bridge: Bridge, strength: float
) -> AbstractContextManager[None]:
    """The target with its states at the aligned positions of this batch moved towards the bridge's."""
    counts = batch["weights"] > 0
    at_source = _residuals(models.source, layers.source, batch["source_ids"], batch["source_mask"])
    mapped = bridge(at_source[counted_places(batch["source_positions"], counts)])
    places = counted_places(batch["target_positions"], counts)

    def move(output: Tensor) -> Tensor:
        moved = output.clone()
        moved[places] = output[places].lerp(mapped.to(output.dtype), strength)
        return moved

    return change_output(models.target, layers.target, move)


def _reading_recipe(plan: Plan) -> Recipe:
    """General text as it runs, and every position counts."""
    length = min(DEFAULT.max_length, context_length(plan.source_config), context_length(plan.target_config))
    unanswered = replace(DEFAULT, write_answers=False, context_weight=1.0, candidates=1, sentences=1)
    return replace(unanswered, passages=_PASSAGES, filled_passages=_PASSAGES, max_length=length)


def _share(flags: np.ndarray) -> float | None:
    return float(flags.mean()) if len(flags) else None


def _figures(result: Steering) -> dict[str, Any]:
    return {
        "score": result.evaluation.score,
        "ci95": list(result.evaluation.ci95),
        "corrected": result.corrected,
        "spoiled": result.spoiled,
        "r_squared": result.r_squared,
    }
