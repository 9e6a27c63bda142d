"""Lift: how much of what retraining gains a transfer brings, with bootstrap intervals."""

import math
from dataclasses import dataclass

import numpy as np

COUNTABLE_GAIN = 0.05
"""A lift counts only where retraining gains at least this much over the bare model."""


@dataclass(frozen=True)
class Lift:
    """How much of what retraining gains over the bare target was transferred."""

    lift: float
    """(transferred - bare) / (retrained - bare); NaN where retraining gains nothing."""
    ci95: tuple[float, float]
    ratio: float
    """transferred / retrained."""
    countable: bool
    """Whether retraining gains at least `COUNTABLE_GAIN` over the bare target."""


def bootstrap_interval(
    scores: np.ndarray, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean score.

    Scores that are all alike give an interval of no width.

    Args:
        scores: score of each item, shape (n,).
        confidence: probability mass of the interval.
        resamples: bootstrap samples.
        seed: chooses the samples.

    Example:
        >>> bootstrap_interval(np.ones(20))
        (1.0, 1.0)
        >>> low, high = bootstrap_interval(np.array([0.0, 1.0] * 50))
        >>> low < 0.5 < high
        True
    """
    rng = np.random.default_rng(seed)
    return _percentiles(scores[rng.integers(len(scores), size=(resamples, len(scores)))].mean(axis=1), confidence)


def lift_with_interval(
    bare: np.ndarray,
    transferred: np.ndarray,
    retrained: np.ndarray,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Lift:
    """Lift of a transferred adapter, with a paired bootstrap interval.

    Each argument holds per-item scores on the same items in the same order, shape (n,), or (seeds, n) for
    several runs of one method; the numbers of seeds may differ. A bootstrap sample draws items once for all
    three, and seeds for each on its own. The interval is NaN where retraining gains nothing over the bare model
    in more samples than the interval leaves out at one end.

    Raises:
        ValueError: the arrays differ in their number of items.

    Example:
        Retraining gains eight of ten items, and the transferred adapter six of those:

        >>> bare, transferred, retrained = (np.array([1.0] * right + [0.0] * (10 - right)) for right in (1, 7, 9))
        >>> found = lift_with_interval(bare, transferred, retrained)
        >>> round(found.lift, 2), round(found.ratio, 2), found.countable
        (0.75, 0.78, True)
    """
    groups = [np.atleast_2d(scores) for scores in (bare, transferred, retrained)]
    n = int(groups[0].shape[1])
    if any(group.shape[1] != n for group in groups):
        raise ValueError(f"items differ: {[group.shape[1] for group in groups]}; score the same task file")
    rng = np.random.default_rng(seed)
    items = rng.integers(n, size=(resamples, n))
    samples = _lift(*(_resampled_means(group, items, rng) for group in groups))
    means = [group.mean() for group in groups]
    undefined = np.isnan(samples)
    bounded = undefined.mean() <= (1 - confidence) / 2
    return Lift(
        lift=float(_lift(*means)),
        ci95=_percentiles(samples[~undefined], confidence) if bounded else (math.nan, math.nan),
        ratio=float(means[1] / means[2]) if means[2] else math.nan,
        countable=bool(means[2] - means[0] >= COUNTABLE_GAIN),
    )


def _resampled_means(group: np.ndarray, items: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of bootstrap samples, shape (samples,), of scores, shape (seeds, n), at items, shape (samples, n)."""
    per_seed = np.stack([scores[items].mean(axis=1) for scores in group])
    means: np.ndarray = np.take_along_axis(per_seed, rng.integers(len(group), size=per_seed.shape), axis=0).mean(axis=0)
    return means


def _lift(bare: np.ndarray, transferred: np.ndarray, retrained: np.ndarray) -> np.ndarray:
    lift: np.ndarray = (transferred - bare) / np.where(retrained > bare, retrained - bare, math.nan)
    return lift


def _percentiles(samples: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
