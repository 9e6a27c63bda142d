"""Closed forms: pure functions from moments to maps."""

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
    penalty = ridge * xx.diagonal().mean()
    regularised = xx + penalty * torch.eye(len(xx), dtype=xx.dtype)
    solution: Tensor = torch.linalg.lstsq(regularised, yx.T, driver="gelsd").solution
    return solution.T


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
