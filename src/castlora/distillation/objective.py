"""What a transfer minimises: pure functions of logits and hidden states.

Paper: CAST, arXiv 2510.17902, the KL divergence between output distributions plus the mean squared
error between final hidden states. Across tokenizers the divergence runs over the shared vocabulary,
and approximate likelihood matching (arXiv 2503.20083) compares whole chunks of text.
"""

import torch
from torch import Tensor
from torch.nn import functional


def kl_divergence(teacher_log_probabilities: Tensor, student_log_probabilities: Tensor) -> Tensor:
    """KL(teacher ‖ student) per position, in nats.

    Args:
        teacher_log_probabilities: shape (positions, outcomes)
        student_log_probabilities: shape (positions, outcomes)

    Returns:
        shape (positions,)

    Example:
        >>> teacher, student = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
        >>> [round(divergence, 4) for divergence in kl_divergence(teacher.log(), student.log()).tolist()]
        [0.0, 0.3681]
    """
    terms = functional.kl_div(student_log_probabilities, teacher_log_probabilities, reduction="none", log_target=True)
    return terms.sum(-1)


def class_log_probabilities(logits: Tensor, classes: Tensor, count: int, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of classes of tokens, so that models with unlike vocabularies can be compared.

    Args:
        logits: shape (positions, vocabulary)
        classes: class of each token, shape (vocabulary,)
        count: number of classes
        temperature: divides the logits

    Returns:
        shape (positions, count); a class without tokens has the smallest probability that a log can hold

    Example:
        Two of four tokens that are equally likely make up a class of one half:

        >>> class_log_probabilities(torch.zeros(1, 4), torch.tensor([0, 1, 1, 2]), 3).exp()
        tensor([[0.2500, 0.5000, 0.2500]])
    """
    # Division by 1 would only copy what is wide.
    probabilities = (logits if temperature == 1 else logits / temperature).softmax(-1)
    sums = class_probabilities(probabilities, classes, count)
    return sums.clamp_min(torch.finfo(sums.dtype).tiny).log()


def class_probabilities(probabilities: Tensor, classes: Tensor, count: int) -> Tensor:
    """Probabilities of classes of tokens.

    Args:
        probabilities: of tokens, shape (positions, vocabulary)
        classes: class of each token, shape (vocabulary,)
        count: number of classes

    Returns:
        shape (positions, count)
    """
    sums = probabilities.new_zeros(len(probabilities), count)
    return sums.index_add_(1, classes.to(probabilities.device), probabilities)


def relative_error(predicted: Tensor, expected: Tensor) -> Tensor:
    """Squared error per position, as a share of the square of what is expected.

    Hidden states have another size in every model, and beside a KL divergence the error of large ones would count for
    more than that of small ones.

    Args:
        predicted: shape (positions, width)
        expected: shape (positions, width)

    Returns:
        shape (positions,)

    Example:
        >>> relative_error(torch.tensor([[0.0, 0.0], [3.0, 3.0]]), torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
        tensor([1.0000, 0.0400])
    """
    square = expected.square().sum(-1).clamp_min(torch.finfo(expected.dtype).tiny)
    return (predicted - expected).square().sum(-1) / square


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of `values` under `weights`, both of one shape; 0 where all weights are 0.

    Example:
        >>> weighted_mean(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0]))
        tensor(2.)
    """
    return (values * weights).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def chunk_log_probabilities(logits: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
    """Log-probability of the text between neighbouring aligned positions, in nats.

    Args:
        logits: shape (batch, tokens, vocabulary)
        ids: token ids, shape (batch, tokens)
        positions: aligned positions, shape (batch, aligned), increasing up to the padding

    Returns:
        shape (batch, aligned - 1)

    Example:
        A model that holds both tokens for equally likely gives a text of two tokens a quarter:

        >>> ids, positions = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 2, 3]])
        >>> chunk_log_probabilities(torch.zeros(1, 4, 2), ids, positions).exp()
        tensor([[0.2500, 0.5000]])
    """
    following = ids.roll(-1, dims=1).unsqueeze(-1)
    # One passage after the other: log-probabilities of all would be as wide as the logits.
    predicted = [one.float().log_softmax(-1).gather(-1, token) for one, token in zip(logits, following, strict=True)]
    return between_positions(torch.stack(predicted).squeeze(-1), positions)


def between_positions(log_probabilities: Tensor, positions: Tensor) -> Tensor:
    """Log-probability of the text between neighbouring aligned positions, in nats.

    Args:
        log_probabilities: of the token after each, shape (batch, tokens); the last has none after it
        positions: aligned positions, shape (batch, aligned), increasing up to the padding

    Returns:
        shape (batch, aligned - 1)
    """
    up_to = functional.pad(log_probabilities[:, :-1].cumsum(-1), (1, 0))
    at_positions = up_to.gather(1, positions)
    return at_positions[:, 1:] - at_positions[:, :-1]


def binary_kl(teacher_log_probability: Tensor, student_log_probability: Tensor) -> Tensor:
    """KL divergence between the events "this chunk comes next" of teacher and student, elementwise."""
    largest = -1e-4
    teacher, student = teacher_log_probability.clamp_max(largest), student_log_probability.clamp_max(largest)
    teacher_rest, student_rest = torch.log(-torch.expm1(teacher)), torch.log(-torch.expm1(student))
    return teacher.exp() * (teacher - student) + teacher_rest.exp() * (teacher_rest - student_rest)
