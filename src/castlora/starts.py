"""Where the maps start: random, closed form, or no maps at all."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from castlora.adapters import KEY_PREFIX, LowRank
from castlora.capture import capture
from castlora.maps import CastLayer, FoldedA, FoldedB, merge_branches
from castlora.models import Rows, layer_index, row_numbers
from castlora.pairing import Branch, ModulePair, Pairing
from castlora.positions import AlignedPassage, batches, counted_places
from castlora.solvers import random_semi_orthogonal, ridge_map
from castlora.statistics import Moments

_STATISTICS_BATCH = 16
ADAPTER_NAME = "default"
"""The name that PEFT gives an adapter unless told otherwise."""
_Key = TypeVar("_Key", bound=Hashable)


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


def ridge_maps(moments: "SiteMoments", pairing: Pairing, ridge: float) -> Maps:
    """The closed form: ridge regression of activations over aligned positions.

    `map_to_source` predicts the source module's input from the target module's input, uncentred,
    because a fold cannot hold an offset; `map_from_source` predicts the target module's output from
    the source module's output, centred, because updates are differences. A part of the source that
    speaks for several target modules has its update divided among them.
    """
    maps = {}
    to_source: dict[InputSite, Tensor] = {}
    for pair, index, branch in pairing.branches():
        site = input_site(pair, branch)
        if site not in to_source:
            to_source[site] = ridge_map(*moments.inputs[site].raw(), ridge).float()
        from_source = ridge_map(*moments.outputs[pair.target.name, index].covariances(), ridge)
        share = 1 / pairing.multiplicity(branch)
        maps[pair.target.name, index] = BranchMaps(to_source[site], (share * from_source).float())
    return maps


InputSite = tuple[int, int, str]
"""Target layer, source layer, and which of the layer's inputs it is."""

_INPUT_OF_ROLE = {
    "q": "attention", "k": "attention", "v": "attention", "o": "heads",
    "gate": "mlp", "up": "mlp", "fc": "mlp", "down": "neurons",
}  # fmt: skip


def input_site(pair: ModulePair, branch: Branch) -> InputSite:
    """Names the pair of inputs that a branch reads: q, k and v of a layer read the same one."""
    source_layer = layer_index(branch.source_module)
    assert source_layer is not None
    return pair.target.layer, source_layer, _INPUT_OF_ROLE[branch.roles[0]]


@dataclass
class SiteMoments:
    """Moments of the inputs and the outputs of every branch."""

    inputs: dict["InputSite", Moments]
    """x: target module input, y: source module input; shared by the modules that read the same input."""
    outputs: dict[tuple[str, int], Moments]
    """x: source module output rows, y: target module output rows."""


@torch.no_grad()
def collect_moments(
    source: nn.Module,
    target: nn.Module,
    pairing: Pairing,
    passages: Sequence[AlignedPassage],
    permutation: torch.Generator | None = None,
) -> SiteMoments:
    """Runs both base models over aligned passages and sums the moments of every branch.

    Args:
        source: the bare source model
        target: the bare target model
        pairing: which modules belong together
        passages: the text, aligned
        permutation: pairs the positions of a batch at random, for a control that must carry nothing
    """
    moments = SiteMoments({}, {})
    device = next(target.parameters()).device
    source_names = {branch.source_module for _, _, branch in pairing.branches()}
    target_names = {pair.target.name for pair in pairing.mapped}
    # No prediction is looked at, and the head of a large vocabulary takes long.
    only_last = {"use_cache": False, "logits_to_keep": 1}
    for batch in batches(passages, _STATISTICS_BATCH, device):
        # A first token without content attracts extreme activations that would rule the regression.
        counts = (batch["weights"] > 0) & (batch["source_positions"] > 0) & (batch["target_positions"] > 0)
        at_source, at_target = (counted_places(batch[f"{side}_positions"], counts) for side in ("source", "target"))
        if permutation is not None:
            order = torch.randperm(int(counts.sum()), generator=permutation).to(device)
            at_source = at_source[0][order], at_source[1][order]
        take_source, take_target = (partial(_rows, batch_size=len(counts), places=at) for at in (at_source, at_target))
        with (
            capture(source, source_names, take_source) as in_source,
            capture(target, target_names, take_target) as in_target,
        ):
            source(input_ids=batch["source_ids"], attention_mask=batch["source_mask"], **only_last)
            target(input_ids=batch["target_ids"], attention_mask=batch["target_mask"], **only_last)
        counted_inputs = set()
        for pair, index, branch in pairing.branches():
            source_rows, target_rows = in_source[branch.source_module], in_target[pair.target.name]
            site = input_site(pair, branch)
            if site not in counted_inputs:
                counted_inputs.add(site)
                _add(moments.inputs, site, target_rows.inputs, source_rows.inputs)
            outputs = source_rows.outputs[:, branch.source_rows], target_rows.outputs[:, branch.target_rows]
            _add(moments.outputs, (pair.target.name, index), *outputs)
    return moments


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


def _rows(activations: Tensor, batch_size: int, places: tuple[Tensor, Tensor]) -> Tensor:
    """The activations at places of a batch, shape (places, width)."""
    # OPT's MLP reads the tokens of all passages as one long row.
    return activations.reshape(batch_size, -1, activations.shape[-1])[places]


def _add(moments: dict[_Key, Moments], key: _Key, x: Tensor, y: Tensor) -> None:
    if key not in moments:
        moments[key] = Moments.zeros(x.shape[-1], y.shape[-1])
    moments[key].update(x, y)
