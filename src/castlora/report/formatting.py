"""How numbers and untrusted text are written in reports and model cards."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from operator import itemgetter
from typing import TypeGuard

MISSING = "–"
NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"

_CONTROLS = {*range(0x20), *range(0x7F, 0xA0)} - {ord("\t"), ord("\n")}
# Directional overrides reorder the text around them, so a reader would see something other than what is there.
_DIRECTIONS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_NO_CHARACTERS = {*range(0xD800, 0xE000), 0xFFFE, 0xFFFF}
_VISIBLE = {code: f"⟨U+{code:04X}⟩" for code in _CONTROLS | _DIRECTIONS | _NO_CHARACTERS}
_PIECE = re.compile(r"\w+|\s+|[^\w\s]")


def number(value: float | None) -> str:
    """Writes a number with three significant digits; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return MISSING
    magnitude = abs(value)
    if math.isinf(value):
        text = "∞"
    elif magnitude == 0:
        text = "0"
    elif magnitude >= 1e6 or magnitude < 1e-4:
        text = f"{magnitude:.2e}"
    elif magnitude >= 999.5:
        text = f"{magnitude:,.0f}"
    else:
        text = f"{magnitude:#.3g}".removesuffix(".")
    return f"−{text}" if value < 0 else text


def score(value: float | None) -> str:
    """Writes a score with three decimals, so that a column of them lines up; larger values as `number` does."""
    return f"{value:.3f}".replace("-", "−") if is_number(value) and abs(value) < 10 else number(value)


def percent_digits(value: float | None) -> str:
    """Writes a fraction as whole percent without the sign, e.g. 0.861 as "86"."""
    if value is None or not math.isfinite(value) or abs(value) >= 100:
        return number(None if value is None else 100 * value)
    rounded = round(100 * value)
    return f"−{-rounded}" if rounded < 0 else str(rounded)


def percent(value: float | None) -> str:
    """Writes a fraction as whole percent, e.g. 0.861 as "86 %"."""
    digits = percent_digits(value)
    return digits if digits == MISSING else f"{digits}{NO_BREAK_SPACE}%"


def score_interval(bounds: tuple[float, float] | None) -> str:
    """Writes an interval of scores such as "[0.670, 0.750]"; empty when there is none."""
    return _bracketed(map(score, bounds)) if is_interval(bounds) else ""


def percent_interval(bounds: tuple[float, float] | None) -> str:
    """Writes an interval of fractions such as "[79, 93]"; empty when there is none."""
    return _bracketed(map(percent_digits, bounds)) if is_interval(bounds) else ""


def is_interval(bounds: tuple[float, float] | None) -> TypeGuard[tuple[float, float]]:
    """Whether both ends of the interval are known."""
    return bounds is not None and all(map(is_number, bounds))


def is_number(value: float | None) -> TypeGuard[float]:
    """Whether the value is known and finite."""
    return value is not None and math.isfinite(value)


def printable(text: str) -> str:
    """Makes control characters, directional overrides and lone surrogates visible; keeps tabs and line ends."""
    return text.replace("\r\n", "\n").translate(_VISIBLE)


@dataclass(frozen=True)
class Span:
    """A stretch of text that agrees with the expected text, or differs from it."""

    text: str
    differs: bool = False


@dataclass(frozen=True)
class Comparison:
    """A text against the expected one.

    Attributes:
        spans: The whole text, cut where it starts or stops to differ.
        differing: Words and marks that the expected text does not have there.
        missing: Words and marks of the expected text with nothing in their place.
    """

    spans: Sequence[Span]
    differing: int = 0
    missing: int = 0


def compare(text: str, expected: str) -> Comparison:
    """Finds the words of a text that differ from the expected text; leading and trailing space is ignored."""
    pieces, expected_pieces = _PIECE.findall(text.strip()), _PIECE.findall(expected.strip())
    differs = [False] * len(pieces)
    differing = missing = 0
    for kind, start, end, expected_start, expected_end in SequenceMatcher(None, pieces, expected_pieces).get_opcodes():
        if kind != "equal":
            differs[start:end] = [True] * (end - start)
            came, wanted = _count_words(pieces[start:end]), _count_words(expected_pieces[expected_start:expected_end])
            differing += came
            missing += max(0, wanted - came)
    for index, piece in enumerate(pieces):
        if piece.isspace():
            differs[index] = differs[index - 1] and differs[index + 1]
    runs = groupby(zip(pieces, differs, strict=True), key=itemgetter(1))
    return Comparison([Span("".join(piece for piece, _ in run), flag) for flag, run in runs], differing, missing)


def _count_words(pieces: Sequence[str]) -> int:
    return sum(not piece.isspace() for piece in pieces)


def _bracketed(texts: Iterable[str]) -> str:
    return f"[{', '.join(texts)}]"
