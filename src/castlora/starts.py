"""Where the maps start: random, closed form, or no maps at all."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from castlora.adapters import KEY_PREFIX, LowRank
from castlora.maps import CastLayer, FoldedA, FoldedB, merge_branches
from castlora.models import Rows, row_numbers
from castlora.pairing import Branch, Pairing
from castlora.solvers import random_semi_orthogonal

ADAPTER_NAME = "default"
"""The name that PEFT gives an adapter unless told otherwise."""


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


def attach_lora(model: PreTrainedModel, modules: Iterable[str], rank: int) -> PeftModel:
    """The model with a fresh trainable LoRA of scale 1 on the named modules, as PEFT starts it."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(modules), task_type="CAUSAL_LM")
    student = get_peft_model(model, config)
    assert isinstance(student, PeftModel)
    return student


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


def start_from_factors(student: PeftModel, factors: Mapping[str, LowRank]) -> None:
    """Sets the student's LoRA to given updates; ranks that they leave free start like those of a fresh LoRA."""
    for name, lora in factors.items():
        lora_a, lora_b = lora_maps(student, name)
        with torch.no_grad():
            lora_a.weight[: lora.rank] = lora.a
            lora_b.weight.zero_()
            lora_b.weight[:, : lora.rank] = lora.b


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


def adapted_modules(student: PeftModel) -> list[str]:
    """Names, in the base model, of the modules that have a LoRA."""
    return [name.removeprefix(KEY_PREFIX) for name, module in student.named_modules() if isinstance(module, LoraLayer)]


@torch.no_grad()
def student_factors(student: PeftModel, modules: Iterable[str]) -> dict[str, LowRank]:
    """The LoRA of the student as it stands: folded where it is parametrized by maps, PEFT's scale in B."""
    factors = {}
    for name in modules:
        lora_a, lora_b = lora_maps(student, name)
        scale = lora_layer(student, name).scaling[ADAPTER_NAME]
        factors[name] = LowRank(lora_a.weight.detach().cpu().clone(), scale * lora_b.weight.detach().cpu())
    return factors


def lora_maps(student: PeftModel, module_name: str) -> tuple[nn.Linear, nn.Linear]:
    """The linear maps A and B that PEFT put beside a module."""
    layer = lora_layer(student, module_name)
    lora_a, lora_b = layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]
    assert isinstance(lora_a, nn.Linear) and isinstance(lora_b, nn.Linear)
    return lora_a, lora_b


def lora_layer(student: PeftModel, module_name: str) -> LoraLayer:
    """The layer that PEFT put in the place of a module."""
    layer = student.get_submodule(KEY_PREFIX + module_name)
    assert isinstance(layer, LoraLayer)
    return layer


def _length(rows: Rows) -> int:
    return len(row_numbers(rows))
