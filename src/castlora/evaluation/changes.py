"""What an adapter changes in a model's predictions, and where in a text."""

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils import parametrize

from castlora.alignment.positions import AlignedPassage, Side, align_passages, batches
from castlora.distillation.objective import class_log_probabilities, kl_divergence
from castlora.distillation.teacher import predict
from castlora.model_pair import Models
from castlora.report import ChangedPiece, ChangedText
from castlora.text.passages import Passage


def update_divergence(with_update: Tensor, without: Tensor, classes: Tensor, count: int) -> Tensor:
    """KL(with the update ‖ without it) per position, in nats.

    Args:
        with_update: logits, shape (positions, vocabulary)
        without: logits of the bare model, shape (positions, vocabulary)
        classes: class of each token, shape (vocabulary,)
        count: number of classes

    Returns:
        shape (positions,)
    """
    changed, bare = (class_log_probabilities(logits, classes, count) for logits in (with_update, without))
    # Rounding may leave a divergence slightly below its bound.
    return kl_divergence(changed, bare).clamp_min(0.0)


def measure_changes(
    models: Models, student: PeftModel, passages: Sequence[Passage], max_length: int, limit: int
) -> list[ChangedText]:
    """Compares source + LoRA with the bare source, and the student with the bare target, on the same places of a text.

    Places inside prompts are measured too, although training may have left them out.

    Args:
        models: both models; the source carries the adapter
        student: the PEFT model around the target
        passages: held-out text
        max_length: tokens kept per passage, in either tokenizer
        limit: most passages that are measured
    """
    read = list(islice(_aligned(models, passages, max_length), limit))
    models.use("source")
    in_source = [_divergences(models.teacher, aligned, "source", models) for _, aligned in read]
    models.use("target")
    with parametrize.cached():
        in_target = [_divergences(student, aligned, "target", models) for _, aligned in read]
    return [
        _changed_text(models, passage, aligned, *changed)
        for (passage, aligned), *changed in zip(read, in_source, in_target, strict=True)
    ]


def _aligned(models: Models, passages: Sequence[Passage], max_length: int) -> Iterator[tuple[Passage, AlignedPassage]]:
    for passage in passages:
        for aligned in align_passages([passage], models.source_bytes, models.target_bytes, max_length, 1.0):
            yield passage, aligned


def _changed_text(
    models: Models, passage: Passage, aligned: AlignedPassage, source: Sequence[float], target: Sequence[float]
) -> ChangedText:
    raw, in_target = passage.text.encode(), passage.target_text.encode()
    encoded = models.source_bytes.encode(passage.text, add_special_tokens=not passage.is_chat)
    ends = encoded.ends[aligned.source_positions].tolist()
    pieces = cut_pieces(raw, ends, source, target, passage.answer_start)
    target_start = len(in_target) - len(raw) + ends[0]
    return ChangedText(_decoded(raw[: ends[0]]), _decoded(in_target[:target_start]), pieces)


@torch.no_grad()
def _divergences(model: PeftModel, aligned: AlignedPassage, side: Side, models: Models) -> list[float]:
    """What a model's adapter changes at each aligned position."""
    (batch,) = batches([aligned], 1, next(model.parameters()).device)
    counts = batch["weights"] > 0
    with_update = predict(model, batch, side).aligned(counts)
    with model.disable_adapter():
        without = predict(model, batch, side).aligned(counts)
    classes = models.shared.source_classes if side == "source" else models.shared.target_classes
    divergences: list[float] = update_divergence(with_update, without, classes, models.shared.classes).tolist()
    return divergences


def cut_pieces(
    text: bytes, ends: Sequence[int], source: Sequence[float], target: Sequence[float], answer_start: int
) -> list[ChangedPiece]:
    """Gives each piece of a text the change of the prediction that is made before it.

    A character that is cut into several pieces becomes one, with their largest changes. What follows the last
    position is left out where it is cut off, and empty where the text ends there.

    Args:
        text: UTF-8
        ends: bytes before each position, increasing
        source: nats per position
        target: nats per position
        answer_start: bytes before the answer
    """
    starts_character = [end == len(text) or not 0x80 <= text[end] < 0xC0 for end in ends]
    firsts = [index for index, starts in enumerate(starts_character) if starts or index == 0]
    pieces = []
    for first, following in pairwise([*firsts, len(ends)]):
        start = ends[first]
        if following == len(ends) and start < len(text):
            break
        stop = ends[following] if following < len(ends) else start
        pieces.append(
            ChangedPiece(
                _decoded(text[start:stop]),
                max(source[first:following]),
                max(target[first:following]),
                start >= answer_start,
            )
        )
    return pieces


def _decoded(text: bytes) -> str:
    return text.decode(errors="replace")
