import math

import numpy as np
import pytest

from castlora.lift import bootstrap_interval, lift_with_interval


def scores(*shares: float, n: int = 200) -> tuple[np.ndarray, ...]:
    """Nested score arrays: the items that a weaker model gets right, a stronger one gets right too."""
    return tuple((np.arange(n) < share * n).astype(float) for share in shares)


def test_interval_of_a_proportion_agrees_with_the_normal_approximation() -> None:
    low, high = bootstrap_interval(scores(0.3, n=1000)[0])
    half_width = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - half_width, abs=0.004)
    assert high == pytest.approx(0.3 + half_width, abs=0.004)


def test_interval_is_reproducible_and_narrows_with_less_confidence() -> None:
    (sample,) = scores(0.5)
    wide = bootstrap_interval(sample, confidence=0.95)
    narrow = bootstrap_interval(sample, confidence=0.5)
    assert wide == bootstrap_interval(sample, confidence=0.95)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]


def test_scores_all_alike_give_no_width() -> None:
    assert bootstrap_interval(np.ones(7)) == (1.0, 1.0)


def test_lift_and_ratio() -> None:
    result = lift_with_interval(*scores(0.2, 0.5, 0.7))
    assert result.lift == pytest.approx(0.6)
    assert result.ratio == pytest.approx(5 / 7)
    assert result.ci95[0] < 0.6 < result.ci95[1]
    assert result.countable


def test_items_are_resampled_together() -> None:
    bare, retrained = scores(0.1, 0.9)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(bare))
    paired = lift_with_interval(bare, retrained, retrained)
    unpaired = lift_with_interval(bare, retrained[order], retrained)
    assert paired.ci95 == (1.0, 1.0)
    assert unpaired.lift == pytest.approx(1.0)
    assert unpaired.ci95[0] < 1.0 < unpaired.ci95[1]


@pytest.mark.parametrize("retrained_share", [0.3, 0.2])
def test_lift_without_gain_is_nan(retrained_share: float) -> None:
    bare, transferred, retrained = scores(0.3, 0.5, retrained_share)
    result = lift_with_interval(bare, transferred, retrained)
    assert math.isnan(result.lift)
    assert all(math.isnan(bound) for bound in result.ci95)
    assert not result.countable


def test_interval_is_nan_where_the_gain_may_be_none() -> None:
    bare, transferred, retrained = scores(0.50, 0.51, 0.52)
    result = lift_with_interval(bare, np.roll(transferred, 70), np.roll(retrained, 90))
    assert result.lift == pytest.approx(0.5)
    assert math.isnan(result.ci95[0])


def test_ratio_to_nothing_is_nan() -> None:
    assert math.isnan(lift_with_interval(*scores(0.0, 0.0, 0.0)).ratio)


def test_a_gain_of_five_points_counts() -> None:
    assert lift_with_interval(*scores(0.0, 0.0, 0.05)).countable
    assert not lift_with_interval(*scores(0.0, 0.0, 0.045)).countable


def test_seeds_are_averaged_and_widen_the_interval() -> None:
    bare, low, middle, high, retrained = scores(0.2, 0.3, 0.5, 0.7, 0.8, n=2000)
    seeds = lift_with_interval(bare, np.stack([low, middle, high]), np.stack([retrained, retrained]))
    one = lift_with_interval(bare, middle, retrained)
    assert seeds.lift == pytest.approx(one.lift) == pytest.approx(0.5)
    assert seeds.ci95[1] - seeds.ci95[0] > 2 * (one.ci95[1] - one.ci95[0])


def test_different_items_are_refused() -> None:
    with pytest.raises(ValueError, match="same task file"):
        lift_with_interval(np.ones(5), np.ones(6), np.ones(5))
