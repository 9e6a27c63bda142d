"""A grid of places in a text that is drawn without any tokenizer, so that models can be read on it one at a time."""

import numpy as np
from numpy.typing import NDArray

from castlora.alignment.positions import AlignedPassage
from castlora.alignment.tokens import EncodedText, Integers, aligned_positions

Booleans = NDArray[np.bool_]


def draw_grid(length: int, passage: int, share: float, seed: int) -> Booleans:
    """Draws the ends of bytes of a passage that belong to the grid.

    Args:
        length: bytes of the passage
        passage: its number in the text
        share: how many of the ends are to belong to it, from 0 to 1
        seed: of the draw

    Returns:
        whether the place after so many bytes belongs to it, shape (length + 1,); the one before the first never does,
        since there the models have read nothing
    """
    on_grid = np.random.default_rng([seed, passage]).random(length + 1) < share
    on_grid[0] = False
    return on_grid


def on_grid_alone(encoded: EncodedText, on_grid: Booleans, max_length: int) -> tuple[AlignedPassage, Integers]:
    """A passage as one model reads it, with the places of the grid at which one of its tokens ends.

    The first token is none of them: without content before it, it attracts extreme activations.

    Args:
        encoded: its tokens
        on_grid: as `draw_grid` gives it
        max_length: tokens that are kept

    Returns:
        the passage, with the same model on both sides, and the bytes that have been read at each of its places
    """
    positions, _ = aligned_positions(encoded.ends, encoded.ends)
    kept = positions[(positions > 0) & (positions < max_length) & on_grid[encoded.ends[positions]]]
    ids, places = encoded.ids[:max_length].tolist(), kept.tolist()
    return AlignedPassage(ids, ids, places, places, [1.0] * len(places)), encoded.ends[kept]
