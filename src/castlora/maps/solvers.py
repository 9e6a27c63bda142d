"""Closed forms: pure functions from moments to maps."""

from collections.abc import Callable

import torch
from torch import Tensor


def ridge_map(xx: Tensor, yx: Tensor, ridge: float) -> Tensor:
    """The linear map W that minimises E|W x - y|² + λ|W|², with λ = ridge · mean(diag(xx)).

    Args:
        xx: second moments of x, shape (d_x, d_x)
        yx: cross moments, shape (d_y, d_x)
        ridge: strength of the penalty relative to the mean square of x, at least 0

    Returns:
        W, shape (d_y, d_x), in the dtype of the moments

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> y = x @ torch.tensor([[2.0], [3.0]])
        >>> ridge_map(x.T @ x, y.T @ x, ridge=0.0)
        tensor([[2.0000, 3.0000]])
    """
    return ridge_inverse(xx, ridge)(yx.T).T


def ridge_inverse(xx: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    """The map v → (xx + λI)⁻¹ v, with λ = ridge · mean(diag(xx)), whose factors are computed once.

    Args:
        xx: second moments of x, shape (d_x, d_x)
        ridge: strength of the penalty relative to the mean square of x, at least 0

    Returns:
        a function of v, shape (d_x, any)

    Example:
        >>> solve = ridge_inverse(torch.diag(torch.tensor([1.0, 3.0])), ridge=0.5)
        >>> solve(torch.tensor([[4.0], [8.0]]))
        tensor([[2.],
                [2.]])
    """
    regularised = xx.clone()
    regularised.diagonal().add_(ridge * xx.diagonal().mean())
    if ridge > 0:
        factor, failed_at = torch.linalg.cholesky_ex(regularised)
        if failed_at == 0:
            return lambda v: torch.cholesky_solve(v, factor)
    # Directions that never vary leave the moments singular where no penalty, or too small a one, was added.
    inverse: Tensor = torch.linalg.pinv(regularised, hermitian=True)
    return lambda v: inverse @ v


def random_semi_orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random matrix (rows, columns) whose shorter side is orthonormal (QR of a Gaussian).

    Example:
        >>> wide = random_semi_orthogonal(2, 5, torch.Generator().manual_seed(0))
        >>> torch.allclose(wide @ wide.T, torch.eye(2), atol=1e-6)
        True
    """
    tall = torch.randn(max(rows, columns), min(rows, columns), generator=generator)
    orthonormal: Tensor = torch.linalg.qr(tall).Q
    return orthonormal if rows >= columns else orthonormal.T
