"""Additive second moments of paired activations, from which the maps are solved."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from castlora.execution.run_directory import write_whole
from castlora.finite import is_finite


@dataclass
class Moments:
    """Sums over positions of two activations x (regressor) and y (response), in fp64.

    Sums of several shards are added with `merge`, so any engine can compute them in parts.
    """

    count: Tensor
    """Number of positions, shape ()."""
    sum_x: Tensor
    """Shape (d_x,)."""
    sum_y: Tensor
    """Shape (d_y,)."""
    xx: Tensor
    """Σ x xᵀ, shape (d_x, d_x)."""
    yx: Tensor
    """Σ y xᵀ, shape (d_y, d_x)."""
    square_y: Tensor
    """Σ |y|², shape ()."""

    @classmethod
    def zeros(cls, d_x: int, d_y: int, device: torch.device | str = "cpu") -> "Moments":
        """The moments of no positions, on a device that has double precision."""
        shapes = ((), (d_x,), (d_y,), (d_x, d_x), (d_y, d_x), ())
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def fits(self, d_x: int, d_y: int) -> bool:
        """Whether these are moments of positions of such activations, and numbers throughout."""
        expected = vars(Moments.zeros(d_x, d_y, "meta"))
        have_shapes = all(tensor.shape == expected[field].shape for field, tensor in vars(self).items())
        are_numbers = all(tensor.dtype == torch.float64 and is_finite(tensor) for tensor in vars(self).values())
        return have_shapes and are_numbers and bool(self.count > 0)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds positions: x (n, d_x) and y (n, d_y). Products in fp32, sums in fp64."""
        x, y = x.detach().float(), y.detach().float()
        self.count += len(x)
        device = self.count.device
        self.sum_x += x.sum(0).to(device)
        self.sum_y += y.sum(0).to(device)
        self.xx += (x.T @ x).to(device)
        self.yx += (y.T @ x).to(device)
        self.square_y += y.square().sum(1).to(device).double().sum()

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of positions together."""
        return Moments(*(mine + theirs for mine, theirs in zip(self._tensors(), other._tensors(), strict=True)))

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Centred moments per position: cov(x, x) (d_x, d_x) and cov(y, x) (d_y, d_x)."""
        mean_x, mean_y = self.sum_x / self.count, self.sum_y / self.count
        return (
            self.xx / self.count - torch.outer(mean_x, mean_x),
            self.yx / self.count - torch.outer(mean_y, mean_x),
        )

    def raw(self) -> tuple[Tensor, Tensor]:
        """Uncentred moments per position: E[x xᵀ] (d_x, d_x) and E[y xᵀ] (d_y, d_x)."""
        return self.xx / self.count, self.yx / self.count

    def explained_by(self, matrix: Tensor, centred: bool) -> float:
        """Share of the mean square of y that matrix · x predicts; below 0 where predicting nothing would be better.

        Args:
            matrix: shape (d_y, d_x)
            centred: whether x and y are taken from their means
        """
        xx, yx = self.covariances() if centred else self.raw()
        yy = self.square_y / self.count
        if centred:
            yy = yy - (self.sum_y / self.count).square().sum()
        matrix = matrix.to(yx)
        left = yy - 2 * (matrix * yx).sum() + ((matrix @ xx) * matrix).sum()
        return float(1 - left / yy.clamp_min(torch.finfo(yy.dtype).tiny))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.count, self.sum_x, self.sum_y, self.xx, self.yx, self.square_y


def save_moments(moments: dict[str, Moments], path: Path) -> None:
    """Writes named moments to one safetensors file, in full or not at all."""
    tensors = {f"{name}/{field}": value for name, m in moments.items() for field, value in vars(m).items()}
    write_whole(path, save(tensors))


def load_moments(path: Path) -> dict[str, Moments]:
    """Reads what `save_moments` wrote."""
    fields: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(path).items():
        name, field = key.rsplit("/", 1)
        fields.setdefault(name, {})[field] = value
    return {name: Moments(**values) for name, values in fields.items()}
