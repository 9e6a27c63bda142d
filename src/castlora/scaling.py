"""How strongly an update is applied: the scale that fits held-out text best."""

from collections.abc import Mapping, Sequence

import torch
from peft.helpers import rescale_adapter_scale
from torch import nn

from castlora.config import Recipe
from castlora.distill import Student, measure_held_out
from castlora.positions import AlignedPassage
from castlora.starts import lora_maps
from castlora.vocabulary import SharedVocabulary

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
"""Zero is among them: an update that helps nowhere is taken back."""


def losses_by_scale(
    teacher: nn.Module,
    student: Student,
    held_out: Sequence[AlignedPassage],
    shared: SharedVocabulary,
    recipe: Recipe,
    scales: Sequence[float] = SCALES,
) -> dict[float, float]:
    """The objective on held-out text, with the student's update scaled by each factor."""
    losses = {}
    for scale in scales:
        with rescale_adapter_scale(student.model, scale):
            losses[scale] = measure_held_out(teacher, student, held_out, shared, recipe).loss
    return losses


def best_scale(losses: Mapping[float, float]) -> float:
    """The scale with the least loss; of equal ones the smallest."""
    return min(sorted(losses), key=losses.__getitem__)


@torch.no_grad()
def scale_student(student: Student, modules: Sequence[str], scale: float) -> None:
    """Scales the student's update for good; its LoRA must not be parametrized by maps."""
    for name in modules:
        lora_maps(student.model, name)[1].weight.mul_(scale)
