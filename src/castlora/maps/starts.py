"""Where the maps start: random, closed form, or no maps at all."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils import parametrize

from castlora.adapters.factors import LowRank
from castlora.adapters.live import lora_maps
from castlora.maps.cast_layer import CastLayer, FoldedA, FoldedB, merge_branches
from castlora.maps.solvers import random_semi_orthogonal
from castlora.models.modules import Rows, row_numbers
from castlora.models.pairing import Branch, Pairing


@dataclass(frozen=True)
class BranchMaps:
    """The two maps of one branch."""

    to_source: Tensor
    """Shape (d_source_in, d_target_in)."""
    from_source: Tensor
    """Shape (rows of the target module, rows of the source module)."""


Maps = dict[tuple[str, int], BranchMaps]
"""(target module, index of the branch) → maps."""


def paper_maps(pairing: Pairing, factors: Mapping[str, LowRank], seed: int) -> Maps:
    """The start of the paper, as far as it can be known: the paper does not state one.

    `map_to_source` is random semi-orthogonal, so that activations keep their length, and
    `map_from_source` is zero, so that training starts at the unchanged target, as LoRA itself does.
    """
    maps = random_maps(pairing, factors, seed)
    return {key: BranchMaps(one.to_source, torch.zeros_like(one.from_source)) for key, one in maps.items()}


def random_maps(pairing: Pairing, factors: Mapping[str, LowRank], seed: int) -> Maps:
    """Random semi-orthogonal maps both ways: what maps that know nothing can do."""
    inward, outward = (torch.Generator().manual_seed(seed + offset) for offset in (0, 1))
    maps = {}
    for pair, index, branch in pairing.branches():
        to_source = random_semi_orthogonal(factors[branch.source_module].a.shape[1], pair.target.d_in, inward)
        from_source = random_semi_orthogonal(_length(branch.target_rows), _length(branch.source_rows), outward)
        maps[pair.target.name, index] = BranchMaps(to_source, from_source)
    return maps


def parametrize_by_maps(student: PeftModel, pairing: Pairing, factors: Mapping[str, LowRank], maps: Maps) -> None:
    """Makes the maps the trainable parameters of the student's LoRA; the source factors stay frozen."""
    for pair in pairing.mapped:
        lora_a, lora_b = lora_maps(student, pair.target.name)
        keys = [(pair.target.name, index) for index in range(len(pair.branches))]
        device = lora_a.weight.device
        source_as = [factors[branch.source_module].a.to(device) for branch in pair.branches]
        source_bs = [factors[branch.source_module].b[branch.source_rows].to(device) for branch in pair.branches]
        rank, shape = lora_a.weight.shape[0], (lora_b.weight.shape[0], lora_b.weight.shape[1])
        folded_a = FoldedA(source_as, [maps[key].to_source.to(device) for key in keys], rank)
        target_rows = [branch.target_rows for branch in pair.branches]
        folded_b = FoldedB(source_bs, [maps[key].from_source.to(device) for key in keys], target_rows, shape)
        parametrize.register_parametrization(lora_a, "weight", folded_a, unsafe=True)
        parametrize.register_parametrization(lora_b, "weight", folded_b, unsafe=True)


def fold_maps(pairing: Pairing, factors: Mapping[str, LowRank], maps: Maps) -> dict[str, LowRank]:
    """The folded update of every mapped target module, without any model."""
    folded = {}
    for pair in pairing.mapped:
        layers = [
            cast_layer(branch, factors, maps[pair.target.name, index]).fold()
            for index, branch in enumerate(pair.branches)
        ]
        rows = [branch.target_rows for branch in pair.branches]
        folded[pair.target.name] = merge_branches(layers, rows, pair.target.d_out)
    return folded


def cast_layer(branch: Branch, factors: Mapping[str, LowRank], maps: BranchMaps) -> CastLayer:
    """The live form of one branch."""
    lora = factors[branch.source_module]
    return CastLayer(LowRank(lora.a, lora.b[branch.source_rows]), maps.to_source, maps.from_source)


def _length(rows: Rows) -> int:
    return len(row_numbers(rows))
