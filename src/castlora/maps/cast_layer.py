"""The CAST layer: two maps around a frozen LoRA, live or folded into a plain LoRA.

Paper: CAST, arXiv 2510.17902, eq. 1-3: delta = map_from_source · B · A · map_to_source · h_target.
"""

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from castlora.adapters.factors import LowRank
from castlora.models.modules import Rows

logger = logging.getLogger("castlora")


def fold_to_source(a: Tensor, map_to_source: Tensor) -> Tensor:
    """A' = A · map_to_source.

    Args:
        a: A of the source LoRA, shape (r, d_source_in)
        map_to_source: shape (d_source_in, d_target_in)

    Returns:
        shape (r, d_target_in)
    """
    return a @ map_to_source


def fold_from_source(map_from_source: Tensor, b: Tensor) -> Tensor:
    """B' = map_from_source · B.

    Args:
        map_from_source: shape (d_target_out, d_source_out)
        b: B of the source LoRA with its scale, shape (d_source_out, r)

    Returns:
        shape (d_target_out, r)
    """
    return map_from_source @ b


class CastLayer(nn.Module):
    """The live form of one branch: a frozen source LoRA between two trainable maps.

    Example:
        Folded, it is a plain LoRA that computes the same update:

        >>> random = torch.Generator().manual_seed(0)
        >>> lora = LowRank(torch.randn(4, 16, generator=random), torch.randn(16, 4, generator=random))
        >>> to_source, from_source = torch.randn(16, 24, generator=random), torch.randn(24, 16, generator=random)
        >>> layer, activations = CastLayer(lora, to_source, from_source), torch.randn(3, 24, generator=random)
        >>> plain = layer.fold()
        >>> plain.rank, tuple(plain.a.shape), tuple(plain.b.shape)
        (4, (4, 24), (24, 4))
        >>> torch.allclose(layer(activations), activations @ plain.a.T @ plain.b.T, rtol=1e-3, atol=1e-2)
        True

    Attributes:
        map_to_source: target activations → source activations, shape (d_source_in, d_target_in)
        lora_a: frozen A, shape (r, d_source_in)
        lora_b: frozen B with its scale, shape (d_source_out, r)
        map_from_source: source update → target update, shape (d_target_out, d_source_out)
    """

    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, lora: LowRank, map_to_source: Tensor, map_from_source: Tensor) -> None:
        super().__init__()
        self.map_to_source = nn.Parameter(map_to_source)
        self.map_from_source = nn.Parameter(map_from_source)
        self.register_buffer("lora_a", lora.a)
        self.register_buffer("lora_b", lora.b)

    def forward(self, activations: Tensor) -> Tensor:
        """The update for the target module's output.

        Args:
            activations: input of the target module, shape (..., d_target_in)

        Returns:
            shape (..., d_target_out)
        """
        in_source_space = activations @ self.map_to_source.T
        source_update = in_source_space @ self.lora_a.T @ self.lora_b.T
        return source_update @ self.map_from_source.T

    def fold(self) -> LowRank:
        """The plain LoRA that computes the same update, of the same rank."""
        with torch.no_grad():
            return LowRank(
                fold_to_source(self.lora_a, self.map_to_source), fold_from_source(self.map_from_source, self.lora_b)
            )


def merge_branches(folded: Sequence[LowRank], target_rows: Sequence[Rows], d_out: int) -> LowRank:
    """Joins the folded branches of one target module; exact, and the ranks add up.

    Args:
        folded: one update per branch, A' (r_i, d_in) and B' (rows_i, r_i)
        target_rows: the output rows of the module that each branch writes
        d_out: number of output rows of the module

    Returns:
        A' (Σ r_i, d_in) and B' (d_out, Σ r_i)
    """
    a = torch.cat([branch.a for branch in folded])
    columns = []
    for branch, rows in zip(folded, target_rows, strict=True):
        column = branch.b.new_zeros(d_out, branch.rank)
        column[rows] = branch.b
        columns.append(column)
    return LowRank(a, torch.cat(columns, dim=1))


def balance(lora: LowRank) -> LowRank:
    """The same update with factors that share its singular values, B = U √S and A = √S Vᵀ.

    The factors of a fold differ in size; balanced, both learn at the rate of a plain LoRA. A rank above the smaller
    side of the module shrinks to it.

    Example:
        >>> lora = LowRank(100 * torch.eye(2, 3), torch.eye(4, 2) / 25)
        >>> even = balance(lora)
        >>> torch.allclose(even.b @ even.a, lora.b @ lora.a)
        True
        >>> round(float(even.a.norm() / even.b.norm()), 4)
        1.0
    """
    q_b, r_b = torch.linalg.qr(lora.b.double())
    q_a, r_a = torch.linalg.qr(lora.a.double().T)
    u, singular_values, v_t = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = singular_values.sqrt()
    a, b = root.unsqueeze(-1) * (v_t @ q_a.T), (q_b @ u) * root
    return LowRank(a.to(lora.a.dtype), b.to(lora.b.dtype))


def cut_to_rank(folded: Mapping[str, LowRank], rank: int) -> tuple[dict[str, LowRank], float]:
    """Balanced factors, cut to their largest singular values where they have more than the rank holds.

    Returns:
        the factors, and what the cut leaves out as a share of the norm
    """
    balanced = {name: balance(lora) for name, lora in folded.items()}
    cut = {name: LowRank(lora.a[:rank], lora.b[:, :rank]) for name, lora in balanced.items()}
    largest = max(lora.rank for lora in balanced.values())
    if largest <= rank:
        return cut, 0.0
    whole, kept = _square_of_norm(balanced), _square_of_norm(cut)
    lost = math.sqrt(max(0.0, 1 - kept / whole)) if whole > 0 else 0.0
    logger.info("The update is cut from rank %d to %d: %.1f %% of its norm is lost.", largest, rank, 100 * lost)
    return cut, lost


def _square_of_norm(balanced: Mapping[str, LowRank]) -> float:
    """Of the updates B·A: a singular value is the squared norm of its row of A."""
    return sum(float(lora.a.double().square().sum(dim=1).square().sum()) for lora in balanced.values())


class FoldedA(nn.Module):
    """Parametrization of a target's `lora_A` weight by the `map_to_source` of its branches.

    Rows beyond the branches' ranks stay zero, so that every module has the same rank.
    """

    def __init__(self, lora_as: Sequence[Tensor], maps: Sequence[Tensor], rank: int) -> None:
        super().__init__()
        self.initial_maps = tuple(maps)
        self.rank = rank
        for index, a in enumerate(lora_as):
            self.register_buffer(f"lora_a{index}", a, persistent=False)

    def forward(self, *maps: Tensor) -> Tensor:
        """Maps (d_source_in, d_target_in) each → weight (rank, d_target_in)."""
        folded = [fold_to_source(self.get_buffer(f"lora_a{i}"), one_map) for i, one_map in enumerate(maps)]
        weight = torch.cat(folded)
        return nn.functional.pad(weight, (0, 0, 0, self.rank - weight.shape[0]))

    def right_inverse(self, _weight: Tensor) -> tuple[Tensor, ...]:
        """The maps that training starts from, a copy for this module; the weight it replaces is not used."""
        return tuple(one_map.clone() for one_map in self.initial_maps)


class FoldedB(nn.Module):
    """Parametrization of a target's `lora_B` weight by the `map_from_source` of its branches."""

    def __init__(
        self, lora_bs: Sequence[Tensor], maps: Sequence[Tensor], target_rows: Sequence[Rows], shape: tuple[int, int]
    ) -> None:
        super().__init__()
        self.initial_maps = tuple(maps)
        self.target_rows = tuple(target_rows)
        self.shape = shape
        for index, b in enumerate(lora_bs):
            self.register_buffer(f"lora_b{index}", b, persistent=False)

    def forward(self, *maps: Tensor) -> Tensor:
        """Maps (d_target_out, d_source_out) each → weight (d_out, rank)."""
        weight = maps[0].new_zeros(self.shape)
        column = 0
        for index, (one_map, rows) in enumerate(zip(maps, self.target_rows, strict=True)):
            folded = fold_from_source(one_map, self.get_buffer(f"lora_b{index}"))
            weight[rows, column : column + folded.shape[1]] = folded
            column += folded.shape[1]
        return weight

    def right_inverse(self, _weight: Tensor) -> tuple[Tensor, ...]:
        """The maps that training starts from, a copy for this module; the weight it replaces is not used."""
        return tuple(one_map.clone() for one_map in self.initial_maps)
