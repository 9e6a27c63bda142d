"""LoRA-X, arXiv 2501.16559: an adapter that lives in its base's singular subspace, carried from subspace to subspace.

The adapter has the form ΔW_s = U_s ΔΣ V_sᵀ, with U_s and V_s the leading singular vectors of the base's own weight, and
ΔΣ alone is trained. It is carried only where the subspaces of both bases are alike.
"""

from torch import Tensor

from castlora.adapters import LowRank
from castlora.baselines.carry import BranchWeights
from castlora.baselines.cross_lora import PUBLISHED_RANK, singular_subspaces

SIMILARITY_THRESHOLD = 0.3
"""The paper describes the gate; this value is that of a public reimplementation."""


def lora_x(
    branch: BranchWeights, subspace_rank: int = PUBLISHED_RANK, threshold: float = SIMILARITY_THRESHOLD
) -> LowRank | None:
    """Carries an update of the constrained form; a plain LoRA is first projected on the source's subspace.

    Between equal shapes ΔW_t = U_t U_tᵀ ΔW_s V_t V_tᵀ, if the gate opens. Between others the source's vectors are first
    mapped to the target's by P = argmin ‖P U_s - U_t‖, after which U_tᵀ P U_s is the identity: the coefficients ΔΣ are
    written in the target's basis as they are, and the gate has nothing to compare.

    Args:
        branch: update and weights
        subspace_rank: singular vectors kept, as published, or as many as both weights have
        threshold: similarity of subspaces below which nothing is carried

    Returns:
        an update of the source's rank, or None where the gate stays shut
    """
    rank = min(subspace_rank, *branch.source.shape, *branch.target.shape)
    u_source, v_source = singular_subspaces(branch.source, rank)
    u_target, v_target = singular_subspaces(branch.target, rank)
    left, right = u_source.T @ branch.update.b, branch.update.a @ v_source
    if branch.source.shape == branch.target.shape:
        if min(subspace_similarity(u_source, u_target), subspace_similarity(v_source, v_target)) < threshold:
            return None
        left, right = u_target.T @ (u_source @ left), (right @ v_source.T) @ v_target
    return LowRank(right @ v_target.T, u_target @ left)


def subspace_similarity(one: Tensor, other: Tensor) -> float:
    """Φ = ‖oneᵀ other‖² / n between orthonormal bases of shape (d, n): 1 for the same subspace, 0 for orthogonal."""
    return float((one.T @ other).square().sum() / one.shape[1])
