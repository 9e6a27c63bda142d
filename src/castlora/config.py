"""Recipes: where a transfer starts, what it minimises, and for how long."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from castlora.errors import UserError

Start = Literal["paper", "ridge", "readout", "fresh"]
Trained = Literal["maps", "factors"]
RecipeName = Literal["default", "paper"]
Tracker = Literal["tensorboard", "trackio", "wandb"]
"""Where the losses of a training can be shown while it runs."""
Bits = Literal[4, 8]
"""Of a weight of a quantized model."""
Regime = Literal["none", "general", "format", "prompts"]
"""What a method may read: weights alone, general text, text in the adapter's prompt format, or unlabelled prompts."""
Form = Literal["peft", "mlx", "merged", "gguf", "safetensors"]
"""Forms that an adapter can be written in."""
Role = Literal["q", "k", "v", "o", "gate", "up", "down", "fc"]
"""The part that a linear map plays in a decoder layer; `fc` is the first map of an ungated MLP."""
ShapeName = Literal["zoo", "1b", "7b", "7b-13b"]
"""Sizes of the models on which speed is measured."""
REGIMES: tuple[Regime, ...] = ("none", "general", "format", "prompts")


@dataclass(frozen=True)
class Recipe:
    """All numbers of a transfer that are not its inputs."""

    start: Start
    """`paper`: random maps; `ridge`: closed-form maps; `readout`: these, and the target's last layer is then solved for
    what source + LoRA predicts; `fresh`: a plain LoRA without maps."""
    trained: Trained
    """`maps`: the maps, as in the paper; `factors`: the balanced factors of the LoRA that the maps fold into."""
    steps: int
    """Optimizer steps; 0 leaves the start as it is solved."""
    batch_size: int
    """Passages per step."""
    kl_weight: float
    """Weight of the KL divergence between the next-token distributions of teacher and student."""
    mse_weight: float
    """Weight of the squared error between final hidden states through a trained head, as a share of the square of the
    teacher's, at all aligned positions, those of prompts included."""
    chunk_weight: float
    """Weight of the chunk log-probability loss where the two tokenizers cut the text differently."""
    temperature: float
    """Divides both sets of logits before the KL divergence."""
    context_weight: float
    """Weight of a next-token prediction inside a prompt; those of the answer count 1. Plain text has no prompt."""
    write_answers: bool
    """Whether source + LoRA continues each prompt, so that the later tokens of an answer are taught too. General text
    is then put into prompt formats; otherwise it is read as it runs."""
    answer_tokens: int
    """Tokens of the longest answer that source + LoRA writes."""
    learning_rate_scale: float
    """Peak learning rate times the target's hidden size, for batches of 16 passages; wider models need smaller steps,
    and smaller batches too, by the square root of their size."""
    map_learning_rate_ratio: float
    """Learning rate of maps as a share of the one that a plain LoRA has."""
    ridge: float
    """Penalty of the closed form relative to the mean square of the activations."""
    passages: int
    """Passages of running text, or given prompts, drawn for training; they are read again when the steps outlast
    them."""
    fewest_prompts: int
    """Given prompts that are fewer are filled up to this number with variants of themselves; 0 leaves them as they
    are."""
    filled_passages: int
    """Prompts made of general text that are kept for training."""
    candidates: int
    """Prompts made of general text for each that is kept; those that tell most about the skill are kept."""
    sentences: int
    """Most sentences in the slot of a prompt format."""
    format_candidates: int
    """Prompt formats that are tried where the adapter's own is not known, to find the ones it listens to; 0 takes
    generic ones."""
    max_length: int
    """Tokens per passage, counted in the tokenizer that needs more."""
    rehearsal_weight: float
    """Weight of the KL divergence between the bare target and the student on text that the bare target wrote; it keeps
    what the target does elsewhere as it is."""
    rehearsal_passages: int
    """Passages that the bare target writes for it."""
    rehearsal_tokens: int
    """Tokens of the longest of them."""


PAPER = Recipe(
    start="paper",
    trained="maps",
    steps=1000,
    batch_size=16,
    kl_weight=1.0,
    mse_weight=1.0,
    chunk_weight=0.0,
    temperature=2.0,
    context_weight=1.0,
    write_answers=False,
    answer_tokens=48,
    learning_rate_scale=1.2,
    map_learning_rate_ratio=0.1,
    ridge=0.1,
    passages=16000,
    fewest_prompts=0,
    filled_passages=16000,
    candidates=1,
    sentences=1,
    format_candidates=0,
    max_length=128,
    rehearsal_weight=0.0,
    rehearsal_passages=512,
    rehearsal_tokens=48,
)
"""The paper (arXiv 2510.17902) as far as it is stated: KL + MSE, general text, 1000 steps."""

DEFAULT = replace(
    PAPER,
    start="ridge",
    trained="factors",
    mse_weight=0.0,
    temperature=1.0,
    chunk_weight=1.0,
    context_weight=0.0,
    write_answers=True,
    passages=8000,
    fewest_prompts=500,
    filled_passages=2000,
    candidates=32,
    sentences=3,
    format_candidates=400,
    rehearsal_weight=0.1,
)
"""What `castlora transfer` does unless told otherwise; docs/results.md compares its start with the others."""

RECIPES: dict[RecipeName, Recipe] = {"default": DEFAULT, "paper": PAPER}

_TRAINED_BY_START: dict[Start, Trained] = {"paper": "maps", "readout": "factors"}
_SOLVED_STARTS: tuple[Start, ...] = ("ridge", "readout")
_ABOVE_ZERO = (
    "batch_size", "temperature", "learning_rate_scale", "passages", "filled_passages", "candidates",
    "sentences", "max_length", "answer_tokens", "rehearsal_passages", "rehearsal_tokens",
)  # fmt: skip
_ZERO_OR_MORE = (
    "steps", "kl_weight", "mse_weight", "chunk_weight", "context_weight", "ridge", "map_learning_rate_ratio",
    "fewest_prompts", "format_candidates", "rehearsal_weight",
)  # fmt: skip


@dataclass(frozen=True)
class TextTuning:
    """Departures from the recipe in what source + LoRA is asked; a field left out keeps the recipe's value."""

    passages: int | None = None
    """passages of running text, or given prompts, drawn for training"""
    fewest_prompts: int | None = None
    """given prompts that are fewer are filled up to this number with variants of themselves; 0 leaves them as given"""
    filled_passages: int | None = None
    """prompts made of general text that are kept for training"""
    candidates: int | None = None
    """prompts made of general text for each that is kept; fewer are faster"""
    sentences: int | None = None
    """most sentences in the slot of a prompt format"""
    format_candidates: int | None = None
    """prompt formats that are tried where the adapter's own is not known; 0 takes generic ones"""
    max_length: int | None = None
    """tokens per passage, counted in the tokenizer that needs more"""
    answer_tokens: int | None = None
    """tokens of the longest answer that source + LoRA writes"""


@dataclass(frozen=True)
class Tuning(TextTuning):
    """Departures from the recipe; a field left out keeps the recipe's value."""

    trained: Trained | None = None
    """what is trained: the maps, as in the paper, or the factors of the LoRA that they fold into"""
    kl_weight: float | None = None
    """weight of the KL divergence between the next-token distributions of source + LoRA and target"""
    mse_weight: float | None = None
    """weight of the error of final hidden states, relative to those of source + LoRA; prompts are included"""
    chunk_weight: float | None = None
    """weight of the chunk log-probability loss, where the tokenizers cut the text differently"""
    temperature: float | None = None
    """divides both sets of logits before the KL divergence"""
    context_weight: float | None = None
    """weight of a next-token prediction inside a prompt; those of the answer count 1"""
    write_answers: bool | None = None
    """whether source + LoRA answers prompts; otherwise text is read as it runs"""
    learning_rate_scale: float | None = None
    """peak learning rate times the target's hidden size, for batches of 16"""
    map_learning_rate_ratio: float | None = None
    """learning rate of maps as a share of that of a plain LoRA"""
    ridge: float | None = None
    """penalty of the closed form relative to the mean square of the activations"""
    rehearsal_weight: float | None = None
    """weight of keeping the bare target's predictions on text that it wrote itself; 0 leaves that out"""
    rehearsal_passages: int | None = None
    """passages that the bare target writes for it"""
    rehearsal_tokens: int | None = None
    """tokens of the longest of them"""


def resolve_recipe(
    name: RecipeName, start: Start | None, steps: int | None, batch_size: int | None, tuning: TextTuning
) -> Recipe:
    """The named recipe with the given departures.

    Unless told otherwise, maps are trained where the start is the paper's, and factors where it is `readout`, which is
    the start where there is no step.

    Raises:
        UserError: a number is out of range.
    """
    start = "readout" if steps == 0 and start is None else start
    departures: dict[str, Any] = {"start": start, "steps": steps, "batch_size": batch_size, **asdict(tuning)}
    if departures.get("trained") is None and start in _TRAINED_BY_START:
        departures["trained"] = _TRAINED_BY_START[start]
    recipe = replace(RECIPES[name], **{field: value for field, value in departures.items() if value is not None})
    check_above_zero(**{field: getattr(recipe, field) for field in _ABOVE_ZERO})
    check_zero_or_more(**{field: getattr(recipe, field) for field in _ZERO_OR_MORE})
    if recipe.rehearsal_tokens < 2:
        raise UserError("rehearsal_tokens is 1, and the first token of a text is given; give 2 or more.")
    if recipe.steps == 0 and recipe.start not in _SOLVED_STARTS:
        raise UserError(f"steps is 0, and the {recipe.start} start moves nothing before it is trained; give 'readout'.")
    if recipe.start == "paper" and recipe.trained == "factors":
        raise UserError("trained is 'factors', but the maps of the paper start fold into nothing; give 'maps'.")
    if recipe.start == "readout" and recipe.trained == "maps":
        raise UserError("trained is 'maps', but the solved last layer of the readout start is no map; give 'factors'.")
    if recipe.kl_weight + recipe.mse_weight + recipe.chunk_weight == 0:
        raise UserError("kl_weight, mse_weight and chunk_weight are all 0; give at least one of them a weight.")
    return recipe


def check_above_zero(**settings: float) -> None:
    """Raises a UserError if one of the settings, by name, is not a number above 0."""
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise UserError(f"{name} is {value}; give a number above 0.")


def check_zero_or_more(**settings: float) -> None:
    """Raises a UserError if one of the settings, by name, is not 0 or a number above it."""
    for name, value in settings.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{name} is {value}; give 0 or more.")


def check_seed(seed: int) -> None:
    """Raises a UserError if a seed is none that all generators of random numbers take."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; give a whole number from 0 to 2**32 - 1.")


def recipe_differences(recipe: Recipe, name: RecipeName) -> dict[str, Any]:
    """The fields in which a resolved recipe departs from the named one."""
    named = RECIPES[name]
    pairs = ((field.name, getattr(recipe, field.name), getattr(named, field.name)) for field in fields(Recipe))
    return {field: value for field, value, original in pairs if value != original}
