"""Adapters: reading a PEFT LoRA into factors, and writing the portable PEFT form."""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedConfig

from castlora.adapters.files import WEIGHTS_FILE, AdapterFiles
from castlora.adapters.patterns import check_patterns
from castlora.errors import UserError, first_line
from castlora.execution.run_directory import write_whole
from castlora.finite import is_finite
from castlora.models.loading import LIBRARY_ERRORS, skeleton
from castlora.models.modules import LinearSlot, linear_slots, module_type

KEY_PREFIX = "base_model.model."
PORTABLE_RANKS = (8, 16, 32, 64, 128)
"""Ranks that every serving engine accepts."""
EFFECTIVE_RANK = 32
"""Rank to which the update of an adapter is cut that is no plain LoRA."""
_ATTENTION_INPUTS = (("q",), ("k",), ("v",))
_HINT = "name the base it was trained on with --source"


@dataclass(frozen=True)
class LowRank:
    """The two factors of a low-rank update ΔW = B·A, the scale folded into B."""

    a: Tensor
    """Shape (r, d_in)."""
    b: Tensor
    """Shape (d_out, r)."""

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Update:
    """What an adapter changes in its base model."""

    factors: dict[str, LowRank]
    """Module path inside the base model → factors, in the order of the model."""
    beyond: tuple[str, ...]
    """Kinds of what it trains besides, which no factors of a linear map hold: `lm_head`, `self_attn.q_proj.bias`."""


def read_update(files: AdapterFiles, base_config: PreTrainedConfig) -> Update:
    """Reads the factors of every adapted linear map of the base model's layers, in fp32, and names the rest.

    Ranks and scales are the ones PEFT itself resolves for this base model. The factors of an adapter that is no plain
    LoRA are zero and stand for the rank that its update is cut to: what it adds depends on the base model's weights.

    Args:
        files: the adapter
        base_config: configuration of its base model

    Raises:
        UserError: the weights are damaged, hold NaN, or do not fit the base model.
    """
    tensors = _read_tensors(files)
    base = skeleton(base_config)
    slots = linear_slots(base, base_config)
    modules = {name for name, _ in base.named_modules()}
    check_patterns(files.name, files.config, modules)
    try:
        with torch.device("meta"):
            model = PeftModel(base, files.config)
        # Older versions of transformers had other names for modules of some models.
        tensors = convert_peft_adapter_state_dict_for_transformers(model, files.config, tensors)
    except LIBRARY_ERRORS as error:
        raise UserError(
            f"Adapter {files.name!r} does not fit its base model ({first_line(error)}); {_HINT}."
        ) from error
    _check_against_base(files, tensors, model)
    adapted = {name: layer for name, layer in _adapted_layers(model) if name in slots}
    text_part = next((slot.text_part for slot in slots.values()), "")
    beyond = tuple(sorted({_kind(key, modules, text_part) for key in tensors if not _is_of_a_map(key, adapted)}))
    if not files.is_plain:
        ranks = {name: min(EFFECTIVE_RANK, slots[name].d_in, slots[name].d_out) for name in adapted}
        return Update({name: _zeros(slots[name], rank) for name, rank in ranks.items()}, beyond)
    factors = {}
    for name, layer in adapted.items():
        assert isinstance(layer, LoraLayer)
        a = tensors[f"{KEY_PREFIX}{name}.lora_A.weight"].float()
        b = tensors[f"{KEY_PREFIX}{name}.lora_B.weight"].float()
        scale = layer.scaling["default"]
        # Multiplication by 1 would only copy what may be most of the memory that a translation takes.
        factors[name] = LowRank(a, b if scale == 1 else b * scale)
    return Update(factors, beyond)


def read_factors(files: AdapterFiles, base_config: PreTrainedConfig) -> dict[str, LowRank]:
    """The factors of an adapter that consists of nothing else; see `read_update`.

    Raises:
        UserError: it trains more than linear maps of the layers, or cannot be read.
    """
    update = read_update(files, base_config)
    if update.beyond:
        raise UserError(
            f"Adapter {files.name!r} also trains {update.beyond[0]}, which is no linear map of a decoder layer that "
            "castlora knows; only castlora transfer and castlora convert --to merged take that along."
        )
    return update.factors


def portable_rank(rank: int) -> int:
    """The smallest rank that every engine accepts and that holds `rank`.

    Raises:
        UserError: there is none.
    """
    for accepted in PORTABLE_RANKS:
        if rank <= accepted:
            return accepted
    raise UserError(
        f"Rank {rank} is above {PORTABLE_RANKS[-1]}, the largest that all serving engines accept; give that or less."
    )


def write_portable(
    folder: Path,
    factors: Mapping[str, LowRank],
    slots: Mapping[str, LinearSlot],
    rank: int,
    base: str,
    revision: str | None,
) -> None:
    """Writes the adapter form that every serving engine loads.

    One rank everywhere (zero-padded), `lora_alpha == r`, plain suffixes as targets, every layer
    present (zeros where nothing is mapped), queries, keys and values together, fp32 safetensors.

    Args:
        folder: where `adapter_config.json` and `adapter_model.safetensors` go
        factors: module path → factors; missing modules of an adapted type become zeros
        slots: the linear modules of the base model
        rank: rank of every module, at least that of any factor
        base: hub id of the base model
        revision: its revision, if it is known
    """
    adapted_types = {module_type(name) for name in factors}
    if any(slots[name].roles in _ATTENTION_INPUTS for name in factors):
        adapted_types |= {module_type(name) for name, slot in slots.items() if slot.roles in _ATTENTION_INPUTS}
    tensors = {}
    written = [name for name in slots if module_type(name) in adapted_types]
    for name in written:
        padded = pad_rank(factors[name], rank) if name in factors else _zeros(slots[name], rank)
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = padded.a.float().contiguous()
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = padded.b.float().contiguous()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base,
        revision=revision,
        fan_in_fan_out=any(slots[name].is_conv1d for name in factors),
    )
    # PEFT keeps a set here, whose order on disk would change from run to run.
    config.target_modules = target_suffixes(written, slots)
    text_part = next(slots[name].text_part for name in written)
    if text_part:
        # The part that reads images often has modules with these ends of names too, and nothing for them is written.
        config.exclude_modules = rf"(?!{re.escape(text_part)}\.).*"
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    # `save_file` would keep the file from all other users.
    write_whole(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))


def target_suffixes(adapted: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The shortest ends of module names that select the adapted types and no others, sorted.

    `q_proj` where that is enough; `attn.c_proj` where `mlp.c_proj` stays unadapted.
    """
    adapted_types = {module_type(name) for name in adapted}
    others = {module_type(name).split(".")[-1] for name in modules if module_type(name) not in adapted_types}
    return sorted({end if (end := name.split(".")[-1]) not in others else name for name in adapted_types})


def pad_rank(factors: LowRank, rank: int) -> LowRank:
    """The same update with zero rows in A and zero columns in B up to `rank`."""
    missing = rank - factors.rank
    if missing == 0:
        return factors
    a = torch.cat([factors.a, factors.a.new_zeros(missing, factors.a.shape[1])])
    b = torch.cat([factors.b, factors.b.new_zeros(factors.b.shape[0], missing)], dim=1)
    return LowRank(a, b)


def _zeros(slot: LinearSlot, rank: int) -> LowRank:
    return LowRank(torch.zeros(rank, slot.d_in), torch.zeros(slot.d_out, rank))


def _read_tensors(files: AdapterFiles) -> dict[str, Tensor]:
    path = files.folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{WEIGHTS_FILE} of {files.name!r} is damaged or cut short ({first_line(error)}); copy it again."
        ) from error
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(
                f"{WEIGHTS_FILE} of {files.name!r} holds NaN or infinity in {key!r}; use an intact adapter."
            )
    return tensors


def _check_against_base(files: AdapterFiles, found: Mapping[str, Tensor], model: PeftModel) -> None:
    needed = get_peft_model_state_dict(model, save_embedding_layers=False)
    # PEFT may save embeddings that are not trained beside those that are.
    known = needed | get_peft_model_state_dict(model, save_embedding_layers=True)
    missing = sorted(set(needed) - set(found))
    surplus = sorted(set(found) - set(known))
    if missing or surplus:
        lacks = f"lacks {missing[0]!r}" if missing else f"holds {surplus[0]!r}, unknown there"
        raise UserError(f"Adapter {files.name!r} does not fit its base model: it {lacks}; {_HINT}.")
    for key, tensor in found.items():
        if tensor.shape != known[key].shape:
            has_more_rows = "lora_" not in key and tensor.shape[1:] == known[key].shape[1:]
            hint = f"{_HINT}, or put the tokenizer it was trained with into its folder" if has_more_rows else _HINT
            raise UserError(
                f"Adapter {files.name!r} does not fit its base model: {key!r} has shape {tuple(tensor.shape)}, "
                f"the base needs {tuple(known[key].shape)}; {hint}."
            )


def _adapted_layers(model: PeftModel) -> Iterable[tuple[str, BaseTunerLayer]]:
    for name, layer in model.get_base_model().named_modules():
        # A LoRA on a bare parameter lays its factors out as that parameter, not as a linear map.
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, ParamWrapper):
            yield name, layer


def _is_of_a_map(key: str, maps: Iterable[str]) -> bool:
    # Outside the base model lies what all adapted modules share, as the projections of VeRA.
    is_shared = not key.startswith(KEY_PREFIX)
    return is_shared or (not key.endswith(".bias") and any(key.startswith(f"{KEY_PREFIX}{name}.") for name in maps))


def _kind(key: str, modules: Container[str], text_part: str) -> str:
    """What a tensor belongs to, in every layer alike: a module of the base model, its bias, or what reads images."""
    parts = key.removeprefix(KEY_PREFIX).split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    module = next((name for name in names if name in modules), parts[0])
    if text_part and not module.startswith(text_part):
        # The path of the part that reads images, as long as that of the one that reads text.
        return ".".join(module.split(".")[: 1 + text_part.count(".")])
    return module_type(module) + (".bias" if key.endswith(".bias") else "")
