import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Categorical
from torch.distributions import kl_divergence as reference_kl

from castlora.distillation.objective import (
    binary_kl,
    chunk_log_probabilities,
    class_log_probabilities,
    kl_divergence,
    weighted_mean,
)

seeds = st.integers(0, 2**16)
log_probabilities = st.floats(-200, 0)


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(seed=seeds, positions=st.integers(1, 5), outcomes=st.integers(1, 9))
def test_kl_divergence_is_that_of_torch_distributions(seed, positions, outcomes):
    teacher, student = random(2, positions, outcomes, seed=seed).log_softmax(-1)
    expected = reference_kl(Categorical(logits=teacher), Categorical(logits=student))
    torch.testing.assert_close(kl_divergence(teacher, student), expected, rtol=1e-4, atol=1e-5)
    assert (kl_divergence(teacher, teacher) == 0).all()


@given(
    seed=seeds,
    classes=st.lists(st.integers(0, 4), min_size=7, max_size=7),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_probabilities_of_classes_are_sums_over_their_tokens(seed, classes, temperature):
    logits = random(3, 7, seed=seed)
    result = class_log_probabilities(logits, torch.tensor(classes), 5, temperature)
    assert result.shape == (3, 5)
    torch.testing.assert_close(result.exp().sum(-1), torch.ones(3))
    tokens = (logits / temperature).softmax(-1)
    for number in range(5):
        members = [token for token, own in enumerate(classes) if own == number]
        torch.testing.assert_close(result[:, number].exp(), tokens[:, members].sum(-1))
    assert torch.isfinite(result).all()


def test_classes_of_one_token_each_are_the_tokens():
    logits = random(2, 5)
    torch.testing.assert_close(class_log_probabilities(logits, torch.arange(5), 5), logits.log_softmax(-1))


def test_divergence_stays_readable_where_only_one_side_has_a_class():
    teacher = class_log_probabilities(random(1, 6), torch.tensor([1, 2, 3, 4, 0, 0]), 5)
    student_logits = random(1, 4, seed=1).requires_grad_()
    student = class_log_probabilities(student_logits, torch.tensor([1, 2, 3, 4]), 5)
    divergence = kl_divergence(teacher, student)
    divergence.sum().backward()
    assert 0 < divergence.item() < 100
    assert student_logits.grad is not None
    assert torch.isfinite(student_logits.grad).all() and student_logits.grad.abs().max() > 0
    assert 0 <= kl_divergence(student, teacher).item() < 100


@given(st.lists(st.tuples(st.floats(-5, 5, width=32), st.sampled_from([0, 0.25, 1])), min_size=1, max_size=8))
def test_weighted_mean(pairs):
    values, weights = torch.tensor(pairs).T
    total = sum(weight for _, weight in pairs)
    expected = sum(value * weight for value, weight in pairs) / total if total else 0.0
    assert abs(weighted_mean(values, weights).item() - expected) < 1e-5


@given(seed=seeds, steps=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_chunk_log_probabilities_are_sums_over_the_tokens_in_between(seed, steps):
    places = torch.tensor(steps).cumsum(0).tolist()
    length, vocabulary = places[-1] + 2, 7
    logits = random(2, length, vocabulary, seed=seed)
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(seed))
    expected = [
        [
            sum(float(logits[row, at - 1].log_softmax(-1)[ids[row, at]]) for at in range(start + 1, stop + 1))
            for start, stop in itertools.pairwise(places)
        ]
        for row in range(2)
    ]
    positions = torch.tensor([places, places])
    result = chunk_log_probabilities(logits, ids, positions)
    torch.testing.assert_close(result, torch.tensor(expected).reshape(2, len(places) - 1), rtol=1e-4, atol=1e-4)


@given(teacher=log_probabilities, student=log_probabilities)
def test_binary_kl_is_never_negative_and_zero_at_equality(teacher, student):
    teacher_log, student_log = torch.tensor([teacher]), torch.tensor([student])
    assert binary_kl(teacher_log, student_log).item() >= -1e-6
    assert binary_kl(teacher_log, teacher_log).item() == 0


@given(teacher=st.floats(0.01, 0.99), student=st.floats(0.01, 0.99))
def test_binary_kl_is_that_of_torch_distributions(teacher, student):
    expected = reference_kl(Bernoulli(torch.tensor(teacher)), Bernoulli(torch.tensor(student)))
    result = binary_kl(torch.tensor(teacher).log(), torch.tensor(student).log())
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-5)


def test_binary_kl_has_a_gradient_where_the_student_is_certain():
    student = torch.tensor([0.0, -1e-9, -30.0], requires_grad=True)
    binary_kl(torch.tensor([-2.0, -2.0, -2.0]), student).sum().backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad[2] < 0
