"""Aligned positions: passages as token ids of both models with the places where they can be compared."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from castlora.alignment.tokens import ByteTokenizer, EncodedText, aligned_positions
from castlora.errors import UserError
from castlora.execution.processes import this_process
from castlora.text.passages import Passage

Side = Literal["source", "target"]
_ENCODE_BATCH = 512
_Example = TypeVar("_Example")


@dataclass(frozen=True)
class AlignedPassage:
    """One passage in both tokenizers."""

    source_ids: list[int]
    target_ids: list[int]
    source_positions: list[int]
    """Positions in `source_ids` where both models have read the same bytes."""
    target_positions: list[int]
    """The same places in `target_ids`."""
    weights: list[float]
    """How much the next-token prediction at each place counts."""
    is_general: bool = False
    """As that of the passage in text."""

    @property
    def length(self) -> int:
        """Tokens in the tokenizer that needs more."""
        return max(len(self.source_ids), len(self.target_ids))


class Examples(Dataset[_Example]):
    """Passages, or what holds them, in the form that torch and transformers read."""

    def __init__(self, examples: Sequence[_Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> _Example:
        """The example at a place."""
        return self.examples[index]


Batch = dict[str, Tensor]
"""`source_ids`, `source_mask`, `target_ids`, `target_mask`: (batch, tokens); `source_positions`,
`target_positions`, `weights`, `is_aligned`: (batch, aligned), weight 0 and not aligned where padded."""


def align_passages(
    passages: Iterable[Passage],
    source: ByteTokenizer,
    target: ByteTokenizer,
    max_length: int,
    context_weight: float,
) -> Iterator[AlignedPassage]:
    """Encodes passages with both tokenizers and finds their aligned positions.

    Tokens beyond `max_length` are cut off. A passage left without a position that counts is dropped.

    Args:
        passages: the text
        source: tokenizer of the source model
        target: tokenizer of the target model
        max_length: tokens kept per passage, in either tokenizer
        context_weight: weight of positions before the answer begins
    """
    for group in _groups(passages):
        special = not group[0].is_chat
        in_source = source.encode_batch([passage.text for passage in group], add_special_tokens=special)
        in_target = target.encode_batch([passage.target_text for passage in group], add_special_tokens=special)
        for passage, source_text, target_text in zip(group, in_source, in_target, strict=True):
            aligned = _align(passage, source_text, target_text, max_length, context_weight)
            if sum(aligned.weights) > 0:
                yield aligned


def _groups(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    """Groups of passages that are encoded together."""
    for _, alike in groupby(passages, key=lambda passage: passage.is_chat):
        while group := list(islice(alike, _ENCODE_BATCH)):
            yield group


def batches(passages: Sequence[AlignedPassage], batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Padded batches in the given order, on the device."""
    for batch in DataLoader(Examples(passages), batch_size, collate_fn=collate):
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def collate(examples: Sequence[AlignedPassage]) -> Batch:
    """Pads passages on the right into one batch."""

    def padded(rows: list[list[int]] | list[list[float]], dtype: torch.dtype) -> Tensor:
        return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)

    def mask(rows: list[list[int]], dtype: torch.dtype = torch.long) -> Tensor:
        return pad_sequence([torch.ones(len(row), dtype=dtype) for row in rows], batch_first=True)

    return {
        "source_ids": padded([example.source_ids for example in examples], torch.long),
        "source_mask": mask([example.source_ids for example in examples]),
        "target_ids": padded([example.target_ids for example in examples], torch.long),
        "target_mask": mask([example.target_ids for example in examples]),
        "source_positions": padded([example.source_positions for example in examples], torch.long),
        "target_positions": padded([example.target_positions for example in examples], torch.long),
        "weights": padded([example.weights for example in examples], torch.float32),
        "is_aligned": mask([example.source_positions for example in examples], torch.bool),
    }


def counted_places(positions: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Where the positions that count lie, to index activations or logits of shape (batch, tokens, width) with.

    Args:
        positions: aligned positions in the tokens of one side, shape (batch, aligned)
        counts: which of them count, shape (batch, aligned)

    Returns:
        passage and token of each, both of shape (counted,)
    """
    passages, _ = counts.nonzero(as_tuple=True)
    return passages, positions[counts]


def bytes_per_token(passages: Sequence[Passage], tokenizer: ByteTokenizer) -> float:
    """Mean UTF-8 bytes that a token of this tokenizer covers."""
    encoded = tokenizer.encode_batch([passage.text for passage in passages])
    return sum(len(passage.text.encode()) for passage in passages) / sum(len(text.ids) for text in encoded)


def _align(
    passage: Passage, source: EncodedText, target: EncodedText, max_length: int, context_weight: float
) -> AlignedPassage:
    answer_start = passage.answer_start
    if passage.target_prompt is not None:
        source = _from_end_of_prompt(source, answer_start)
        target = _from_end_of_prompt(target, len(passage.target_prompt.encode()))
        answer_start = 1
    in_source, in_target = aligned_positions(source.ends, target.ends)
    # Before the first byte the models predict different things where only one spells a leading space.
    kept = (in_source < max_length) & (in_target < max_length) & (source.ends[in_source] > 0)
    in_source, in_target = in_source[kept], in_target[kept]
    is_answer = source.ends[in_source] >= answer_start
    return AlignedPassage(
        source.ids[:max_length].tolist(),
        target.ids[:max_length].tolist(),
        in_source.tolist(),
        in_target.tolist(),
        [1.0 if answer else context_weight for answer in is_answer.tolist()],
        passage.is_general,
    )


def _from_end_of_prompt(text: EncodedText, prompt_bytes: int) -> EncodedText:
    """Ends that are 1 where the prompt has been read and count on from there; 0 inside the prompt.

    Prompts in unlike chat templates have nothing in common before their ends.
    """
    return EncodedText(text.ids, np.maximum(text.ends - prompt_bytes + 1, 0))


def thinned(passages: Sequence[AlignedPassage], places: int, seed: int) -> list[AlignedPassage]:
    """Passages of which about so many aligned positions count, drawn at random; all of them where there are no more.

    Args:
        passages: aligned text
        places: how many positions are to count
        seed: of the draw

    Raises:
        UserError: none was drawn.
    """
    there = sum(len(passage.weights) for passage in passages)
    if places >= there:
        return list(passages)
    chance = np.random.default_rng(seed)
    drawn = ((passage, chance.random(len(passage.weights)) < places / there) for passage in passages)
    thin = [
        replace(passage, weights=np.where(kept, passage.weights, 0.0).tolist()) for passage, kept in drawn if kept.any()
    ]
    if not thin:
        raise UserError(f"places is {places}, too few of {there}; give several times the width of the models.")
    return thin


def share_of_passages(passages: Sequence[AlignedPassage], batch_size: int) -> Sequence[AlignedPassage]:
    """The passages of this process: whole batches in turn, so that each is read as one process would read it.

    A process that has a batch less than others gets a passage of which no position counts: models that all processes
    hold together are read by all of them at once.
    """
    here = this_process()
    starts = range(here.index * batch_size, len(passages), here.count * batch_size)
    share = [passage for start in starts for passage in passages[start : start + batch_size]]
    has_less = len(starts) < math.ceil(len(passages) / (here.count * batch_size))
    return [*share, replace(passages[0], weights=[0.0] * len(passages[0].weights))] if has_less else share
