"""The outcome of a transfer in one line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from castlora.lift import COUNTABLE_GAIN, Lift
from castlora.report.contents import BARE_TARGET, RETRAINED, TRANSFERRED, Distillation, Imitation, Report, Skill
from castlora.report.formatting import is_interval, is_number, number, percent, percent_interval, score, score_interval


@dataclass(frozen=True)
class Verdict:
    """The outcome in one line.

    Attributes:
        headline: The line.
        interval: The 95 % interval that belongs to it, e.g. "[79, 93]"; empty when unknown.
        details: Sentences that a careful reader needs next to it.
    """

    headline: str
    interval: str = ""
    details: Sequence[str] = ()


def verdict(report: Report) -> Verdict:
    """Puts the outcome in one line: the lift, else the scores, else how closely it follows its teacher."""
    measured = [(skill, skill.countable_lift) for skill in report.skills if skill.countable_lift]
    if len(measured) == 1:
        return _lift_verdict(*measured[0])
    if measured:
        return _mean_lift_verdict([skill.name for skill, _ in measured], [lift.lift for _, lift in measured])
    scored = [skill for skill in report.skills if is_number(skill.value(TRANSFERRED))]
    if scored:
        return _score_verdict(scored[0])
    distilled = _distillation_verdict(report.distillation or Distillation())
    return _imitation_verdict(report.imitation, distilled) if report.imitation else distilled


def _lift_verdict(skill: Skill, lift: Lift) -> Verdict:
    details = [
        f"{skill.name}: the bare target has {skill.metric} {score(skill.value(BARE_TARGET))}, the transferred adapter"
        f" {score(skill.value(TRANSFERRED))}, one retrained on the target {score(skill.value(RETRAINED))}."
    ]
    if is_number(lift.ratio):
        details.append(f"That is {percent(lift.ratio)} of the retrained score.")
    if is_interval(lift.ci95) and lift.ci95[0] <= 0 <= lift.ci95[1]:
        details.append("The interval includes 0: the adapter may have brought nothing.")
    return Verdict(_arrived(lift.lift), percent_interval(lift.ci95), details)


def _mean_lift_verdict(names: Sequence[str], lifts: Sequence[float]) -> Verdict:
    worst, best = min(range(len(lifts)), key=lifts.__getitem__), max(range(len(lifts)), key=lifts.__getitem__)
    return Verdict(
        f"{_arrived(math.fsum(lifts) / len(lifts))} on average",
        details=[
            f"Mean of {len(lifts)} skills, from {percent(lifts[worst])} ({names[worst]})"
            f" to {percent(lifts[best])} ({names[best]})."
        ],
    )


def _arrived(lift: float) -> str:
    if round(100 * lift) > 0:
        return f"{percent(lift)} of the lift arrived"
    return f"No lift arrived: {percent(lift)}"


def _score_verdict(skill: Skill) -> Verdict:
    transferred = skill.scores[TRANSFERRED]
    bare = skill.value(BARE_TARGET)
    compared = f", from {score(bare)} without it" if is_number(bare) else ""
    return Verdict(
        f"{skill.name}: {skill.metric} {score(transferred.value)}{compared}",
        score_interval(transferred.interval),
        [
            "To say how much of the lift this is takes an adapter retrained on the target that gains at least"
            f" {100 * COUNTABLE_GAIN:.0f} points."
        ],
    )


def _imitation_verdict(imitation: Imitation, distilled: Verdict) -> Verdict:
    return Verdict(
        f"{percent(imitation.same_after)} of answers are the teacher's",
        percent_interval(imitation.interval),
        [
            f"After {imitation.prompts} prompts kept out of training the target writes what source + LoRA writes, word"
            f" for word; {percent(imitation.same_before)} without the adapter.",
            *_chance(imitation),
            *distilled.details,
        ],
    )


def _chance(imitation: Imitation) -> list[str]:
    if not is_number(imitation.same_by_chance):
        return []
    share = percent(imitation.same_by_chance)
    return [f"Held against what source + LoRA writes after the other prompts, {share} of its answers are the same."]


def _distillation_verdict(run: Distillation) -> Verdict:
    before = run.held_out_bare if is_number(run.held_out_bare) else run.held_out_before
    after = run.held_out_after
    if not is_number(after):
        return Verdict("Transferred, not yet measured")
    details = ["That says how closely the target follows its teacher, not how well it does on a task."]
    if is_number(run.agreement_after):
        earlier = f", {percent(run.agreement_before)} before" if is_number(run.agreement_before) else ""
        earlier = f", {percent(run.agreement_bare)} without the adapter" if is_number(run.agreement_bare) else earlier
        details.insert(0, f"Its next token is the teacher's in {percent(run.agreement_after)} of positions{earlier}.")
    if not is_number(before) or before <= 0:
        return Verdict(f"Held-out loss {number(after)}", details=details)
    moved = "fell" if after < before else "rose" if after > before else "stayed"
    change = " the same" if after == before else f" {percent(abs(after / before - 1))}"
    details.insert(0, f"From {number(before)} to {number(after)} on text kept out of training.")
    return Verdict(f"Held-out loss {moved}{change}", details=details)
