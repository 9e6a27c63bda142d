"""Adapters that are no plain LoRA: what they add to the weights, as low-rank factors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from castlora.adapters.factors import KEY_PREFIX, LowRank, read_factors
from castlora.adapters.files import AdapterFiles
from castlora.adapters.live import student_factors
from castlora.models.modules import LinearSlot

_POWER_ITERATIONS = 4
_OVERSAMPLING = 8


@dataclass(frozen=True)
class EffectiveUpdate:
    """The update of an adapter of any kind, cut to low rank."""

    factors: dict[str, LowRank]
    """Module path → factors."""
    lost: float
    """Norm of what the factors leave out, as a share of the norm of the whole update (Frobenius, all modules)."""


@torch.no_grad()
def effective_update(
    teacher: PeftModel, slots: Mapping[str, LinearSlot], factors: Mapping[str, LowRank]
) -> EffectiveUpdate:
    """Merges each adapted module by PEFT's own rule, and takes the best low-rank factors of what that changes.

    Args:
        teacher: source + adapter; its weights are the same afterwards
        slots: linear modules of the source
        factors: module path → factors of the ranks that are wanted; their values are not used
    """
    found, left_out, whole = {}, 0.0, 0.0
    for name, wanted in factors.items():
        layer = teacher.get_submodule(KEY_PREFIX + name)
        assert isinstance(layer, BaseTunerLayer)
        delta = _merged_change(layer)
        if slots[name].is_conv1d:
            delta = delta.T
        best = low_rank(delta, wanted.rank)
        left_out += float((delta - best.b @ best.a).square().sum())
        found[name] = LowRank(best.a.cpu(), best.b.cpu())
        whole += float(delta.square().sum())
    return EffectiveUpdate(found, math.sqrt(left_out / whole) if whole > 0 else 0.0)


def without_start(files: AdapterFiles, base: PreTrainedModel) -> dict[str, LowRank]:
    """What an adapter changes in its base model that took its start from the base model's weights.

    PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) train B·A beside W − B₀·A₀, and B₀ and A₀ follow from W. The
    start is repeated here, so that ΔW = B·A − B₀·A₀, of twice the rank.

    Args:
        files: the adapter
        base: its base model; PEFT changes it in place

    Returns:
        module path → factors

    Raises:
        UserError: it trains more than linear maps of the layers, or cannot be read.
    """
    assert isinstance(files.config, LoraConfig)
    plain = replace(files, config=replace(files.config, init_lora_weights=True))
    trained = read_factors(plain, base.config)
    started = get_peft_model(base, files.config)
    assert isinstance(started, PeftModel)
    initial = student_factors(started, trained)
    return {
        name: LowRank(torch.cat([lora.a, initial[name].a]), torch.cat([lora.b, -initial[name].b], dim=1))
        for name, lora in trained.items()
    }


def low_rank(delta: Tensor, rank: int) -> LowRank:
    """The best factors of an update, ΔW ≈ B·A with B = U √S and A = √S Vᵀ of its singular values.

    Args:
        delta: shape (d_out, d_in)
        rank: at most the smaller side
    """
    oversampled = min(rank + _OVERSAMPLING, *delta.shape)
    u, singular_values, v = torch.svd_lowrank(delta, q=oversampled, niter=_POWER_ITERATIONS)
    root = singular_values[:rank].sqrt()
    return LowRank(root.unsqueeze(-1) * v[:, :rank].T, u[:, :rank] * root)


def _merged_change(layer: BaseTunerLayer) -> Tensor:
    """What merging adds to the weight of a layer, in fp32; unmerging rounds, so that the weight is put back by hand."""
    before = layer.get_base_weight().clone()
    # What is small beside a bf16 weight would be rounded away.
    base = layer.get_base_layer().float()
    layer.merge()
    change: Tensor = layer.get_base_weight() - before.float()
    layer.unmerge()
    base.to(before.dtype)
    layer.set_base_weight(before)
    return change
