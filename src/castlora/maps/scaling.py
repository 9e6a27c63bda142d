"""How strongly an update is applied: the scale that fits held-out text best."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer

from castlora.distillation.distill import HeldOut, Student

logger = logging.getLogger("castlora")

SOLVED_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
"""For updates that were solved for: activations say little about how strong an update must be."""
TRAINED_SCALES = (0.0, 0.5, 0.75, 1.0, 1.25)
"""For trained updates. Zero is among both: an update that helps nowhere is taken back."""


@dataclass(frozen=True)
class ScaleChoice:
    """The scale that was kept, and what it was chosen from."""

    scale: float
    tried: list[float]
    losses: list[float]
    """Objective on held-out text at each scale that was tried."""


def losses_by_scale(
    student: Student, measure: Callable[[Student], HeldOut], scales: Sequence[float]
) -> dict[float, float]:
    """The objective on held-out text, with the student's update scaled by each factor."""
    losses = {}
    for scale in scales:
        with rescale_adapter_scale(student.model, scale):
            losses[scale] = measure(student).loss
    return losses


def best_scale(losses: Mapping[float, float]) -> float:
    """The scale with the least loss; of equal ones the smallest."""
    return min(sorted(losses), key=losses.__getitem__)


def scale_student(student: Student, scale: float) -> None:
    """Scales the student's update for good, through the scale that PEFT multiplies it with."""
    for module in student.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(scale)


def keep_best_scale(student: Student, measure: Callable[[Student], HeldOut], scales: Sequence[float]) -> ScaleChoice:
    """Scales the student's update as the held-out text asks for.

    With 0 among the scales, the result is no further from source + LoRA on this text than the bare target.

    Args:
        student: changed in place
        measure: compares the student as it stands with its teacher on held-out text
        scales: factors to try
    """
    losses = losses_by_scale(student, measure, scales)
    scale = best_scale(losses)
    logger.debug("Held-out loss by scale of the update: %s", losses)
    scale_student(student, scale)
    if scale == 0:
        logger.warning(
            "No strength of the update helps on held-out text: the written adapter leaves the target as it is."
        )
    return ScaleChoice(scale, list(losses), list(losses.values()))
