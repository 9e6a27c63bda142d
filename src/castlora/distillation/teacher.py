"""What models predict on aligned passages, and the teacher: source + LoRA, run anew or remembered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from castlora.alignment.positions import AlignedPassage, Batch, Side, batches, counted_places
from castlora.distillation.divergence import Compared

_SMALLEST_LIMIT = 1 << 30
_RECORD_BATCH = 16


@dataclass(frozen=True)
class Predictions:
    """What a model predicts on a batch, from the first token on whose prediction counts in any passage.

    Before it lie the prompts: their logits are never computed, which saves most of the memory of large vocabularies.
    """

    logits: Tensor
    """Shape (batch, kept tokens, vocabulary)."""
    ids: Tensor
    """The tokens read, shape (batch, kept tokens)."""
    positions: Tensor
    """Aligned positions among the kept tokens, shape (batch, aligned); 0 for those that lie before."""
    hidden: Tensor
    """Final hidden states of all tokens, shape (batch, tokens, hidden); no tokens where not asked for."""

    def aligned(self, counts: Tensor) -> Tensor:
        """Logits at the aligned positions where `counts` (batch, aligned) is true: (positions, vocabulary), fp32."""
        return self.logits[counted_places(self.positions, counts)].float()

    def compared(self, counts: Tensor, classes: Tensor | None) -> Compared:
        """The predictions at the aligned positions where `counts` (batch, aligned) is true, over classes of tokens."""
        passages, tokens = counted_places(self.positions, counts)
        device = self.logits.device
        return Compared(
            self.logits.flatten(0, 1),
            passages * self.logits.shape[1] + tokens,
            None if classes is None else classes.to(device),
        )


def predict(model: nn.Module, batch: Batch, side: Side, with_hidden: bool = False) -> Predictions:
    """Reads a batch with a model.

    Args:
        model: teacher or student
        batch: aligned passages; some position has a weight
        side: whose ids and positions to read
        with_hidden: return hidden states too
    """
    ids, positions = batch[f"{side}_ids"], batch[f"{side}_positions"]
    first = _first_counted(batch, side)
    output = model(
        input_ids=ids,
        attention_mask=batch[f"{side}_mask"],
        output_hidden_states=with_hidden,
        use_cache=False,
        logits_to_keep=torch.arange(first, ids.shape[1], device=ids.device),
    )
    hidden = output.hidden_states[-1] if with_hidden else output.logits.new_empty(len(ids), 0, 0)
    return Predictions(output.logits, ids[:, first:], (positions - first).clamp_min(0), hidden)


class Teacher(Protocol):
    """Whose predictions are taught."""

    def predict(self, batch: Batch) -> Predictions:
        """What the teacher predicts on a batch, without gradients."""
        ...


@dataclass(frozen=True)
class LiveTeacher:
    """A model that reads every batch."""

    model: nn.Module
    with_hidden: bool
    """Whether hidden states are taught too."""

    @torch.no_grad()
    def predict(self, batch: Batch) -> Predictions:
        """Reads the batch."""
        return predict(self.model, batch, "source", self.with_hidden)


@dataclass(frozen=True)
class _Record:
    logits: Tensor
    """Of the last tokens of the passage, from the first whose prediction counts: (kept tokens, vocabulary)."""
    hidden: Tensor
    """Of all tokens, shape (tokens, hidden); no tokens where they are not taught."""


class RecordedTeacher:
    """The predictions of a model on passages that are read again and again; the model itself is no longer run."""

    def __init__(self, model: nn.Module, passages: Sequence[AlignedPassage], with_hidden: bool) -> None:
        """Reads every passage once.

        Args:
            model: source + LoRA
            passages: all that will be asked for
            with_hidden: whether hidden states are taught too
        """
        self.records: dict[tuple[int, ...], _Record] = {}
        # The same text may be there twice with unlike answers; the longer one holds both.
        by_answer = sorted(passages, key=lambda passage: (len(passage.source_ids), _counted_tokens(passage)))
        live = LiveTeacher(model, with_hidden)
        start = 0
        for batch in batches(by_answer, _RECORD_BATCH, next(model.parameters()).device):
            read = live.predict(batch)
            width = batch["source_ids"].shape[1]
            for row, passage in enumerate(by_answer[start : start + len(batch["source_ids"])]):
                length = len(passage.source_ids)
                end = length - (width - read.logits.shape[1])
                logits = read.logits[row, end - _counted_tokens(passage) : end]
                record = _Record(logits.cpu().clone(), read.hidden[row, :length].cpu().clone())
                self.records[tuple(passage.source_ids)] = record
            start += len(batch["source_ids"])

    @torch.no_grad()
    def predict(self, batch: Batch) -> Predictions:
        """The predictions as the model would make them; none for tokens of a passage before the first that counts."""
        ids, positions = batch["source_ids"], batch["source_positions"]
        lengths = batch["source_mask"].sum(1).tolist()
        rows = [self.records[tuple(row[:length])] for row, length in zip(ids.tolist(), lengths, strict=True)]
        first = _first_counted(batch, "source")
        logits = rows[0].logits.new_zeros(len(ids), ids.shape[1] - first, rows[0].logits.shape[-1])
        for row, (record, length) in enumerate(zip(rows, lengths, strict=True)):
            kept = record.logits[max(0, len(record.logits) - (length - first)) :]
            logits[row, length - first - len(kept) : length - first] = kept
        hidden = pad_sequence([record.hidden for record in rows], batch_first=True)
        return Predictions(
            logits.to(ids.device), ids[:, first:], (positions - first).clamp_min(0), hidden.to(ids.device)
        )


def record_bytes(model: PreTrainedModel, passages: Sequence[AlignedPassage], with_hidden: bool) -> int:
    """Memory of a model's predictions on these passages, in bytes."""
    config = model.config.get_text_config()
    numbers: int = config.vocab_size * sum(map(_counted_tokens, passages))
    if with_hidden:
        numbers += config.hidden_size * sum(len(passage.source_ids) for passage in passages)
    return model.dtype.itemsize * numbers


def record_limit(model: PreTrainedModel) -> int:
    """Bytes that a record may take; the teacher of a longer one reads every batch anew.

    As much as the model itself, for which there was room when it was loaded, and 1 GiB at least. What is free on a
    machine has no say: whether there is a record can be seen in the last digits of what is trained.
    """
    return max(_SMALLEST_LIMIT, int(model.get_memory_footprint()))


def _first_counted(batch: Batch, side: Side) -> int:
    """First token whose prediction counts in any passage of a batch."""
    return int(batch[f"{side}_positions"][batch["weights"] > 0].min())


def _counted_tokens(passage: AlignedPassage) -> int:
    """Source tokens from the first on whose prediction counts."""
    places = zip(passage.source_positions, passage.weights, strict=True)
    return len(passage.source_ids) - min(position for position, weight in places if weight > 0)
