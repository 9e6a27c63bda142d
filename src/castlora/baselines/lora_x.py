"""LoRA-X, arXiv 2501.16559: an adapter that lives in its base's singular subspace, carried from subspace to subspace.

The adapter has the form ΔW_s = U_s ΔΣ V_sᵀ, with U_s and V_s the leading singular vectors of the base's own weight, and
ΔΣ alone is trained. It is carried only where the subspaces of both bases are alike.
"""

from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from castlora.adapters.factors import LowRank
from castlora.adapters.live import lora_maps
from castlora.baselines.carry import BranchWeights, linear_weight
from castlora.baselines.cross_lora import PUBLISHED_RANK, singular_subspaces
from castlora.models.modules import LinearSlot

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


def attach_constrained(
    source: PreTrainedModel, slots: Mapping[str, LinearSlot], subspace_rank: int = PUBLISHED_RANK
) -> PeftModel:
    """The source with an adapter of the constrained form, whose coefficients ΔΣ alone can be trained; they start at 0.

    Args:
        source: the bare source model
        slots: its linear modules to adapt
        subspace_rank: singular vectors, as published, or as many as a weight has
    """
    bases = {name: singular_subspaces(linear_weight(source, slot), subspace_rank) for name, slot in slots.items()}
    ranks = {name: u.shape[1] for name, (u, _) in bases.items()}
    config = LoraConfig(
        r=subspace_rank,
        target_modules=sorted(slots),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(source, config)
    assert isinstance(model, PeftModel)
    for name, (u, v) in bases.items():
        lora_a, lora_b = lora_maps(model, name)
        with torch.no_grad():
            lora_a.weight.copy_(v.T)
        lora_a.weight.requires_grad_(False)
        parametrize.register_parametrization(lora_b, "weight", _InSubspace(u.to(lora_b.weight)))
    return model


class _InSubspace(nn.Module):
    """B = U ΔΣ for fixed orthonormal columns U (d_out, n) and coefficients ΔΣ (n, n)."""

    u: Tensor

    def __init__(self, u: Tensor) -> None:
        super().__init__()
        self.register_buffer("u", u, persistent=False)

    def forward(self, coefficients: Tensor) -> Tensor:
        return self.u @ coefficients

    def right_inverse(self, b: Tensor) -> Tensor:
        return self.u.T @ b


def subspace_similarity(one: Tensor, other: Tensor) -> float:
    """Φ = ‖oneᵀ other‖² / n between orthonormal bases of shape (d, n): 1 for the same subspace, 0 for orthogonal."""
    return float((one.T @ other).square().sum() / one.shape[1])
