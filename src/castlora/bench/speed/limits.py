"""How much of a machine's arithmetic and memory the parts of a transfer use."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from castlora.bench.speed.measures import SHORT, SpeedSettings, fit, read
from castlora.bench.speed.models import Subject, TextKind
from castlora.bench.speed.steps import teacher_and_student, time_steps
from castlora.bench.speed.timing import Clock, interleaved
from castlora.distillation.teacher import RecordedTeacher, Teacher
from castlora.execution.recomputation import recompute_activations
from castlora.maps.fitting import input_widths, memory_for_statistics, parts_of
from castlora.models.modules import layer_path, number_of_layers

logger = logging.getLogger("castlora")

_TEXT: TextKind = "answered prompts"
_PRODUCT_SIZE = 8192
"""Rows and columns of the matrix product that shows what a machine can do."""
_PRODUCTS = 10


@dataclass(frozen=True)
class Use:
    """One part of a transfer, by its passes through the models."""

    work: str
    tokens: int
    """Of both models together."""
    operations: float
    """Floating-point operations of the linear modules in these passes; nothing else is counted."""
    seconds: list[float]
    peak_bytes: int | None
    """Memory of an accelerator at its highest, both models included where both are in it."""
    machine_rate: float
    """Operations per second of a large matrix product in the dtype of the models."""

    def describe(self) -> dict[str, Any]:
        """What the record keeps."""
        median = float(np.median(self.seconds))
        return {
            **asdict(self),
            "tokens_per_second": self.tokens / median,
            "share_of_limit": self.operations / median / self.machine_rate,
        }


def measure_limits(settings: SpeedSettings, device: torch.device) -> list[Use]:
    """The closed-form start and steps of distillation, with a teacher that runs and with one that is remembered."""
    subject = settings.subject(device)
    clock = Clock(device)
    rate = product_rate(clock, subject.target.dtype)
    passages = subject.passages(settings.passages, settings.length, _TEXT, settings.seed)
    tokens = settings.length * len(passages)
    both = 2 * tokens * (linear_weights(subject.source) + linear_weights(subject.target))
    memory = memory_for_statistics(subject.target)
    groups = len(list(parts_of(subject.pairing, input_widths(subject.factors), memory)))
    works: dict[str, tuple[Callable[[], object], int]] = {
        "forward passes of both models": (partial(read, subject, passages), settings.repeats),
        f"closed-form start, text read {groups} times": (partial(fit, subject, passages), 1),
    }
    uses = []
    for name, (work, repeats) in works.items():
        logger.info("Measures %s", name)
        _forget_peak(device)
        (seconds,) = interleaved(clock, {name: work}, repeats).values()
        uses.append(Use(name, 2 * tokens, both, seconds, _peak(device), rate))
    return [*uses, *_steps(settings, subject, clock, rate)]


def product_rate(clock: Clock, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of large random matrices."""
    size = _PRODUCT_SIZE if clock.device.type != "cpu" else _PRODUCT_SIZE // 8
    matrix = torch.randn(size, size, device=clock.device, dtype=dtype)
    (seconds,) = interleaved(clock, {"product": lambda: matrix @ matrix}, _PRODUCTS).values()
    return 2 * size**3 / float(np.median(seconds))


def linear_weights(model: PreTrainedModel) -> int:
    """Entries of the matrices that every token is multiplied with."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))


def _steps(settings: SpeedSettings, subject: Subject, clock: Clock, rate: float) -> list[Use]:
    source_weights, target_weights = linear_weights(subject.source), linear_weights(subject.target)
    teacher, student = teacher_and_student(subject, settings.rank)
    count = settings.batch_size * (1 + SHORT * settings.repeats)
    passages = subject.passages(count, settings.length, _TEXT, settings.seed)
    recorded = RecordedTeacher(teacher.model, passages, with_hidden=False)
    tokens = settings.batch_size * settings.length
    # Frozen weights have no gradient of their own: the way back is one product more per weight, not two.
    back_and_forth = 4 * tokens * target_weights
    uses = []

    def use(name: str, own_teacher: Teacher, read: int, operations: float) -> None:
        logger.info("Measures %s", name)
        _forget_peak(clock.device)
        steps, _ = time_steps(own_teacher, student, subject, passages, settings.batch_size, settings.seed, clock)
        uses.append(Use(name, read, operations, steps, _peak(clock.device), rate))

    use("step, teacher runs", teacher, 2 * tokens, back_and_forth + 2 * tokens * source_weights)
    subject.source.cpu()
    use("step, teacher recorded, target alone in memory", recorded, tokens, back_and_forth)
    slots = {pair.target.name: pair.target for pair in subject.pairing.mapped}
    recompute_activations(subject.target, [layer_path(slots, layer) for layer in range(number_of_layers(slots))])
    use("the same, activations computed again", recorded, tokens, back_and_forth + 2 * tokens * target_weights)
    return uses


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
