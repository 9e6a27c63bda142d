"""The update of the last layer with which the target predicts what source + LoRA does: pure functions of activations.

What the last module of a decoder-only model adds to the residual stream is read by the final norm and the output head
alone. So its update can be solved for from activations that were read once, without running the model again: by least
squares, and then by L-BFGS on the KL divergence.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from castlora.adapters.factors import LowRank
from castlora.distillation.objective import class_probabilities
from castlora.maps.cast_layer import balance
from castlora.maps.solvers import ridge_map

_RIDGE, _WHITENING = 0.001, 0.1
"""Penalty of the least squares, and what is added to the second moments that features are whitened by; both relative to
the mean square of the features."""
_ROUNDS, _ITERATIONS = 8, 3
"""Updates that L-BFGS gives, and its iterations for each."""
_PLACES_AT_ONCE, _TOKENS_AT_ONCE = 256, 8192
"""Logits of all places, or all rows of a large head in full precision, would fill more memory than the model."""
_LARGEST_CHANGE = 10.0
"""Nats by which the least squares change the logarithm of a probability at most."""
_OTHERS = 0.01
"""Probability left to all other tokens where the answer says which one follows."""
_SMALLEST_REST = -14.0
"""Logarithm of the share of a class that its other tokens keep at least."""


@dataclass(frozen=True)
class Places:
    """What is known at positions of a text, a row each."""

    features: Tensor
    """What the solved module reads, shape (places, d_in)."""
    hidden: Tensor
    """Final hidden states before the norm, without an update of the solved module, shape (places, width)."""
    taught: Tensor
    """Log-probabilities that the teacher gives to classes of tokens, shape (places, classes); any where not aligned."""
    next_tokens: Tensor
    """The target's token that follows, shape (places,); -1 for none."""
    next_taught: Tensor
    """Log-probability that the teacher gives to the text of that token, shape (places,); 0 where it is not known."""
    is_aligned: Tensor
    """Whether the teacher has read the same text there, shape (places,)."""
    weights: Tensor
    """How much each of them counts, shape (places,)."""

    def that_teach(self) -> "Places":
        """Those that are aligned or have a token that follows."""
        return self.at(self.is_aligned | (self.next_tokens >= 0))

    def at(self, rows: Tensor | slice) -> "Places":
        """Some of them."""
        return Places(**{name: tensor[rows] for name, tensor in vars(self).items()})

    def weighing(self, weight: float) -> "Places":
        """The same, with another weight of all of them together."""
        return replace(self, weights=weight * self.weights / self.weights.sum())

    @classmethod
    def together(cls, parts: Sequence["Places"]) -> "Places":
        """Those of all parts."""
        return cls(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


@dataclass(frozen=True)
class Tail:
    """What follows the solved module: the final norm and the output head."""

    norm: Callable[[Tensor], Tensor]
    head: Tensor
    """Shape (vocabulary, width), in the precision of the model."""
    is_centred: bool
    """Whether the norm takes the mean away, as LayerNorm does and RMSNorm does not."""

    def logits(self, normed: Tensor) -> Tensor:
        """What the head makes of hidden states behind the norm (places, width): shape (places, vocabulary), fp32."""
        return (normed.to(self.head.dtype) @ self.head.T).float()

    def pull(self, slopes: Tensor) -> Tensor:
        """What changes by `slopes` (places, vocabulary) with each logit changes by this with `normed`, same shape."""
        return (slopes.to(self.head.dtype) @ self.head).float()

    def sizes(self, hidden: Tensor) -> Tensor:
        """What the norm divides each hidden state by, shape (places, 1)."""
        return self._centred(hidden).square().mean(-1, keepdim=True).sqrt()

    def gain(self, hidden: Tensor) -> Tensor:
        """What the norm multiplies each dimension with, shape (width,), as its outputs show it."""
        unit = self._centred(hidden) / self.sizes(hidden)
        unit = unit - unit.mean(0)
        normed = self.norm(hidden)
        return (unit * (normed - normed.mean(0))).sum(0) / unit.square().sum(0)

    def _centred(self, hidden: Tensor) -> Tensor:
        return hidden - hidden.mean(-1, keepdim=True) if self.is_centred else hidden


def taught_log_probabilities(own: Tensor, places: Places, classes: Tensor) -> Tensor:
    """What the target should predict: log-probabilities of its tokens, shape (places, vocabulary).

    Where both models have read the same text, each class of tokens gets the probability that the teacher gives it, and
    its tokens share it as the target has it; where the class of the token that follows holds others, that token gets
    what the teacher gives to its text, or all where this is not known. Inside a stretch that only the target cuts, the
    answer says which token follows.

    Args:
        own: log-probabilities that the target gives as it is, shape (places, vocabulary)
        places: where they are
        classes: class of each token of the target, shape (vocabulary,)
    """
    of_classes = class_probabilities(own.exp(), classes, places.taught.shape[1])
    missing = places.taught - of_classes.clamp_min_(torch.finfo(own.dtype).tiny).log_()
    wanted = missing.index_select(1, classes).add_(own)
    follows, token = places.next_tokens >= 0, places.next_tokens.clamp_min(0).unsqueeze(-1)
    of_class = classes[token]
    is_open = places.is_aligned & follows & (classes.bincount()[of_class] > 1).squeeze(-1)
    whole, is_in_class = places.taught.gather(1, of_class)[is_open], classes == of_class[is_open]
    said = places.next_taught.unsqueeze(-1)[is_open].minimum(whole)
    of_others = _rest(whole, said) - _rest(whole, wanted[is_open].gather(1, token[is_open]))
    wanted[is_open] = (wanted[is_open] + is_in_class * of_others).scatter(1, token[is_open], said)
    is_said = ~places.is_aligned & follows
    said_there = (own[is_said] + math.log(_OTHERS)).scatter(1, token[is_said], math.log(1 - _OTHERS))
    wanted[is_said] = said_there.log_softmax(-1)
    return wanted


def _rest(whole: Tensor, part: Tensor) -> Tensor:
    """Logarithm of what a probability leaves of a larger one, both given as logarithms; never nothing."""
    return whole + torch.log1p(-(part - whole).clamp_max(0).exp()).clamp_min(_SMALLEST_REST)


def solve_readout(places: Places, tail: Tail, classes: Tensor, rank: int) -> Iterator[LowRank]:
    """Updates of the last module with which the target predicts ever more like the teacher at these places.

    The last of them knows the places by heart; which one is best, other text has to say.

    Args:
        places: what is known at each position
        tail: the norm and the head of the target
        classes: class of each token of the target, shape (vocabulary,)
        rank: largest rank of the updates

    Yields:
        A (rank, d_in) and B (width, rank), balanced
    """
    places = places.that_teach()
    update = least_squares(places, tail, classes, rank)
    yield update
    yield from refine(places, tail, classes, update)


@torch.no_grad()
def least_squares(places: Places, tail: Tail, classes: Tensor, rank: int) -> LowRank:
    """The update from one step of Gauss-Newton.

    It finds the change of every final hidden state that brings the logarithms of the probabilities nearest to those
    that are taught, tokens weighted by how probable they are on average to the target or the teacher, and predicts
    these changes from the features by ridge regression of reduced rank, in the metric of the logits.
    """
    scale = places.features.square().mean().sqrt()
    features = (places.features / scale).double()
    change, metric = _wanted_change(places, tail, classes)
    sizes = tail.sizes(places.hidden)
    weights = places.weights.double() * sizes.squeeze(-1).double() ** -2
    weighted = features * (weights / weights.mean()).unsqueeze(-1)
    cross_moments = (sizes * change).double().T @ weighted
    whole = ridge_map(weighted.T @ features, cross_moments, _RIDGE)
    a, b = _of_rank(whole, cross_moments, torch.linalg.cholesky(metric), rank)
    return balance(LowRank((a / scale).float(), b.float()))


def refine(places: Places, tail: Tail, classes: Tensor, update: LowRank) -> Iterator[LowRank]:
    """Follows an update on its way to the least KL divergence between what is taught and what is predicted.

    L-BFGS looks at all places at once. Features are whitened for it, so that frequent directions do not hide others.
    """
    weights = places.weights / places.weights.sum()
    moments = (places.features.T @ (weights.unsqueeze(-1) * places.features)).double()
    moments.diagonal().add_(_WHITENING * moments.diagonal().mean())
    root = torch.linalg.cholesky(moments)
    features = torch.linalg.solve_triangular(root, places.features.double().T, upper=False).T.float()
    size = places.hidden.square().mean().sqrt()
    whitened = balance(LowRank((update.a.double() @ root).float(), update.b / size))
    a, b = whitened.a.clone().requires_grad_(), whitened.b.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([a, b], max_iter=_ITERATIONS, history_size=20, line_search_fn="strong_wolfe")

    def divergence() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), device=features.device)
        for rows in _parts(len(features)):
            part = places.at(rows)
            normed = tail.norm(part.hidden + size * (features[rows] @ a.T @ b.T))
            own = tail.logits(normed.detach()).log_softmax(-1)
            taught = taught_log_probabilities(own, part, classes)
            shares = taught.exp()
            # How the divergence changes with each logit, since what is taught about a class moves no token within it.
            slopes = own.exp() - shares
            total += weights[rows] @ taught.sub_(own).mul_(shares).sum(-1)
            normed.backward(tail.pull(slopes.mul_(weights[rows].unsqueeze(-1))))
        return total

    for _ in range(_ROUNDS):
        optimizer.step(divergence)
        solved = torch.linalg.solve_triangular(root, a.detach().double(), upper=False, left=False)
        yield balance(LowRank(solved.float(), size * b.detach()))


def _wanted_change(places: Places, tail: Tail, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The change of each hidden state, in units of its size, and the metric of the logits in which it counts.

    Returns:
        shape (places, width), and shape (width, width) in fp64
    """
    gain = tail.gain(places.hidden)
    weights = places.weights / places.weights.sum()
    probable = torch.zeros(len(tail.head), device=gain.device)
    for rows, now, wanted in _predictions(places, tail, classes):
        probable += weights[rows] @ (now.exp() + wanted.exp()) / 2
    metric = _metric(tail.head, probable, gain)
    metric.diagonal().add_(0.01 * metric.diagonal().mean())
    pulls = []
    for _, now, wanted in _predictions(places, tail, classes):
        change = (wanted - now).clamp(-_LARGEST_CHANGE, _LARGEST_CHANGE)
        change = probable * (change - (change @ probable).unsqueeze(-1))
        of_tokens = zip(change.split(_TOKENS_AT_ONCE, dim=1), tail.head.split(_TOKENS_AT_ONCE), strict=True)
        pulls.append(gain * torch.stack([part @ rows.float() for part, rows in of_tokens]).sum(0))
    return torch.linalg.solve(metric.float(), torch.cat(pulls).T).T, metric


def _predictions(places: Places, tail: Tail, classes: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some places at a time, with log-probabilities as they are and as they should be."""
    for rows in _parts(len(places.hidden)):
        own = tail.logits(tail.norm(places.hidden[rows])).log_softmax(-1)
        yield rows, own, taught_log_probabilities(own, places.at(rows), classes)


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + _PLACES_AT_ONCE) for start in range(0, count, _PLACES_AT_ONCE))


def _metric(head: Tensor, probable: Tensor, gain: Tensor) -> Tensor:
    """How much a change of a hidden state changes the logarithms of the probabilities, squared, tokens weighted.

    Args:
        head: shape (vocabulary, width)
        probable: weights of the tokens, shape (vocabulary,)
        gain: of the norm, shape (width,)

    Returns:
        shape (width, width), fp64
    """
    weights = probable.double()
    of_tokens = list(zip(weights.split(_TOKENS_AT_ONCE), head.split(_TOKENS_AT_ONCE), strict=True))
    mean = torch.stack([weight @ rows.double() for weight, rows in of_tokens]).sum(0)
    metric = torch.zeros(head.shape[1], head.shape[1], dtype=torch.float64, device=head.device)
    for weight, rows in of_tokens:
        centred = gain.double() * (rows.double() - mean)
        metric += centred.T @ (weight.unsqueeze(-1) * centred)
    return metric


def _of_rank(whole: Tensor, cross_moments: Tensor, metric_root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The B·A of that rank nearest to a regression, as its predictions count in a metric.

    Args:
        whole: the regression W, shape (width, d_in)
        cross_moments: of what it predicts with what it reads, E[y xᵀ], shape (width, d_in), so that W·E[x yᵀ] are the
            second moments of its predictions
        metric_root: Cholesky factor of the metric, shape (width, width)
        rank: largest rank

    Returns:
        A (rank, d_in) and B (width, rank)
    """
    predictions = metric_root.T @ whole @ cross_moments.T @ metric_root
    largest = torch.linalg.eigh((predictions + predictions.T) / 2).eigenvectors[:, -rank:]
    b = torch.linalg.solve_triangular(metric_root.T, largest, upper=True)
    return largest.T @ metric_root.T @ whole, b
