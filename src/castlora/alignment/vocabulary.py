"""The outcomes on which the next-token predictions of two models can be compared."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from castlora.alignment.tokens import ByteTokenizer, same_tokenizer, shared_vocabulary

REST = 0
"""The class of all tokens that correspond to nothing in the other vocabulary."""


@dataclass(frozen=True)
class SharedVocabulary:
    """How the vocabularies of two models correspond."""

    source_ids: Tensor
    """Tokens that both models spell alike, one-to-one with `target_ids`, shape (shared,)."""
    target_ids: Tensor
    source_classes: Tensor
    """Class of every source token, shape (tokens that the source predicts,); see `token_classes`."""
    target_classes: Tensor
    is_whole: bool
    """Whether both models have the same tokenizer, so that positions and tokens correspond as they stand."""
    source_ends: tuple[int, ...] = ()
    """Source tokens that count as the end of a text, which share its class; see `castlora.models.endings`."""
    target_ends: tuple[int, ...] = ()
    """The same of the target."""

    @classmethod
    def of(
        cls,
        source: ByteTokenizer,
        target: ByteTokenizer,
        source_size: int,
        target_size: int,
        source_ends: tuple[int, ...] = (),
        target_ends: tuple[int, ...] = (),
    ) -> "SharedVocabulary":
        """Compares two tokenizers.

        Args:
            source: tokenizer of the source model
            target: tokenizer of the target model
            source_size: number of tokens that the source model predicts; its tokenizer may know more
            target_size: the same for the target model
            source_ends: the source's token that ends a text and those that it predicts alike
            target_ends: the same of the target
        """
        is_same = same_tokenizer(source, target)
        if is_same:
            source_ids = target_ids = torch.arange(len(source.spellings))
        else:
            source_ids, target_ids = map(torch.from_numpy, shared_vocabulary(source, target))
        predicted = (source_ids < source_size) & (target_ids < target_size)
        source_ids, target_ids = source_ids[predicted], target_ids[predicted]
        pairs = list(zip(source_ids.tolist(), target_ids.tolist(), strict=True))
        source_classes, target_classes = token_classes(source, target, pairs)
        of_source, of_target = _fit(source_classes, source_size), _fit(target_classes, target_size)
        if source_ends:
            end = int(of_source[source.eos_token_id])
            of_source[list(source_ends)] = end
            _count_as_end(of_source, of_target, target_ends, end)
        is_whole = is_same and len(source_ends) <= 1 and len(target_ends) <= 1
        return cls(source_ids, target_ids, of_source, of_target, is_whole, source_ends, target_ends)

    @property
    def target_is_ambiguous(self) -> Tensor:
        """Whether a token is to be told from others of its class, shape (tokens that the target predicts,).

        Not so those that end a text: any of them does, and where they are several the target cannot tell them apart.
        """
        is_ambiguous = self.target_classes.bincount()[self.target_classes] > 1
        is_ambiguous[list(self.target_ends)] = False
        return is_ambiguous

    @property
    def classes(self) -> int:
        """Number of classes, the rest included."""
        return 1 + int(max(self.source_classes.max(), self.target_classes.max()))


def token_classes(
    source: ByteTokenizer, target: ByteTokenizer, shared: Sequence[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """Partitions both vocabularies into corresponding classes.

    Tokens that are spelled alike form a class. A token that only one vocabulary has joins the class of the token with
    which the other tokenizer begins to spell it: where one model predicts ` character` at once and the other ` char`
    first, both predictions fall into one class, and neither model is taught the other's way of cutting words.

    Args:
        source: tokenizer of the source model
        target: tokenizer of the target model
        shared: pairs of source and target ids that are spelled alike

    Returns:
        class of each source id and of each target id; `REST` for a token without counterpart
    """
    offset = len(source.spellings)
    parent = list(range(offset + len(target.spellings)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for source_id, target_id in shared:
        parent[root(source_id)] = root(offset + target_id)
    lone_source = sorted(set(range(offset)) - {pair[0] for pair in shared})
    lone_target = sorted(set(range(len(target.spellings))) - {pair[1] for pair in shared})
    for source_id, first in zip(
        lone_source, first_tokens(target, [source.spellings[i] for i in lone_source]), strict=True
    ):
        if first is not None:
            parent[root(source_id)] = root(offset + first)
    for target_id, first in zip(
        lone_target, first_tokens(source, [target.spellings[i] for i in lone_target]), strict=True
    ):
        if first is not None:
            parent[root(offset + target_id)] = root(first)
    roots = [root(node) for node in range(len(parent))]
    matched = sorted(set(roots[:offset]) & set(roots[offset:]))
    number = {one_root: index for index, one_root in enumerate(matched, start=1)}
    classes = [number.get(one_root, REST) for one_root in roots]
    return classes[:offset], classes[offset:]


def first_tokens(tokenizer: ByteTokenizer, spellings: Sequence[bytes | None]) -> list[int | None]:
    """The token with which a tokenizer begins to spell each text inside a line; None where it cannot be told."""
    by_spelling = {spelling: token for token, spelling in reversed(list(enumerate(tokenizer.spellings))) if spelling}
    # A line break in front stands for the text before; few vocabularies merge it with what follows.
    texts = ["\n" + (spelling or b"").decode(errors="replace") for spelling in spellings]
    found: list[int | None] = []
    for spelling, encoded in zip(spellings, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        begins = int((encoded.ends <= 1).sum())
        is_cut = begins > 0 and encoded.ends[begins - 1] == 1 and begins < len(encoded.ids)
        if not spelling:
            found.append(None)
        elif is_cut and _is_text(spelling):
            found.append(int(encoded.ids[begins]))
        else:
            prefixes = (spelling[:length] for length in range(len(spelling), 0, -1))
            found.append(next((by_spelling[prefix] for prefix in prefixes if prefix in by_spelling), None))
    return found


def _is_text(spelling: bytes) -> bool:
    try:
        spelling.decode()
    except UnicodeDecodeError:
        return False
    return True


def _count_as_end(of_source: Tensor, of_target: Tensor, target_ends: Sequence[int], end: int) -> None:
    """Puts target tokens into the class of the end of a text, with what the target has no other token for."""
    left = of_target[list(target_ends)]
    of_target[list(target_ends)] = end
    without_target = left[~torch.isin(left, of_target)]
    of_source[torch.isin(of_source, without_target)] = end


def _fit(classes: list[int], size: int) -> Tensor:
    """Classes for exactly the tokens that a model predicts; padded ones belong to the rest."""
    return torch.tensor([*classes[:size], *[REST] * (size - len(classes))])
