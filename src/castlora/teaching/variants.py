"""More prompts than were given: the same with some of their words exchanged for words of the others."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_OF_THE_FORMAT = 0.9
_MOST_EXCHANGED = 0.5
_DRAWS_PER_VARIANT = 8


@dataclass(frozen=True)
class Variant:
    """A prompt with some words exchanged."""

    origin: int
    """Index of the prompt that it was made of."""
    text: str


def vary_prompts(prompts: Sequence[str], count: int, seed: int, kept_out: Sequence[str] = ()) -> list[Variant]:
    """Prompts in which up to half of the words are exchanged for words from anywhere in the prompts.

    Words that nearly all prompts have belong to their format and stay, as does the space between words. What comes out
    is no language; that the teacher answers it as it answers the task is what counts.

    Args:
        prompts: what was given
        count: how many variants, at most; prompts that are too few or too short have fewer, a single one has none
        seed: of the draw
        kept_out: prompts that no variant may be

    Returns:
        variants that differ from each other and from all that was given or kept out
    """
    pieces = [re.findall(r"\s+|\S+", prompt) for prompt in prompts]
    having = Counter(piece for of_prompt in pieces for piece in set(of_prompt))

    def is_free(piece: str) -> bool:
        return not piece.isspace() and having[piece] < _OF_THE_FORMAT * len(prompts)

    words = [piece for of_prompt in pieces for piece in of_prompt if is_free(piece)]
    chance = random.Random(seed)
    taken, drawn = {*prompts, *kept_out}, dict[str, Variant]()
    for _ in range(_DRAWS_PER_VARIANT * count if words else 0):
        if len(drawn) == count:
            break
        origin, share = chance.randrange(len(prompts)), chance.uniform(0, _MOST_EXCHANGED)
        exchanged = (
            chance.choice(words) if is_free(piece) and chance.random() < share else piece for piece in pieces[origin]
        )
        text = "".join(exchanged)
        if text not in taken:
            drawn.setdefault(text, Variant(origin, text))
    return list(drawn.values())
