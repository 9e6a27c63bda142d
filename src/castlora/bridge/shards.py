"""Shards: statistics of shares of a text, in files that any scheduler can have made."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from castlora.alignment.positions import AlignedPassage
from castlora.errors import UserError, first_line
from castlora.maps.statistics import Moments, load_moments, save_moments
from castlora.model_pair import HELD_OUT_PASSAGES

SHARDS_WANTED = "give all folders that castlora fit --shard wrote"
_OWN = ("shard", "positions")
"""Fields of a description in which the shards of one fit differ."""
_FITTED, _HELD_OUT = "fitted/", "held_out/"


@dataclass(frozen=True)
class Shard:
    """One of several equal shares of the text."""

    number: int
    count: int

    @classmethod
    def parse(cls, written: str) -> "Shard":
        """`3/8` is the third of eight.

        Raises:
            UserError: it is no share.
        """
        match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", written)
        number, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= count <= HELD_OUT_PASSAGES:
            raise UserError(f"shard is {written!r}; give NUMBER/COUNT, as 1/4, and at most {HELD_OUT_PASSAGES} shards.")
        return cls(number, count)

    def of(self, passages: Sequence[AlignedPassage]) -> list[AlignedPassage]:
        """The passages of this share.

        Raises:
            UserError: there are fewer passages than shares.
        """
        if len(passages) < self.count:
            raise UserError(
                f"shard is {self.number}/{self.count}, and the text has {len(passages)} passages of a kind to share; "
                "give fewer shards or more text."
            )
        return list(passages[self.number - 1 :: self.count])


def save_site(path: Path, fitted: Mapping[str, Moments], held_out: Mapping[str, Moments]) -> None:
    """Writes the statistics of a site, those of the text to solve from and those of held-out text."""
    named = {_FITTED + name: one for name, one in fitted.items()}
    save_moments(named | {_HELD_OUT + name: one for name, one in held_out.items()}, path)


def added_site(
    paths: Sequence[Path], shapes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """The statistics of a site summed over shards, as `save_site` took them.

    Args:
        paths: the file of the site in each shard
        shapes: (d_y, d_x) of each map of the site

    Raises:
        UserError: a file is missing or damaged, or of another site.
    """
    total: dict[str, Moments] = {}
    for path in paths:
        moments = _checked(path, shapes)
        total = {name: one.merge(moments[name]) for name, one in total.items()} if total else moments
    fitted = {name.removeprefix(_FITTED): one for name, one in total.items() if name.startswith(_FITTED)}
    held_out = {name.removeprefix(_HELD_OUT): one for name, one in total.items() if name.startswith(_HELD_OUT)}
    return fitted, held_out


def _checked(path: Path, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Moments]:
    try:
        moments = load_moments(path)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise _damaged(path, first_line(error)) from error
    expected = {use + name: shape for use in (_FITTED, _HELD_OUT) for name, shape in shapes.items()}
    if moments.keys() != expected.keys():
        raise _damaged(path, "it has statistics of other modules")
    for name, (d_y, d_x) in expected.items():
        if not moments[name].fits(d_x, d_y):
            raise _damaged(path, f"{name} is of another shape or no numbers")
    return moments


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path.name} of {str(path.parent)!r} is missing or damaged ({why}); make it again.")


def check_whole(folders: Sequence[str], descriptions: Sequence[Mapping[str, Any]]) -> None:
    """Looks whether shards are all those of one fit.

    Raises:
        UserError: one is missing, there twice, or of another fit.
    """
    first = descriptions[0]
    for folder, description in zip(folders, descriptions, strict=True):
        unlike = [name for name in first if name not in _OWN and description.get(name) != first[name]]
        if unlike:
            raise UserError(
                f"{folder!r} and {folders[0]!r} are shards of different fits ({', '.join(unlike)}); {SHARDS_WANTED}."
            )
    shards = [Shard.parse(str(description["shard"])) for description in descriptions]
    number, times = Counter(shard.number for shard in shards).most_common(1)[0]
    if times > 1:
        raise UserError(f"Shard {number} is given {times} times; {SHARDS_WANTED}.")
    missing = set(range(1, shards[0].count + 1)) - {shard.number for shard in shards}
    if missing:
        raise UserError(f"Shard {min(missing)} of {shards[0].count} is missing; {SHARDS_WANTED}.")
