from itertools import pairwise

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from castlora.distillation import divergence
from castlora.distillation.divergence import Compared, compare
from castlora.distillation.objective import class_log_probabilities, kl_divergence

TOKENS, OF_TEACHER, OF_STUDENT, CLASSES = 23, 11, 17, 8


def drawn(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sides(places: list[int], same_tokens: bool = False) -> tuple[Compared, Compared]:
    """A teacher and a student, whose logits want a gradient."""
    width = OF_STUDENT if same_tokens else OF_TEACHER
    of_teacher, of_student = (
        None if same_tokens else torch.arange(size) % CLASSES for size in (OF_TEACHER, OF_STUDENT)
    )
    read = torch.tensor(places, dtype=torch.long)
    teacher = Compared(drawn(TOKENS + 2, width, seed=1), read + 2, of_teacher)
    return teacher, Compared(drawn(TOKENS, OF_STUDENT, seed=2).requires_grad_(), read, of_student)


def written_out(teacher: Compared, student: Compared, temperature: float) -> torch.Tensor:
    """The divergence by torch's own functions, which find the way back."""
    logs = []
    for side in (teacher, student):
        logits = side.logits[side.places]
        of_side = torch.arange(logits.shape[1]) if side.classes is None else side.classes
        count = logits.shape[1] if side.classes is None else CLASSES
        logs.append(class_log_probabilities(logits, of_side, count, temperature))
    return kl_divergence(*logs)


@pytest.fixture(params=[1, 60, 10_000], ids=["a token at once", "some at once", "all at once"])
def at_once(request, monkeypatch):
    monkeypatch.setattr(divergence, "_NUMBERS_AT_ONCE", request.param)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("same_tokens", [False, True])
@pytest.mark.parametrize("places", [[0, 3, 4, 5, 11, 22], [7], list(range(TOKENS)), []])
def test_values_and_gradients_are_those_of_torch(places, same_tokens, temperature):
    teacher, student = sides(places, same_tokens)
    following = torch.arange(TOKENS) % OF_STUDENT
    count = OF_STUDENT if same_tokens else CLASSES
    found, text = compare(teacher, student, count, temperature, following)
    of_places, of_text = drawn(len(places), seed=3), drawn(TOKENS, seed=4)
    (gradient,) = torch.autograd.grad((found * of_places).sum() + (text * of_text).sum(), student.logits)

    expected = written_out(teacher, student, temperature)
    expected_text = student.logits.log_softmax(-1).gather(1, following[:, None]).squeeze(1)
    (of_torch,) = torch.autograd.grad((expected * of_places).sum() + (expected_text * of_text).sum(), student.logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(text, expected_text, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, of_torch, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("at_once")
def test_text_that_is_not_asked_for_has_no_part_in_it():
    teacher, student = sides([2, 9])
    alone, nothing = compare(teacher, student, CLASSES)
    beside, _ = compare(teacher, student, CLASSES, following=torch.zeros(TOKENS, dtype=torch.long))
    assert nothing.shape == (0,)
    torch.testing.assert_close(alone, beside)
    gradients = [torch.autograd.grad(of_both.sum(), student.logits)[0] for of_both in (alone, beside)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum(1).nonzero().squeeze(1).tolist() == [2, 9]


def test_a_class_that_one_model_lacks_or_rules_out_leaves_all_finite():
    teacher, student = sides([0, 1, 2])
    logits = student.logits.detach().clone()
    logits[1, student.classes == 3] = -500
    logits[2, student.classes != 3] = -500
    lacking = torch.where(student.classes == 5, 4, student.classes)
    for classes in (student.classes, lacking):
        pupil = Compared(logits.clone().requires_grad_(), student.places, classes)
        found, _ = compare(teacher, pupil, CLASSES)
        (gradient,) = torch.autograd.grad(found.sum(), pupil.logits)
        (of_torch,) = torch.autograd.grad(written_out(teacher, pupil, 1.0).sum(), pupil.logits)
        assert found.isfinite().all() and (found > 0).all()
        torch.testing.assert_close(gradient, of_torch, rtol=1e-4, atol=1e-6)


def test_halves_are_compared_in_single_precision():
    teacher, student = sides([1, 5, 20])
    halves = [Compared(one.logits.detach().bfloat16(), one.places, one.classes) for one in (teacher, student)]
    rounded = [Compared(one.logits.float(), one.places, one.classes) for one in halves]
    for one in (halves[1].logits, rounded[1].logits):
        one.requires_grad_()
    following = torch.arange(TOKENS) % OF_STUDENT
    (of_halves, text), (exact, exact_text) = (compare(*pair, CLASSES, 1.0, following) for pair in (halves, rounded))
    torch.testing.assert_close(of_halves, exact)
    torch.testing.assert_close(text, exact_text)
    gradients = [
        torch.autograd.grad(found.sum() + likely.sum(), pair[1].logits)[0]
        for found, likely, pair in ((of_halves, text, halves), (exact, exact_text, rounded))
    ]
    assert gradients[0].dtype == torch.bfloat16
    torch.testing.assert_close(gradients[0].float(), gradients[1], rtol=2e-2, atol=1e-2)


def test_little_is_kept_for_the_way_back():
    teacher, student = sides(list(range(TOKENS)))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    def bytes_kept(calculate) -> int:
        kept.clear()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            calculate()
        return sum(kept.values())

    following = torch.arange(TOKENS) % OF_STUDENT
    ours = bytes_kept(lambda: compare(teacher, student, CLASSES, 1.0, following))
    of_torch = bytes_kept(lambda: (written_out(teacher, student, 1.0), student.logits.log_softmax(-1)))
    logits = student.logits.nbytes
    assert 2 * logits <= ours < 2.5 * logits < of_torch


@pytest.mark.parametrize("following", [None, torch.arange(TOKENS) % OF_STUDENT])
def test_the_way_back_can_be_gone_twice(following):
    teacher, student = sides([1, 5, 20])
    found, text = compare(teacher, student, CLASSES, 1.0, following)
    total = found.sum() + text.sum()
    first, second = (torch.autograd.grad(total, student.logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()


def test_without_a_gradient_nothing_is_kept():
    teacher, student = sides([4, 6])
    with torch.no_grad():
        found, _ = compare(teacher, student, CLASSES)
    assert found.grad_fn is None
    torch.testing.assert_close(found, written_out(teacher, student, 1.0))


@pytest.mark.parametrize("places", [[], [0], [4, 5, 9], list(range(10))])
def test_blocks_hold_each_token_and_place_once(places, at_once):
    logits = torch.zeros(10, 5)
    found = list(divergence._blocks(logits, torch.tensor(places, dtype=torch.long)))
    assert found[0][0].start == found[0][1].start == 0
    assert found[-1][0].stop == 10 and found[-1][1].stop == len(places)
    for (tokens, compared), (next_tokens, next_compared) in pairwise(found):
        assert tokens.stop == next_tokens.start and compared.stop == next_compared.start
    for tokens, compared in found:
        assert all(place in range(tokens.start, tokens.stop) for place in places[compared])
