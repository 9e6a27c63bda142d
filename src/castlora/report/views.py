"""Skills, samples and changes with everything placed and worded, ready for the page."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from castlora.lift import COUNTABLE_GAIN
from castlora.report import figures
from castlora.report.contents import (
    BARE_TARGET,
    RETRAINED,
    SOURCE_LORA,
    TRANSFERRED,
    ChangedPiece,
    ChangedText,
    Sample,
    Score,
    Skill,
)
from castlora.report.formatting import Comparison, Span, compare, is_number, number

LONGEST_TEXT = 4000
CHANGE_LEVELS = (0.1, 0.5, 2.0, 8.0)
"""Nats from which a change is drawn stronger."""


@dataclass(frozen=True)
class Place:
    """Where a model stands between the bare target (0) and the retrained adapter (1), as far as known."""

    lift: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class ScoreRow:
    """One model in a skill's table and, where it has a bar, in its figure.

    Attributes:
        model: Name of the model.
        score: Its score.
        ratio: Its score relative to the retrained adapter's.
        place: Its place on the lift scale.
        bar: Its bar; None for the two ends of the scale and without a lift.
    """

    model: str
    score: Score
    ratio: float | None
    place: Place
    bar: figures.LiftBar | None


@dataclass(frozen=True)
class SkillView:
    """A skill with everything placed and worded."""

    skill: Skill
    axis: figures.Axis
    rows: Sequence[ScoreRow]
    note: str

    @property
    def bars(self) -> list[ScoreRow]:
        """The rows that the figure draws."""
        return [row for row in self.rows if row.bar]


def skill_view(skill: Skill) -> SkillView:
    """Places a skill's scores on the lift scale; a skill without a lift gets a table only."""
    bare, retrained = skill.value(BARE_TARGET), skill.value(RETRAINED)
    places = {model: _place(skill, model) for model in skill.scores}
    axis = figures.lift_axis([end for place in places.values() for end in _ends(place)])
    rows = []
    for model, score in skill.scores.items():
        lift, bounds = places[model].lift, places[model].interval
        ratio = score.value / retrained if is_number(score.value) and is_number(retrained) and retrained > 0 else None
        is_end = model in (BARE_TARGET, RETRAINED)
        bar = figures.lift_bar(lift, bounds, axis) if is_number(lift) and not is_end else None
        rows.append(ScoreRow(model, score, ratio, places[model], bar))
    return SkillView(skill, axis, rows, _gain_note(bare, retrained))


def _place(skill: Skill, model: str) -> Place:
    """Carries a model's score and interval to the lift scale; the transferred adapter's lift is given."""
    if skill.countable_lift is None:
        return Place(None, None)
    if model == TRANSFERRED:
        return Place(skill.countable_lift.lift, skill.countable_lift.ci95)
    bare, retrained = skill.value(BARE_TARGET), skill.value(RETRAINED)
    score = skill.scores[model]
    low, high = (figures.lift_of(end, bare, retrained) for end in score.interval or (None, None))
    bounds = None if low is None or high is None else (low, high)
    return Place(figures.lift_of(score.value, bare, retrained), bounds)


def _ends(place: Place) -> list[float]:
    return [end for end in (place.lift, *(place.interval or ())) if is_number(end)]


def _gain_note(bare: float | None, retrained: float | None) -> str:
    if not (is_number(bare) and is_number(retrained)) or retrained - bare >= COUNTABLE_GAIN:
        return ""
    gain = f"{100 * (retrained - bare):+.1f}".replace("-", "−")
    return f"Retraining on the target moves the score by {gain} points here, too little to measure lift by."


@dataclass(frozen=True)
class Passage:
    """A text of a sample, cut to a readable length.

    Attributes:
        label: "prompt", "expected" or the model that wrote it.
        spans: The text; its words are marked where they differ from the expected text.
        left_out: Number of characters cut off.
        note: How far it is from the expected text; empty without one.
    """

    label: str
    spans: Sequence[Span]
    left_out: int
    note: str = ""


@dataclass(frozen=True)
class SampleView:
    """What was asked and expected, and what the models wrote."""

    asked: Sequence[Passage]
    outputs: Sequence[Passage]


def sample_view(sample: Sample) -> SampleView:
    """Compares what the models wrote with what was expected."""
    asked = [_passage("prompt", sample.prompt)]
    if sample.expected is None:
        return SampleView(asked, [_passage(model, text.strip()) for model, text in sample.outputs.items()])
    expected = sample.expected.strip()
    same = "the same" if sample.expected_of else "as expected"
    outputs = [_compared_passage(model, text, expected, same) for model, text in sample.outputs.items()]
    return SampleView([*asked, _passage(sample.expected_of or "expected", expected)], outputs)


def _passage(label: str, text: str) -> Passage:
    start, left_out = clip(text)
    return Passage(label, [Span(start)] if start else [], left_out)


def _compared_passage(label: str, text: str, expected: str, same: str) -> Passage:
    start, left_out = clip(text.strip())
    comparison = compare(start, clip(expected)[0])
    return Passage(label, comparison.spans, left_out, _difference_note(comparison) or same)


def _difference_note(comparison: Comparison) -> str:
    parts = []
    if comparison.differing:
        parts.append(f"{comparison.differing} differ{'s' if comparison.differing == 1 else ''}")
    if comparison.missing:
        parts.append(f"{comparison.missing} missing")
    return ", ".join(parts)


def clip(text: str) -> tuple[str, int]:
    """Returns the start of a very long text, and the number of characters left out."""
    return text[:LONGEST_TEXT], max(0, len(text) - LONGEST_TEXT)


@dataclass(frozen=True)
class ChangeMark:
    """A piece of text as it is drawn.

    Attributes:
        text: The piece; the ends of lines and of the text are made visible.
        nats: How much the prediction of it is changed.
        level: 0 for next to nothing, else the number of `CHANGE_LEVELS` that it reaches.
        in_answer: Whether it belongs to an answer.
    """

    text: str
    nats: float
    level: int
    in_answer: bool


@dataclass(frozen=True)
class ChangeColumn:
    """One model's side of a text.

    Attributes:
        label: The model.
        lead: What it reads before the first piece.
        marks: The text from there on.
        note: Its mean change in the answer.
    """

    label: str
    lead: str
    marks: Sequence[ChangeMark]
    note: str


@dataclass(frozen=True)
class ChangeView:
    """What the adapters change in one text, the source's side and the target's."""

    source: ChangeColumn
    target: ChangeColumn


def change_view(text: ChangedText) -> ChangeView:
    """Draws what source and target change in one text on the same scale."""
    return ChangeView(
        _change_column(SOURCE_LORA, text.source_lead, text.pieces, [piece.source for piece in text.pieces]),
        _change_column(TRANSFERRED, text.target_lead, text.pieces, [piece.target for piece in text.pieces]),
    )


def change_level(nats: float) -> int:
    """How many of `CHANGE_LEVELS` a change reaches."""
    return bisect_right(CHANGE_LEVELS, nats) if is_number(nats) else 0


def _change_column(label: str, lead: str, pieces: Sequence[ChangedPiece], nats: Sequence[float]) -> ChangeColumn:
    marks = [
        ChangeMark(_visible(piece.text), changed, change_level(changed), piece.in_answer)
        for piece, changed in zip(pieces, nats, strict=True)
    ]
    answer = [mark.nats for mark in marks if mark.in_answer and is_number(mark.nats)]
    note = f"mean {number(math.fsum(answer) / len(answer))} nats in the answer" if answer else ""
    return ChangeColumn(label, lead, marks, note)


def _visible(text: str) -> str:
    return text.replace("\n", "↵\n") or "⟨end⟩"
