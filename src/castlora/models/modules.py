"""The linear modules of decoder layers, and which of them plays which role."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from castlora.config import Role as Role

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
    "shared_mlp.input_linear": ("gate", "up"),
    "feed_forward.w1": ("gate",),
    "feed_forward.w3": ("up",),
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
    "shared_mlp.output_linear": ("down",),
    "feed_forward.w2": ("down",),
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
    text_part: str = ""
    """Path of the part that reads text, in a model that has others, where names of its modules may recur."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles that the module holds; several for a fused module."""
        return tuple(self.rows)


def linear_slots(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, LinearSlot]:
    """All adaptable linear modules of the decoder layers, in the order of the model.

    A model that reads images or sound too has layers for these, which text never passes: they are left out.

    Args:
        model: the model itself or its `skeleton`
        config: its configuration, which tells how fused modules are laid out
    """
    slots = {}
    text_part = _text_part(model, config)
    for name, module in model.named_modules():
        layer = layer_index(name)
        roles = _roles_of(name)
        if layer is None or roles is None or not isinstance(module, nn.Linear | Conv1D):
            continue
        if not name.startswith(text_part):
            continue
        d_in, d_out = _dimensions(module)
        rows = role_rows(roles, d_out, config)
        slots[name] = LinearSlot(name, layer, rows, d_in, d_out, isinstance(module, Conv1D), text_part)
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

    Most families put all queries before all keys and values: one group. GPT-NeoX and BLOOM put each head's three parts
    side by side, Falcon each key's and value's behind the queries that share them.

    Returns:
        number of groups, and in each of them the query heads and the key heads
    """
    config = config.get_text_config()
    described = config.to_dict()
    heads = config.num_attention_heads
    shared = 1 if described.get("multi_query") else heads
    if config.model_type in ("gpt_neox", "bloom"):
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


def module_type(module_name: str) -> str:
    """What names a module in every layer: `self_attn.q_proj`, `mlp.c_proj`, `fc1`."""
    return ".".join(part for part in module_name.split(".")[-2:] if not part.isdigit())


def _text_part(model: PreTrainedModel, config: PreTrainedConfig) -> str:
    """Path of the decoder of a model that reads more than text; nothing where it is the whole model."""
    if config.get_text_config() is config:
        return ""
    decoder = model.get_decoder()
    return next(str(name) for name, module in model.named_modules() if module is decoder)


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
