"""Tasks on which a transferred adapter has been scored, as its manifest keeps them."""

import math
from collections.abc import Mapping
from typing import Any

from castlora.evaluation.accuracy import Evaluation
from castlora.lift import Lift, lift_with_interval
from castlora.report import BARE_TARGET, RETRAINED, TRANSFERRED, Score, Skill
from castlora.report.formatting import is_interval, is_number

_LARGEST = 1e100
"""What can have been measured; figures have room for no more."""


def describe_task(skill: Skill, chat: bool, versions: Mapping[str, str]) -> dict[str, Any]:
    """A task and its scores for the manifest.

    Args:
        skill: the scores, with the digest of the task file
        chat: whether prompts were messages in a chat template
        versions: of the packages that scores depend on
    """
    return {
        "name": skill.name,
        "sha256": skill.sha256,
        "chat": chat,
        "metric": skill.metric,
        "n": skill.examples,
        "scores": {
            model: {"score": score.value, "ci95": score.interval and list(score.interval), "nll": score.nll}
            for model, score in skill.scores.items()
        },
        "lift": skill.lift and describe_lift(skill.lift),
        "versions": dict(versions),
    }


def describe_lift(lift: Lift) -> dict[str, Any]:
    """A lift as JSON takes it: null stands for what is not defined."""
    return {
        "value": lift.lift if is_number(lift.lift) else None,
        "ci95": list(lift.ci95) if is_interval(lift.ci95) else None,
        "ratio": lift.ratio if is_number(lift.ratio) else None,
        "countable": lift.countable,
    }


def read_task(record: Mapping[str, Any]) -> Skill:
    """Reads what `describe_task` wrote.

    Raises:
        AttributeError, LookupError, TypeError, ValueError: it is damaged.
    """
    scores = {
        str(model): Score(measured(score["score"]), _interval(score["ci95"]), measured(score["nll"]))
        for model, score in record["scores"].items()
    }
    lift = record["lift"]
    return Skill(
        str(record["name"]),
        scores,
        None if lift is None else _lift(lift),
        str(record["metric"]),
        int(record["n"]),
        str(record["sha256"]),
    )


def measured(value: object) -> float:
    """A number that a run may have measured; NaN and infinities are among them.

    Raises:
        TypeError: it is no number.
        ValueError: it is beyond everything that can be.
    """
    if not isinstance(value, int | float):
        raise TypeError("not a number")
    number = float(value)
    if math.isfinite(number) and abs(number) > _LARGEST:
        raise ValueError("out of range")
    return number


def _lift(record: Mapping[str, Any]) -> Lift:
    return Lift(
        _defined(record["value"]),
        _interval(record["ci95"]) or (math.nan, math.nan),
        _defined(record["ratio"]),
        bool(record["countable"]),
    )


def _defined(value: object) -> float:
    return math.nan if value is None else measured(value)


def _interval(ends: Any) -> tuple[float, float] | None:
    if ends is None:
        return None
    low, high = map(measured, ends)
    return low, high


def skill_of(name: str, sha256: str, evaluations: Mapping[str, Evaluation]) -> Skill:
    """What models reached on one task, with the lift where both ends of its scale were scored.

    Args:
        name: of the task
        sha256: digest of the task file
        evaluations: by model: BARE_TARGET, TRANSFERRED, and others as far as they were scored
    """
    scores = {model: found.summary for model, found in evaluations.items()}
    transferred, retrained = evaluations[TRANSFERRED], evaluations.get(RETRAINED)
    lift = None
    if retrained is not None:
        lift = lift_with_interval(evaluations[BARE_TARGET].scores, transferred.scores, retrained.scores)
    return Skill(name, scores, lift, transferred.metric, transferred.n, sha256)
