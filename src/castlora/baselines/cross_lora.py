"""Cross-LoRA, arXiv 2508.05232: the update is read in the singular basis of one weight and written in the other's.

With the truncated decompositions W_s = U_s S_s V_sᵀ and W_t = U_t S_t V_tᵀ, LoRA-Align solves
P_U = argmin ‖P_U U_s - U_t‖ and forms Ũ = P_U U_s, and the same for V. The columns of U_s are orthonormal, so the least
squares are exact and Ũ = U_t, Ṽ = V_t.
"""

from typing import Literal

import torch
from torch import Tensor

from castlora.adapters.factors import LowRank
from castlora.baselines.carry import BranchWeights

PUBLISHED_RANK = 320
Form = Literal["projected", "aligned"]


def cross_lora(branch: BranchWeights, form: Form, subspace_rank: int = PUBLISHED_RANK) -> LowRank | None:
    """Carries one update by the singular vectors of both weights.

    `projected` is LoRA-Shift as printed, ΔW_t = Ũ (Ũᵀ ΔW_s Ṽ) Ṽᵀ (eq. 7). Algorithm 1 applies the two projections to
    the factors instead, B_t = Ũ (Ũᵀ B_s) and A_t = (A_s Ṽ) Ṽᵀ, which is the same update, in factors. It can be
    computed only between equal shapes. `aligned` reads the coefficients in the source's basis,
    ΔW_t = Ũ (U_sᵀ ΔW_s V_s) Ṽᵀ, which any shapes allow; it depends on the signs that the decompositions happen to give
    their vectors, of which the paper says nothing.

    Args:
        branch: update and weights
        form: `projected` or `aligned`
        subspace_rank: singular vectors kept, as published, or as many as both weights have

    Returns:
        an update of the source's rank; None where `projected` does not fit the shapes
    """
    if form == "projected" and branch.source.shape != branch.target.shape:
        return None
    rank = min(subspace_rank, *branch.source.shape, *branch.target.shape)
    u_target, v_target = singular_subspaces(branch.target, rank)
    u_read, v_read = (u_target, v_target) if form == "projected" else singular_subspaces(branch.source, rank)
    a = branch.update.a @ v_read @ v_target.T
    b = u_target @ (u_read.T @ branch.update.b)
    return LowRank(a, b)


def singular_subspaces(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading left and right singular vectors.

    Args:
        weight: shape (d_out, d_in)
        rank: how many

    Returns:
        U, shape (d_out, rank), and V, shape (d_in, rank)
    """
    u, _, v_t = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, :rank].to(weight.dtype), v_t[:rank].T.to(weight.dtype)
