"""How far a student's predictions are from a teacher's, with a way back that keeps little.

Logits are the widest tensors of a step. Written with torch's functions alone, the objective needs some five more of
their size, in single precision. All that the way back needs is how the divergence changes with the logits, which is
known on the way there: one of their size, in their own precision.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from castlora.distillation.objective import class_probabilities

_NUMBERS_AT_ONCE = 1 << 20
_NUMBERS_AT_ONCE_ON_ACCELERATORS = 1 << 24


@dataclass(frozen=True)
class Compared:
    """What one of two models predicts, and where that is compared with what the other predicts."""

    logits: Tensor
    """Shape (tokens, vocabulary)."""
    places: Tensor
    """Tokens whose predictions are compared, increasing, shape (compared,)."""
    classes: Tensor | None
    """Class of each token of the vocabulary, shape (vocabulary,); None where both models have the same tokens."""


def compare(
    teacher: Compared, student: Compared, count: int, temperature: float = 1.0, following: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) at each place, and what the student gives to the text.

    Args:
        teacher: its predictions; no gradient flows into them
        student: its predictions
        count: number of classes
        temperature: divides the logits before the divergence is taken
        following: id of the token after each of the student's, shape (tokens,); None where it is not asked for

    Returns:
        the divergence over classes of tokens, in nats, shape (compared,); the student's log-probability of the
        following tokens at temperature 1, shape (tokens,), or of none, shape (0,)

    Example:
        >>> places, logits = torch.tensor([1]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> teacher, student = Compared(logits, places, None), Compared(torch.zeros(2, 2), places, None)
        >>> divergence, text = compare(teacher, student, 2, following=torch.tensor([0, 1]))
        >>> [round(nats, 4) for nats in (*divergence.tolist(), *text.tolist())]
        [0.3278, -0.6931, -0.6931]
    """
    divergence, text = _Comparison.apply(  # type: ignore[no-untyped-call]
        student.logits, teacher, student, count, temperature, following
    )
    return divergence, text


class _Comparison(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        teacher: Compared,
        student: Compared,
        count: int,
        temperature: float,
        following: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        places = student.places
        divergence = logits.new_empty(len(places), dtype=torch.float32)
        # What the divergence changes by with each logit at its place.
        slopes = logits.new_empty(len(places), logits.shape[1]) if ctx.needs_input_grad[0] else None
        text = logits.new_empty(0 if following is None else len(logits), dtype=torch.float32)
        normalizers = torch.empty_like(text)
        for tokens, compared in _blocks(logits, places):
            block = logits[tokens].float()
            if following is not None:
                log_probabilities = block.log_softmax(-1)
                text[tokens] = log_probabilities.gather(1, following[tokens, None]).squeeze(1)
                normalizers[tokens] = block[:, 0] - log_probabilities[:, 0]
            taught = _scaled(teacher.logits[teacher.places[compared]].float(), temperature)
            learned = _scaled(block[places[compared] - tokens.start], temperature)
            if teacher.classes is None or student.classes is None:
                divergence[compared], of_logits = _of_tokens(taught, learned)
            else:
                divergence[compared], of_logits = _of_classes(taught, learned, teacher.classes, student.classes, count)
            if slopes is not None:
                slopes[compared] = _scaled(of_logits, temperature)
        ctx.save_for_backward(logits, slopes, places, following, normalizers)
        return divergence, text

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_divergence: Tensor, of_text: Tensor) -> tuple[Tensor | None, ...]:
        logits, slopes, places, following, normalizers = ctx.saved_tensors
        if following is None:
            alone = torch.zeros_like(logits)
            alone[places] = (slopes * of_divergence[:, None]).to(logits.dtype)
            return alone, None, None, None, None, None
        gradient = torch.empty_like(logits)
        for tokens, compared in _blocks(logits, places):
            # The log-probability of a token rises with its own logit and falls with all by their probabilities.
            rise = of_text[tokens, None]
            of_block = (logits[tokens] - normalizers[tokens, None]).exp_().mul_(-rise)
            of_block.scatter_add_(1, following[tokens, None], rise)
            of_places = slopes[compared].float() * of_divergence[compared, None]
            of_block.index_add_(0, places[compared] - tokens.start, of_places)
            gradient[tokens] = of_block
        return gradient, None, None, None, None, None


def _scaled(numbers: Tensor, temperature: float) -> Tensor:
    # Division by 1 would only copy what is wide.
    return numbers if temperature == 1 else numbers / temperature


def _blocks(logits: Tensor, places: Tensor) -> Iterator[tuple[slice, slice]]:
    """Tokens that are looked at together, and which of the places lie among them."""
    on_processor = logits.device.type == "cpu"
    numbers = _NUMBERS_AT_ONCE if on_processor else _NUMBERS_AT_ONCE_ON_ACCELERATORS
    length = max(1, numbers // logits.shape[1])
    ends = [*range(length, len(logits), length), len(logits)]
    cuts = torch.searchsorted(places, torch.tensor(ends, device=places.device)).tolist()
    starts = zip([0, *ends], [0, *cuts], strict=False)
    for (start, first), end, cut in zip(starts, ends, cuts, strict=False):
        yield slice(start, end), slice(first, cut)


def _of_tokens(teacher_logits: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) over the tokens of both, shape (places,), and its derivative by the student's logits."""
    taught, learned = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    shares = taught.exp()
    divergence = taught.sub_(learned).mul_(shares).sum(-1)
    return divergence, learned.exp_().sub_(shares)


def _of_classes(
    teacher_logits: Tensor, student_logits: Tensor, teacher_classes: Tensor, student_classes: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The same over classes of tokens.

    With t and s the classes' probabilities and p that of a token in class c, the derivative is p (Σ t - t_c / s_c). The
    sum is 1, but for classes whose s is too small for a logarithm: these have no slope.
    """
    smallest = torch.finfo(torch.float32).tiny
    of_tokens = student_logits.softmax(-1)
    taught = class_probabilities(teacher_logits.softmax(-1), teacher_classes, count).clamp_min_(smallest)
    learned = class_probabilities(of_tokens, student_classes, count)
    with_slope = taught * (learned >= smallest)
    learned.clamp_min_(smallest)
    sums = with_slope.sum(-1, keepdim=True)
    ratios = with_slope.div_(learned)
    divergence = taught.log().sub_(learned.log_()).mul_(taught).sum(-1)
    return divergence, of_tokens.mul_(sums - ratios.index_select(1, student_classes))
