"""How the seconds of the closed-form start and of a distillation step grow with what they depend on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from castlora.bench.speed.measures import SpeedSettings, fit
from castlora.bench.speed.models import PairShape, Shape, Subject, TextKind
from castlora.bench.speed.steps import teacher_and_student, time_steps
from castlora.bench.speed.timing import Clock, interleaved

Dimension = Literal["tokens", "layers", "width", "rank"]
Work = Literal["fit", "step"]


@dataclass(frozen=True)
class Size:
    """What is doubled, one number at a time."""

    passages: int = 64
    """Passages that maps are fitted on; a step reads an eighth of them."""
    layers: int = 2
    width: int = 32
    rank: int = 8

    def shape(self) -> PairShape:
        """Two models of one size; their MLPs are 2.75 times as wide, as in many models."""
        source = Shape("llama", self.width, self.layers, 4, 4, 11 * self.width // 4, 1024)
        return PairShape(source, replace(source, model_type="mistral", vocabulary=1536))


@dataclass(frozen=True)
class Growth:
    """Seconds of one work at sizes that double."""

    of: Work
    against: Dimension
    sizes: list[int]
    seconds: list[float]
    """Median at each size."""
    beside_passes: list[float] | None
    """For steps, the median ratio to their passes through the models at each size."""

    def describe(self) -> dict[str, Any]:
        """What the record keeps."""
        per_doubling = [after / before for before, after in zip(self.seconds, self.seconds[1:], strict=False)]
        return {**vars(self), "per_doubling": per_doubling}


def sizes_of(dimension: Dimension, doublings: int) -> Iterator[tuple[int, Size]]:
    """Sizes along one dimension, each with the number that stands for it."""
    base = Size()
    field = "passages" if dimension == "tokens" else dimension
    for doubling in range(doublings + 1):
        number = getattr(base, field) << doubling
        yield number, replace(base, **{field: number})


def measure_growth(settings: SpeedSettings, device: torch.device) -> list[Growth]:
    """Doubles one number after the other."""
    seed, repeats, length = settings.seed, settings.repeats, settings.length
    dimensions: tuple[Dimension, ...] = ("tokens", "layers", "width", "rank")
    text: TextKind = "answered prompts"
    clock = Clock(device)
    found = []
    for dimension in dimensions:
        sizes = dict(sizes_of(dimension, settings.doublings))
        subjects = {number: Subject.build(size.shape(), size.rank, seed, device) for number, size in sizes.items()}
        fits = {
            str(number): partial(fit, subjects[number], subjects[number].passages(size.passages, length, text, seed))
            for number, size in sizes.items()
        }
        labels = [number * length if dimension == "tokens" else number for number in sizes]
        medians = [float(np.median(seconds)) for seconds in interleaved(clock, fits, repeats).values()]
        found.append(Growth("fit", dimension, labels, medians, None))
        timed = [_steps(subjects[number], size, length, text, seed, repeats, clock) for number, size in sizes.items()]
        labels = [label // 8 if dimension == "tokens" else label for label in labels]
        found.append(Growth("step", dimension, labels, [one[0] for one in timed], [one[1] for one in timed]))
    return found


def _steps(
    subject: Subject, size: Size, length: int, text: TextKind, seed: int, repeats: int, clock: Clock
) -> tuple[float, float]:
    """Median seconds of a step, and the median ratio to its passes."""
    teacher, student = teacher_and_student(subject, size.rank)
    batch_size = size.passages // 8
    passages = subject.passages(batch_size * (repeats + 1), length, text, seed)
    steps, passes = time_steps(teacher, student, subject, passages, batch_size, seed, clock)
    return float(np.median(steps)), float(np.median(np.array(steps) / np.array(passes)))
