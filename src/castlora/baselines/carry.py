"""Applies a method without training to every module of a pairing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from castlora.adapters.factors import LowRank
from castlora.maps.cast_layer import merge_branches
from castlora.models.modules import LinearSlot
from castlora.models.pairing import Pairing


@dataclass(frozen=True)
class BranchWeights:
    """What a method without text knows about one branch."""

    update: LowRank
    """The source's update of the rows that the branch takes: A (r, d_source_in), B (source rows, r)."""
    source: Tensor
    """Weight of those rows in the source, shape (source rows, d_source_in)."""
    target: Tensor
    """Weight of the rows that the branch writes in the target, shape (target rows, d_target_in)."""


Carry = Callable[[BranchWeights], LowRank | None]
"""The update for the target's rows, or None where the method cannot carry this one."""


@torch.no_grad()
def carry_weights(
    pairing: Pairing,
    factors: Mapping[str, LowRank],
    source_slots: Mapping[str, LinearSlot],
    source: nn.Module,
    target: nn.Module,
    carry: Carry,
) -> dict[str, LowRank]:
    """Carries each paired module's update by weights alone.

    Every method gets castlora's pairing: those published for equal names and depths could not be run on other pairs.

    Args:
        pairing: which modules belong together
        factors: the source adapter, by module
        source_slots: linear modules of the source
        source: the bare source model
        target: the bare target model
        carry: the method

    Returns:
        updates by target module; modules that the method cannot carry are left out
    """
    carried = {}
    for pair in pairing.mapped:
        target_weight = linear_weight(target, pair.target)
        updates, rows = [], []
        for branch in pair.branches:
            lora = factors[branch.source_module]
            source_weight = linear_weight(source, source_slots[branch.source_module])
            update = carry(
                BranchWeights(
                    LowRank(lora.a, lora.b[branch.source_rows]),
                    source_weight[branch.source_rows],
                    target_weight[branch.target_rows],
                )
            )
            if update is not None:
                updates.append(update)
                rows.append(branch.target_rows)
        if updates:
            carried[pair.target.name] = merge_branches(updates, rows, pair.target.d_out)
    return carried


def linear_weight(model: nn.Module, slot: LinearSlot) -> Tensor:
    """The weight of a linear module as (d_out, d_in), in fp32 on the processor."""
    weight = model.get_submodule(slot.name).weight
    assert isinstance(weight, Tensor)
    stored = weight.detach().float().cpu()
    return stored.T if slot.is_conv1d else stored
