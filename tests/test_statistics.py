import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from castlora.maps.solvers import random_semi_orthogonal, ridge_map
from castlora.maps.statistics import Moments, load_moments, save_moments

seeds = st.integers(0, 2**16)


def positions(count: int, d_x: int, d_y: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, d_x, generator=generator) + 0.5
    mixed = x @ torch.randn(d_x, d_y, generator=generator)
    return x, mixed + 0.1 * torch.randn(count, d_y, generator=generator) - 2


def moments_of(x: torch.Tensor, y: torch.Tensor) -> Moments:
    moments = Moments.zeros(x.shape[1], y.shape[1])
    moments.update(x, y)
    return moments


def assert_equal(left: Moments, right: Moments, **tolerance: float) -> None:
    for field, value in vars(left).items():
        torch.testing.assert_close(value, vars(right)[field], **tolerance)


@given(seed=seeds, borders=st.lists(st.integers(0, 40), max_size=3).map(sorted))
def test_shards_add_up_to_one_pass(seed, borders):
    x, y = positions(40, 3, 4, seed)
    shards = [moments_of(x[start:stop], y[start:stop]) for start, stop in itertools.pairwise([0, *borders, 40])]
    merged = Moments.zeros(3, 4)
    for shard in shards:
        merged = merged.merge(shard)
    assert_equal(merged, moments_of(x, y), rtol=1e-5, atol=1e-5)
    assert merged.count == 40
    assert all(tensor.dtype == torch.float64 for tensor in vars(merged).values())


def test_merging_leaves_both_sides_as_they_are():
    left, right = moments_of(*positions(5, 2, 2, seed=1)), moments_of(*positions(7, 2, 2, seed=2))
    left.merge(right)
    assert (left.count, right.count) == (5, 7)
    assert_equal(left.merge(right), right.merge(left))


def test_moments_are_those_of_numpy():
    x, y = positions(200, 3, 4)
    moments = moments_of(x, y)
    cov_xx, cov_yx = moments.covariances()
    both = np.cov(np.hstack([x, y]).T.astype(np.float64), bias=True)
    np.testing.assert_allclose(cov_xx, both[:3, :3], rtol=1e-5)
    np.testing.assert_allclose(cov_yx, both[3:, :3], rtol=1e-4)
    raw_xx, raw_yx = moments.raw()
    np.testing.assert_allclose(raw_xx, x.double().T @ x.double() / 200, rtol=1e-5)
    np.testing.assert_allclose(raw_yx, y.double().T @ x.double() / 200, rtol=1e-5)


def test_saved_moments_come_back_to_the_bit(tmp_path):
    named = {
        "model.layers.0.q_proj/0": moments_of(*positions(9, 2, 3)),
        "model.layers.1.q_proj/0": moments_of(*positions(9, 4, 1, seed=5)),
    }
    save_moments(named, tmp_path / "moments.safetensors")
    loaded = load_moments(tmp_path / "moments.safetensors")
    assert loaded.keys() == named.keys()
    for name, moments in named.items():
        assert_equal(loaded[name], moments, rtol=0, atol=0)


@given(seed=seeds, ridge=st.sampled_from([0.0, 1e-4, 0.1, 3.0]), d_x=st.integers(1, 6), d_y=st.integers(1, 6))
def test_ridge_map_is_the_closed_form(seed, ridge, d_x, d_y):
    x, y = (side.double() for side in positions(50, d_x, d_y, seed))
    xx, yx = x.T @ x / 50, y.T @ x / 50
    penalty = ridge * np.trace(xx) / d_x
    expected = yx.numpy() @ np.linalg.inv(xx.numpy() + penalty * np.eye(d_x))
    np.testing.assert_allclose(ridge_map(xx, yx, ridge), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_ridge_map_is_the_minimum_of_its_objective(ridge):
    x, y = (side.double() for side in positions(60, 3, 2))
    xx, yx = x.T @ x / 60, y.T @ x / 60
    solution = ridge_map(xx, yx, ridge)

    def objective(w: torch.Tensor) -> float:
        error = (x @ w.T - y).square().sum(-1).mean()
        return float(error + ridge * xx.diagonal().mean() * w.square().sum())

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = 1e-3 * torch.randn(solution.shape, generator=generator, dtype=torch.float64)
        assert objective(solution) < objective(solution + step)


def test_ridge_map_without_penalty_recovers_an_exact_map():
    x, _ = positions(50, 4, 1)
    x, truth = x.double(), torch.arange(8, dtype=torch.float64).reshape(2, 4)
    torch.testing.assert_close(ridge_map(x.T @ x, truth @ x.T @ x, 0.0), truth)


def test_a_penalty_below_the_rounding_of_the_moments_is_borne():
    # Products in fp32 leave moments whose smallest eigenvalues are slightly negative.
    xx = torch.diag(torch.tensor([1.0, 4.0, -1e-7], dtype=torch.float64))
    assert torch.linalg.cholesky_ex(xx + 1e-12 * torch.eye(3)).info > 0
    solution = ridge_map(xx, torch.tensor([[2.0, 8.0, 0.0]], dtype=torch.float64), ridge=1e-12)
    torch.testing.assert_close(solution, torch.tensor([[2.0, 2.0, 0.0]], dtype=torch.float64))


def test_ridge_map_bears_directions_that_never_vary():
    x, y = (side.double() for side in positions(50, 3, 2))
    x[:, 1] = 0
    solution = ridge_map(x.T @ x, y.T @ x, 0.0)
    assert torch.isfinite(solution).all()
    assert solution[:, 1].abs().max() < 1e-9


@given(rows=st.integers(1, 8), columns=st.integers(1, 8), seed=seeds)
def test_random_maps_have_an_orthonormal_shorter_side(rows, columns, seed):
    matrix = random_semi_orthogonal(rows, columns, torch.Generator().manual_seed(seed))
    assert matrix.shape == (rows, columns)
    product = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    torch.testing.assert_close(product, torch.eye(min(rows, columns)), rtol=0, atol=1e-5)
    assert torch.equal(matrix, random_semi_orthogonal(rows, columns, torch.Generator().manual_seed(seed)))
