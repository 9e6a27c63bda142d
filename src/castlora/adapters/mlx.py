"""Adapters in the form of MLX-LM: factors stored transposed, one rank and scale, names as MLX-LM's models have them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from castlora.adapters.factors import LowRank, pad_rank
from castlora.adapters.files import CONFIG_FILE
from castlora.errors import UserError, first_line
from castlora.finite import is_finite
from castlora.models.modules import LinearSlot, number_of_layers

MLX_WEIGHTS_FILE = "adapters.safetensors"
_ROOTS = {
    "transformer.h.": "model.h.",
    "gpt_neox.layers.": "model.h.",
    "model.layers.": "model.layers.",
    "model.language_model.layers.": "language_model.model.layers.",
    "language_model.model.layers.": "language_model.model.layers.",
}
"""Where transformers keeps the decoder layers of a model, and where MLX-LM does."""
_LAYER = re.compile(r"^(?:language_model\.)?model\.(?:layers|h)\.\d+\.")


def mlx_name(module: str) -> str:
    """What MLX-LM calls a module of transformers.

    Raises:
        UserError: the model's layers have no place in MLX-LM that is known here.
    """
    for root, mlx_root in _ROOTS.items():
        if module.startswith(root):
            return mlx_root + module.removeprefix(root)
    raise UserError(
        f"{module!r} has no known name in MLX-LM; convert adapters of models whose layers are at {', '.join(_ROOTS)}."
    )


def mlx_base(folder: Path) -> str:
    """The base model that an MLX-LM adapter was trained on; empty if it does not say."""
    named = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("model")
    return named if isinstance(named, str) else ""


def write_mlx(folder: Path, factors: Mapping[str, LowRank], slots: Mapping[str, LinearSlot], base: str) -> None:
    """Writes an adapter that `mlx_lm` loads with `--adapter-path`.

    Args:
        folder: where `adapter_config.json` and `adapters.safetensors` go
        factors: module path in transformers → factors
        slots: linear modules of the base model, by their names in transformers
        base: name of the base model
    """
    rank = max(lora.rank for lora in factors.values())
    tensors, keys = {}, set()
    for name, lora in factors.items():
        mlx, padded = mlx_name(name), pad_rank(lora, rank)
        tensors[f"{mlx}.lora_a"] = padded.a.T.float().contiguous()
        tensors[f"{mlx}.lora_b"] = padded.b.T.float().contiguous()
        keys.add(_LAYER.sub("", mlx))
    # MLX-LM adapts every layer alike; a layer that has nothing to add would start from noise.
    for slot in _absent(factors, slots):
        name = mlx_name(slot.name)
        tensors[f"{name}.lora_a"] = torch.zeros(slot.d_in, rank)
        tensors[f"{name}.lora_b"] = torch.zeros(rank, slot.d_out)
    parameters = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)}
    config = {
        "model": base,
        "fine_tune_type": "lora",
        "num_layers": number_of_layers(slots),
        "lora_parameters": parameters,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, folder / MLX_WEIGHTS_FILE, metadata={"format": "mlx"})


def read_mlx(folder: Path, slots: Mapping[str, LinearSlot]) -> dict[str, LowRank]:
    """Reads the factors of an MLX-LM adapter, in fp32, its scale folded into B.

    Args:
        folder: the adapter
        slots: linear modules of its base model, by their names in transformers

    Raises:
        UserError: it is no LoRA of linear maps of this base model, or is damaged.
    """
    scale = _scale(folder, json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    tensors = _read_tensors(folder)
    factors = {}
    for name, slot in slots.items():
        a, b = (tensors.pop(f"{mlx_name(name)}.lora_{side}", None) for side in "ab")
        if a is None and b is None:
            continue
        if a is None or b is None or not _fit(a, b, slot):
            raise UserError(
                f"Adapter {str(folder)!r}: lora_a and lora_b of {mlx_name(name)!r} do not fit a map from {slot.d_in} "
                f"to {slot.d_out}; name the base it was trained on with --base."
            )
        factors[name] = LowRank(a.T.float().contiguous(), scale * b.T.float().contiguous())
    if tensors or not factors:
        what = repr(next(iter(sorted(tensors)))) if tensors else "no factor"
        raise UserError(
            f"Adapter {str(folder)!r} holds {what}, which is no linear map of its base model that castlora knows; "
            "name the base it was trained on with --base, or train without it."
        )
    return factors


def _absent(factors: Mapping[str, LowRank], slots: Mapping[str, LinearSlot]) -> list[LinearSlot]:
    """Modules that the adapter leaves as they are, of a kind that it changes in other layers."""
    kinds = {_LAYER.sub("", mlx_name(name)) for name in factors}
    return [slot for name, slot in slots.items() if name not in factors and _LAYER.sub("", mlx_name(name)) in kinds]


def _scale(folder: Path, config: Mapping[str, Any]) -> float:
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UserError(f"Adapter {str(folder)!r}: fine_tune_type is {kind!r}; castlora reads 'lora' of MLX-LM.")
    parameters = config["lora_parameters"]
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise UserError(
            f"Adapter {str(folder)!r}: lora_parameters has no number 'scale'; write the one of its training."
        )
    return float(scale)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(folder / MLX_WEIGHTS_FILE)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{MLX_WEIGHTS_FILE} of {str(folder)!r} cannot be read ({first_line(error)}); copy it again."
        ) from error
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(f"{MLX_WEIGHTS_FILE} of {str(folder)!r} holds NaN or infinity in {key!r}.")
    return tensors


def _fit(a: Tensor, b: Tensor, slot: LinearSlot) -> bool:
    return a.dim() == b.dim() == 2 and a.shape[0] == slot.d_in and b.shape[1] == slot.d_out and a.shape[1] == b.shape[0]
