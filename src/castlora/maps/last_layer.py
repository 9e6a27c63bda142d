"""The last module of the target, whose output only the final norm and the output head read, and its solution."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlora.adapters.factors import KEY_PREFIX, LowRank
from castlora.adapters.live import lora_maps, start_from_factors
from castlora.alignment.positions import AlignedPassage, Batch, batches, counted_places
from castlora.alignment.vocabulary import SharedVocabulary
from castlora.distillation.distill import HeldOut, Student
from castlora.distillation.objective import chunk_log_probabilities, class_log_probabilities
from castlora.distillation.rehearsal import PASSAGES_PER_REHEARSED, Rehearsal
from castlora.distillation.teacher import Predictions, Teacher
from castlora.maps.readout import Places, Tail, solve_readout
from castlora.models.capture import capture, change_output, final_norm
from castlora.models.modules import LinearSlot

logger = logging.getLogger("castlora")

_BATCH = 16
_TOLERANCE, _ROUNDINGS = 1e-3, 4.0
_EXAMPLE = [[5, 6, 7]]
_MOST_BYTES = 2 << 30
"""Of what is known at places; most of it are the teacher's predictions, which are as wide as its vocabulary."""


@dataclass(frozen=True)
class LastLayer:
    """Where the last layer of a model is solved for."""

    module: str
    norm: str
    tail: Tail


@dataclass(frozen=True)
class Solution:
    """How the last layer was solved for."""

    module: str
    losses: list[float]
    """Objective on held-out text with what the module had before, and with each solution; the least was taken."""


@torch.no_grad()
def solve_last_layer(
    student: Student,
    site: LastLayer,
    teacher: Teacher,
    passages: Sequence[AlignedPassage],
    shared: SharedVocabulary,
    measure: Callable[[Student], HeldOut],
    rehearsal: Rehearsal,
    rehearsal_weight: float,
) -> Solution:
    """Has the last module predict what the teacher does, as far as its update can; `readout` has the maths.

    Args:
        student: the target with a LoRA on that module and perhaps on others; changed in place
        site: where that is
        teacher: whose predictions are taken
        passages: the text, aligned
        shared: how the vocabularies correspond
        measure: compares the student as it stands with its teacher on held-out text
        rehearsal: text on which the target is to predict what it does without its LoRA
        rehearsal_weight: of that text, where all answers together weigh 1
    """
    lora_a, lora_b = lora_maps(student.model, site.module)
    as_it_was = LowRank(lora_a.weight.clone(), lora_b.weight.clone())
    lora_b.weight.zero_()
    places = collect_places(student.model, teacher, site, passages, shared.source_classes, shared.classes)
    if rehearsal_weight > 0:
        own = rehearsal.passages[: math.ceil(len(passages) / PASSAGES_PER_REHEARSED)]
        kept = collect_places(student.model, rehearsal.bare, site, own, shared.target_classes, shared.classes)
        places = Places.together([places.weighing(1), kept.weighing(rehearsal_weight)])
    classes = shared.target_classes.to(places.hidden.device)
    candidates = [as_it_was, *solve_readout(places, site.tail, classes, as_it_was.rank)]
    losses = []
    for update in candidates:
        start_from_factors(student.model, {site.module: update})
        losses.append(measure(student).loss)
    best = losses.index(min(losses))
    start_from_factors(student.model, {site.module: candidates[best]})
    logger.info("Last layer solved: held-out objective %.4f before, %.4f after", losses[0], losses[best])
    return Solution(site.module, losses)


@torch.no_grad()
def find_last_layer(model: PreTrainedModel, slots: Mapping[str, LinearSlot]) -> LastLayer | None:
    """The last `down` map of a model, if its output is added to what the final norm and a linear head read.

    Whether it is is tried, since some families scale it, norm it again or squash the logits: None for those.

    Args:
        model: the target, with or without an adapter
        slots: its linear modules
    """
    last = max(slot.layer for slot in slots.values())
    names = [slot.name for slot in slots.values() if slot.layer == last and slot.roles == ("down",)]
    ids = torch.tensor(_EXAMPLE, device=model.device)
    norm = final_norm(model, ids)
    head = model.get_output_embeddings()
    # Quantized weights cannot be multiplied as they are.
    if len(names) != 1 or norm is None or not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        return None
    with capture(model, [norm]) as before:
        logits = model(input_ids=ids, use_cache=False).logits
    hidden, normed = before[norm].inputs, before[norm].outputs
    # As large as what it is added to, so that a model of 16 bits does not round it away.
    noise = torch.randn_like(hidden) * hidden.float().std().to(hidden.dtype)
    with capture(model, [norm]) as after, change_output(model, names[0], lambda output: output + noise):
        model(input_ids=ids, use_cache=False)
    is_added = _is_near(after[norm].inputs.float() - hidden.float(), noise)
    is_linear = _is_near(normed.to(head.weight.dtype) @ head.weight.T, logits)
    if not (is_added and is_linear):
        return None
    module = model.get_submodule(norm)
    is_centred = _is_near(module(hidden + hidden.std()), normed)

    def norm_of(hidden_states: Tensor) -> Tensor:
        normed_states: Tensor = module(hidden_states.to(hidden.dtype))
        return normed_states.float()

    return LastLayer(names[0], norm, Tail(norm_of, head.weight.detach(), is_centred))


@torch.no_grad()
def collect_places(
    student: PeftModel,
    teacher: Teacher,
    site: LastLayer,
    passages: Sequence[AlignedPassage],
    teacher_classes: Tensor,
    classes: int,
) -> Places:
    """Reads passages with the student and the teacher, as many as there is room for; prompts teach nothing.

    Args:
        student: the target with a LoRA that leaves the module of the site as it is
        teacher: whose predictions are taken
        site: where the student is looked at
        passages: the text, aligned
        teacher_classes: class of each token that the teacher predicts, shape (vocabulary of the teacher,)
        classes: number of classes
    """
    module, norm = KEY_PREFIX + site.module, KEY_PREFIX + site.norm
    device = next(student.parameters()).device
    found: list[Places] = []
    taken = 0
    for batch in batches(passages, _BATCH, device):
        in_answer, is_aligned, next_tokens = _answer_tokens(batch)
        with capture(student, [module, norm]) as captured:
            student(
                input_ids=batch["target_ids"], attention_mask=batch["target_mask"], use_cache=False, logits_to_keep=1
            )
        counts = _is_answered(batch)
        predicted = teacher.predict(batch)
        of_classes = class_log_probabilities(predicted.aligned(counts), teacher_classes.to(device), classes)
        taught = of_classes.new_zeros(*in_answer.shape, classes)
        taught[counted_places(batch["target_positions"], counts)] = of_classes
        # OPT's MLP reads the tokens of all passages as one long row.
        features = captured[module].inputs.reshape(*in_answer.shape, -1)
        known = Places(
            features.float(),
            captured[norm].inputs.float(),
            taught,
            next_tokens,
            _next_taught(predicted, batch),
            is_aligned,
            torch.ones_like(is_aligned, dtype=torch.float32),
        )
        found.append(known.at(in_answer))
        taken += sum(tensor.nbytes for tensor in vars(found[-1]).values())
        if taken > _MOST_BYTES:
            break
    return Places.together(found)


def _answer_tokens(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the target from the first position that counts to the last, aligned ones, and the token after each.

    Returns:
        shape (batch, tokens) each; the token after the last one is -1
    """
    counts, positions, ids = _is_answered(batch), batch["target_positions"], batch["target_ids"]
    first = positions.masked_fill(~counts, ids.shape[1]).amin(1, keepdim=True)
    last = positions.masked_fill(~counts, -1).amax(1, keepdim=True)
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    is_aligned = torch.zeros_like(ids, dtype=torch.bool)
    is_aligned[counted_places(positions, counts)] = True
    length = batch["target_mask"].sum(1, keepdim=True)
    next_tokens = ids.roll(-1, dims=1).masked_fill(place + 1 >= length, -1)
    return (first <= place) & (place <= last), is_aligned, next_tokens


def _next_taught(predicted: Predictions, batch: Batch) -> Tensor:
    """Log-probability that the teacher gives to the target's next token, shape (batch, tokens).

    It is known where that token alone leads to the next aligned position; 0 elsewhere.
    """
    counts, positions = _is_answered(batch), batch["target_positions"]
    of_chunks = chunk_log_probabilities(predicted.logits, predicted.ids, predicted.positions)
    is_token = counts[:, :-1] & counts[:, 1:] & (positions.diff(dim=1) == 1)
    taught = of_chunks.new_zeros(batch["target_ids"].shape)
    taught[counted_places(positions[:, :-1], is_token)] = of_chunks[is_token]
    return taught


def _is_answered(batch: Batch) -> Tensor:
    """Aligned positions of answers, shape (batch, aligned); those inside prompts may weigh less than 1."""
    return batch["weights"] == 1


def _is_near(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ by little more than the roundings of the second one's dtype."""
    allowed = max(_TOLERANCE, _ROUNDINGS * torch.finfo(expected.dtype).eps)
    return bool((found.float() - expected.float()).norm() <= allowed * expected.float().norm())
