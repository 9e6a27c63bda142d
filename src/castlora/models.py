"""Base models: loading them safely, and the table of which linear module plays which role."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils.import_utils import is_bitsandbytes_available

from castlora.config import Bits
from castlora.errors import UserError, first_line
from castlora.processes import this_process

logger = logging.getLogger("castlora")

LIBRARY_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError, re.error, HFValidationError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers and PEFT raise on values that they do not expect in a file."""
_MOST_LAYERS = 10_000
_STORED_BITS: dict[Bits, float] = {4: 4.5, 8: 8.0}
"""Bits of a quantized weight in memory; NF4 has a scale of 32 bits for each block of 64."""
Role = Literal["q", "k", "v", "o", "gate", "up", "down", "fc"]
"""The part a linear map plays in a decoder layer; `fc` is the first map of an ungated MLP."""

MODULE_ROLES: dict[str, tuple[Role, ...]] = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("o",),
    "out_proj": ("o",),
    "self_attn.dense": ("o",),
    "attention.dense": ("o",),
    "self_attention.dense": ("o",),
    "attn.c_proj": ("o",),
    "attn.c_attn": ("q", "k", "v"),
    "attn.Wqkv": ("q", "k", "v"),
    "self_attn.qkv_proj": ("q", "k", "v"),
    "attention.query_key_value": ("q", "k", "v"),
    "self_attention.query_key_value": ("q", "k", "v"),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "mlp.gate_up_proj": ("gate", "up"),
    "fc1": ("fc",),
    "mlp.fc_in": ("fc",),
    "mlp.c_fc": ("fc",),
    "mlp.dense_h_to_4h": ("fc",),
    "ffn.up_proj": ("fc",),
    "down_proj": ("down",),
    "fc2": ("down",),
    "mlp.fc_out": ("down",),
    "mlp.c_proj": ("down",),
    "mlp.dense_4h_to_h": ("down",),
}
"""Ends of module names, the longer one first, and the roles they hold, in the order of their output rows.

A family with other names needs a line here; a fused module whose rows are not laid out one role
after the other needs a line in `head_groups` too.
"""

Rows = slice | list[int]
"""Output rows of a module, in the form that tensors are indexed by: a slice where they follow one another."""


@dataclass(frozen=True)
class LinearSlot:
    """A linear module of a decoder layer that a LoRA can adapt."""

    name: str
    """Module path inside the model, for example `model.layers.0.self_attn.q_proj`."""
    layer: int
    rows: Mapping[Role, Rows]
    """The output rows of each role, in order."""
    d_in: int
    d_out: int
    is_conv1d: bool
    """Whether the module is a transformers `Conv1D`, which stores its weight as (d_in, d_out)."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles that the module holds; several for a fused module."""
        return tuple(self.rows)


def load_config(
    name_or_path: str, revision: str | None = None, remedy: str = "give a model folder or a hub id"
) -> PreTrainedConfig:
    """The configuration of a decoder-only model, without its weights.

    Args:
        name_or_path: folder or hub id
        revision: of the hub id
        remedy: what to do where it cannot be found

    Raises:
        UserError: the model cannot be found or is not a decoder-only language model.
    """
    is_hub_id = name_or_path.count("/") < 2 and not name_or_path.startswith(("/", ".", "~"))
    if not is_hub_id and not Path(name_or_path).is_dir():
        raise UserError(f"Model {name_or_path!r} is not a folder; {remedy}.")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except LIBRARY_ERRORS as error:
        raise UserError(
            f"Model {name_or_path!r}: cannot read a config.json that transformers knows ({first_line(error)}); "
            f"{remedy}."
        ) from error
    architectures: Any = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")]
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UserError(f"Model {name_or_path!r}: architectures in config.json is no list of names; copy it again.")
    is_decoder = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    if config.is_encoder_decoder or not is_decoder:
        raise UserError(
            f"Model {name_or_path!r} ({', '.join(architectures)}) is not a decoder-only language model; "
            "castlora needs one whose architecture ends in ForCausalLM or LMHeadModel."
        )
    return config


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a model.

    Raises:
        UserError: there is none, or it has no fast form (byte alignment needs one).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except Exception as error:  # What the tokenizers library raises has no type of its own.
        raise UserError(
            f"Tokenizer of {name_or_path!r} cannot be read ({first_line(error)}); put tokenizer.json beside the model."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"Tokenizer of {name_or_path!r} has no fast form; convert it to a tokenizer.json first.")
    return tokenizer


def load_model(
    name_or_path: str, revision: str | None = None, device: torch.device | str = "cpu", bits: Bits | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Loads a base model from safetensors, and its fast tokenizer.

    The weights are fp32 on a processor and bf16 on an accelerator; those of the layers are
    quantized with `bits`, or where the model was saved so.

    Raises:
        UserError: the model cannot be found, is damaged or incomplete, holds NaN, or is not a decoder, or
            bitsandbytes is needed and missing.
    """
    if bits and not is_bitsandbytes_available():
        raise UserError(f"Weights of {bits} bits need bitsandbytes; pip install 'castlora[quantized]'.")
    config = load_config(name_or_path, revision)
    dtype = dtype_on(torch.device(device))
    is_quantized = bits is not None or "quantization_config" in config.to_dict()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            config=config,
            revision=revision,
            dtype=dtype,
            quantization_config=_quantization(bits, dtype) if bits else None,
            device_map={"": device} if is_quantized else None,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except LIBRARY_ERRORS as error:
        raise UserError(
            f"Weights of {name_or_path!r} cannot be read ({first_line(error)}); "
            "the folder needs complete safetensors files."
        ) from error
    model: PreTrainedModel = loaded[0]
    loading: dict[str, Any] = loaded[1]
    broken = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if broken:
        raise UserError(
            f"Weights of {name_or_path!r} lack or misfit {broken[0]!r} ({len(broken)} tensors); "
            "download the model again or fix its config.json."
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"Weights of {name_or_path!r} hold NaN or infinity in {name!r}; use an intact checkpoint.")
    logger.debug("Loaded %s in %s on %s", public_name(name_or_path), f"{bits} bits" if bits else dtype, device)
    tokenizer = load_tokenizer(name_or_path, revision)
    if is_quantized and is_bitsandbytes_available():
        _let_gradients_through(model)
    # bitsandbytes lets nobody move weights of 8 bits.
    return model.eval() if is_quantized else model.eval().to(device=torch.device(device)), tokenizer


def _quantization(bits: Bits, dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4, in which QLoRA (arXiv 2305.14314) trains, or LLM.int8 (arXiv 2208.07339)."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _let_gradients_through(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from the form of 4-bit weights for some processors that has no backward pass."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def dtype_on(device: torch.device) -> torch.dtype:
    """The dtype of base models there."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def best_device() -> torch.device:
    """Where models go: the accelerator of this process if there is one."""
    return this_process().device


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: every module and shape, no weights.

    Raises:
        UserError: there is no such model.
    """
    layers = config.num_hidden_layers
    if layers > _MOST_LAYERS:
        raise UserError(f"num_hidden_layers of {config.name_or_path!r} is {layers}; check its config.json.")
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except LIBRARY_ERRORS as error:
        raise UserError(
            f"config.json of {config.name_or_path!r} describes no model that can be built ({first_line(error)}); "
            "copy it again."
        ) from error
    return model


def weight_bytes(config: PreTrainedConfig, bytes_per_number: int, bits: Bits | None = None) -> int:
    """Memory of a model's weights.

    Args:
        config: of the model
        bytes_per_number: of weights that are not quantized
        bits: of the matrices in its layers, if bitsandbytes quantizes them
    """
    model = skeleton(config)
    numbers = int(model.num_parameters())
    if bits is None:
        return numbers * bytes_per_number
    quantized = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and layer_index(name) is not None
    )
    return (numbers - quantized) * bytes_per_number + round(quantized * _STORED_BITS[bits] / 8)


def linear_slots(model: nn.Module, config: PreTrainedConfig) -> dict[str, LinearSlot]:
    """All adaptable linear modules of the decoder layers, in the order of the model.

    Args:
        model: the model itself or its `skeleton`
        config: its configuration, which tells how fused modules are laid out
    """
    slots = {}
    for name, module in model.named_modules():
        layer = layer_index(name)
        roles = _roles_of(name)
        if layer is None or roles is None or not isinstance(module, nn.Linear | Conv1D):
            continue
        d_in, d_out = _dimensions(module)
        rows = role_rows(roles, d_out, config)
        slots[name] = LinearSlot(name, layer, rows, d_in, d_out, isinstance(module, Conv1D))
    return slots


def role_rows(roles: tuple[Role, ...], d_out: int, config: PreTrainedConfig) -> dict[Role, Rows]:
    """Output rows of each role of a module.

    Args:
        roles: what the module holds, in order
        d_out: its output rows
        config: configuration of the model, which tells how a fused module is laid out
    """
    if len(roles) != 3:
        size = d_out // len(roles)
        return {role: slice(index * size, (index + 1) * size) for index, role in enumerate(roles)}
    groups, queries, keys = head_groups(config)
    head_dim = d_out // (groups * (queries + 2 * keys))
    borders = [0, queries * head_dim, (queries + keys) * head_dim, (queries + 2 * keys) * head_dim]
    found: dict[Role, Rows] = {}
    for role, (start, stop) in zip(roles, pairwise(borders), strict=True):
        numbers = [group * borders[-1] + row for group in range(groups) for row in range(start, stop)]
        found[role] = slice(start, stop) if groups == 1 else numbers
    return found


def head_groups(config: PreTrainedConfig) -> tuple[int, int, int]:
    """How a fused map of queries, keys and values is laid out.

    Most families put all queries before all keys and values: one group. GPT-NeoX puts each head's three parts side by
    side, Falcon each key's and value's behind the queries that share them.

    Returns:
        number of groups, and in each of them the query heads and the key heads
    """
    described = config.to_dict()
    heads = config.num_attention_heads
    shared = 1 if described.get("multi_query") else heads
    if config.model_type == "gpt_neox":
        return heads, 1, 1
    if config.model_type == "falcon":
        groups = config.num_kv_heads if config.new_decoder_architecture else shared
        return groups, heads // groups, 1
    return 1, heads, described.get("num_key_value_heads") or shared


def row_numbers(rows: Rows) -> Sequence[int]:
    """The numbers of output rows."""
    return range(rows.start, rows.stop) if isinstance(rows, slice) else rows


def number_of_layers(slots: Mapping[str, LinearSlot]) -> int:
    """The depth of the model that the slots were read from."""
    return 1 + max(slot.layer for slot in slots.values())


def layer_index(module_name: str) -> int | None:
    """The first number in a module path: `model.layers.3.mlp.up_proj` is in layer 3."""
    match = re.search(r"\.(\d+)\.", module_name)
    return int(match.group(1)) if match else None


def layer_path(slots: Mapping[str, LinearSlot], layer: int) -> str:
    """Module path of a decoder layer."""
    name = next(slot.name for slot in slots.values() if slot.layer == layer)
    return name[: name.index(f".{layer}.") + len(f".{layer}")]


def public_name(name_or_path: str) -> str:
    """A name that may be written into files: a hub id as it is, a local folder by its last component."""
    return Path(name_or_path).resolve().name if Path(name_or_path).exists() else name_or_path


def context_length(config: PreTrainedConfig) -> int:
    """Positions that the model was made for; transformers maps `n_positions` and its like to this name."""
    return int(config.max_position_embeddings)


def module_type(module_name: str) -> str:
    """What names a module in every layer: `self_attn.q_proj`, `mlp.c_proj`, `fc1`."""
    return ".".join(part for part in module_name.split(".")[-2:] if not part.isdigit())


def _roles_of(module_name: str) -> tuple[Role, ...] | None:
    ends = _endings(module_name)
    return next((MODULE_ROLES[end] for end in ends if end in MODULE_ROLES), None)


def _endings(module_name: str) -> Iterator[str]:
    parts = module_name.split(".")
    yield ".".join(parts[-2:])
    yield parts[-1]


def _dimensions(module: nn.Linear | Conv1D) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features
