"""The last module of the target whose output nothing but the final norm and the output head reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlora.adapters import KEY_PREFIX
from castlora.capture import capture, change_output
from castlora.models import LinearSlot
from castlora.objective import class_log_probabilities
from castlora.positions import AlignedPassage, Batch, batches, counted_places
from castlora.readout import Places, Tail
from castlora.teacher import Teacher
from castlora.vocabulary import SharedVocabulary

_BATCH = 16
_TOLERANCE = 1e-3
_EXAMPLE = [[5, 6, 7]]


@dataclass(frozen=True)
class LastLayer:
    """Where the last layer of a model is solved for."""

    module: str
    norm: str
    tail: Tail


@torch.no_grad()
def find_last_layer(model: PreTrainedModel, slots: Mapping[str, LinearSlot]) -> LastLayer | None:
    """The last `down` map of a model, if its output is added to what the final norm and a linear head read.

    Whether it is is tried, since some families scale it, norm it again or squash the logits: None for those.

    Args:
        model: the bare target
        slots: its linear modules
    """
    last = max(slot.layer for slot in slots.values())
    names = [slot.name for slot in slots.values() if slot.layer == last and slot.roles == ("down",)]
    norm = _final_norm(model)
    head = model.get_output_embeddings()
    if len(names) != 1 or norm is None or not isinstance(head, nn.Linear):
        return None
    ids = torch.tensor(_EXAMPLE, device=model.device)
    with capture(model, [norm]) as before:
        logits = model(input_ids=ids, use_cache=False).logits
    kept = dict(before)
    noise = torch.randn_like(kept[norm].inputs)
    with capture(model, [norm]) as after, change_output(model, names[0], lambda output: output + noise):
        model(input_ids=ids, use_cache=False)
    is_added = _is_near(after[norm].inputs - kept[norm].inputs, noise)
    is_linear = _is_near(kept[norm].outputs.float() @ head.weight.float().T, logits)
    if not (is_added and is_linear):
        return None
    module, hidden = model.get_submodule(norm), kept[norm].inputs
    is_centred = _is_near(module(hidden + hidden.std()), kept[norm].outputs)
    return LastLayer(names[0], norm, Tail(module, head.weight.detach().float(), is_centred))


@torch.no_grad()
def collect_places(
    student: PeftModel, teacher: Teacher, site: LastLayer, passages: Sequence[AlignedPassage], shared: SharedVocabulary
) -> Places:
    """Reads answered prompts with the student and the teacher.

    Args:
        student: the target with a LoRA that leaves the module of the site as it is
        teacher: whose predictions are taken
        site: where the student is looked at
        passages: the text, aligned
        shared: how the vocabularies correspond
    """
    module, norm = KEY_PREFIX + site.module, KEY_PREFIX + site.norm
    device = next(student.parameters()).device
    found: list[Places] = []
    for batch in batches(passages, _BATCH, device):
        in_answer, is_aligned, next_tokens = _answer_tokens(batch)
        with capture(student, [module, norm]) as captured:
            student(
                input_ids=batch["target_ids"], attention_mask=batch["target_mask"], use_cache=False, logits_to_keep=1
            )
        counts = batch["weights"] > 0
        logits = teacher.predict(batch).aligned(counts)
        said = class_log_probabilities(logits, shared.source_classes.to(device), shared.classes)
        taught = said.new_zeros(*in_answer.shape, shared.classes)
        taught[counted_places(batch["target_positions"], counts)] = said
        # OPT's MLP reads the tokens of all passages as one long row.
        features = captured[module].inputs.reshape(*in_answer.shape, -1)
        rows = features, captured[norm].inputs, taught, next_tokens, is_aligned
        found.append(Places(*(tensor[in_answer].float() for tensor in rows[:3]), *(row[in_answer] for row in rows[3:])))
    return Places(**{name: torch.cat([vars(one)[name] for one in found]) for name in vars(found[0])})


def _answer_tokens(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the target from the first position that counts to the last, aligned ones, and the token after each.

    Returns:
        shape (batch, tokens) each; the token after the last one is -1
    """
    counts, positions, ids = batch["weights"] > 0, batch["target_positions"], batch["target_ids"]
    first = positions.masked_fill(~counts, ids.shape[1]).amin(1, keepdim=True)
    last = positions.masked_fill(~counts, -1).amax(1, keepdim=True)
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    is_aligned = torch.zeros_like(ids, dtype=torch.bool)
    is_aligned[counted_places(positions, counts)] = True
    length = batch["target_mask"].sum(1, keepdim=True)
    next_tokens = ids.roll(-1, dims=1).masked_fill(place + 1 >= length, -1)
    return (first <= place) & (place <= last), is_aligned, next_tokens


def _final_norm(model: PreTrainedModel) -> str | None:
    """The module whose output the output head reads."""
    outputs: dict[str, object] = {}
    read: list[Tensor] = []

    def keep(name: str) -> object:
        return lambda _module, _inputs, output: outputs.__setitem__(name, output)

    head = model.get_output_embeddings()
    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(keep(name)) for name, module in leaves if module is not head]
    handles.append(head.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0])))
    try:
        model(input_ids=torch.tensor(_EXAMPLE, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    # What the head reads is a view, cut to the tokens whose logits are asked for.
    tensors = ((name, output) for name, output in outputs.items() if isinstance(output, Tensor))
    return next((name for name, output in tensors if output.data_ptr() == read[0].data_ptr()), None)


def _is_near(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ by little more than roundings."""
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())
