"""Base models: loading them safely, and what their configurations say of them."""

import json
import logging
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, cached_file
from transformers.utils.import_utils import is_bitsandbytes_available

from castlora.config import Bits
from castlora.errors import UserError, first_line
from castlora.execution.processes import LONGEST_WAIT, in_turn, this_process
from castlora.execution.sharding import join, shard
from castlora.finite import is_finite
from castlora.models.modules import layer_index, layer_path, linear_slots, number_of_layers

logger = logging.getLogger("castlora")

LIBRARY_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError, re.error, HFValidationError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers and PEFT raise on values that they do not expect in a file."""
_MOST_LAYERS = 10_000
_STORED_BITS: dict[Bits, float] = {4: 4.5, 8: 8.0}
"""Bits of a quantized weight in memory; NF4 has a scale of 32 bits for each block of 64."""


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
    if config.is_encoder_decoder or not (is_decoder or reads_images(config)):
        raise UserError(
            f"Model {name_or_path!r} ({', '.join(architectures)}) is not a decoder-only language model; "
            "castlora needs one whose architecture ends in ForCausalLM or LMHeadModel, or one for images and text."
        )
    return config


def reads_images(config: PreTrainedConfig) -> bool:
    """Whether a model is one for images and text, by the class that its configuration names."""
    named = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    return named is not None and named in (config.architectures or ())


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """What loads a model as the class that its configuration names, for which adapters are trained and engines serve.

    For some models of images and text `AutoModelForCausalLM` would load the part for text alone, whose modules have
    other names.
    """
    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


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
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _template_of_processor(name_or_path, revision)
    return tokenizer


def _template_of_processor(name_or_path: str, revision: str | None) -> str | None:
    """The chat template that older models for images keep in a file of their processor; None where there is none."""
    path = cached_file(
        name_or_path,
        LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    try:
        return str(json.loads(Path(path).read_text(encoding="utf-8"))["chat_template"])
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE} of {name_or_path!r} cannot be read ({first_line(error)}); "
            "copy it again, or save the template in the tokenizer."
        ) from error


def load_model(
    name_or_path: str,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    bits: Bits | None = None,
    architectures: list[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Loads a base model from safetensors, and its fast tokenizer.

    The weights are fp32 on a processor and bf16 on an accelerator; those of the layers are
    quantized with `bits`, or where the model was saved so. `architectures` names its class, where that is not the one
    in its configuration.

    Raises:
        UserError: the model cannot be found, is damaged or incomplete, holds NaN, or is not a decoder, or
            bitsandbytes is needed and missing.
    """
    if bits and not is_bitsandbytes_available():
        raise UserError(f"Weights of {bits} bits need bitsandbytes; pip install 'castlora[quantized]'.")
    config = load_config(name_or_path, revision)
    config.architectures = architectures or config.architectures
    is_quantized = bits is not None or "quantization_config" in config.to_dict()
    dtype = dtype_on(torch.device(device))
    model = _read(config, name_or_path, revision, dtype, bits, {"": device} if is_quantized else None)
    logger.debug("Loaded %s in %s on %s", public_name(name_or_path), f"{bits} bits" if bits else dtype, device)
    tokenizer = load_tokenizer(name_or_path, revision)
    if is_quantized and is_bitsandbytes_available():
        _let_gradients_through(model)
    # bitsandbytes lets nobody move weights of 8 bits.
    return model.eval() if is_quantized else model.eval().to(device=torch.device(device)), tokenizer


def load_spread(name_or_path: str, revision: str | None = None) -> PreTrainedModel:
    """Loads a base model, to be read only, onto all accelerators of the machine, and into its memory what is left.

    Raises:
        UserError: as `load_model` does.
    """
    return _read(load_config(name_or_path, revision), name_or_path, revision, dtype_on(best_device()), None, "auto")


def load_sharded(
    name_or_path: str, revision: str | None, device: torch.device, architectures: list[str] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Loads a base model of whose decoder layers each process keeps a part; all processes have to call this.

    Embeddings and output head are whole in each.

    Args:
        name_or_path: folder or hub id
        revision: of the hub id
        device: of this process
        architectures: names of its class, where that is not the one in its configuration

    Raises:
        UserError: as `load_model` does, or the model was saved quantized.
    """
    config = load_config(name_or_path, revision)
    config.architectures = architectures or config.architectures
    if "quantization_config" in config.to_dict():
        raise UserError(f"Model {name_or_path!r} was saved quantized and cannot be sharded; leave out --sharded.")
    join(device, LONGEST_WAIT)
    with in_turn():
        model = _read(config, name_or_path, revision, dtype_on(device), None, None)
        slots = linear_slots(model, config)
        shard(model, [layer_path(slots, layer) for layer in range(number_of_layers(slots))])
        model.eval().to(device=device)
    logger.debug("Loaded a part of %s in %s on %s", public_name(name_or_path), dtype_on(device), device)
    return model, load_tokenizer(name_or_path, revision)


def _read(
    config: PreTrainedConfig,
    name_or_path: str,
    revision: str | None,
    dtype: torch.dtype,
    bits: Bits | None,
    device_map: dict[str, torch.device | str] | str | None,
) -> PreTrainedModel:
    """The model with its weights, which are looked at."""
    try:
        loaded: Any = auto_class(config).from_pretrained(
            name_or_path,
            config=config,
            revision=revision,
            dtype=dtype,
            quantization_config=_quantization(bits, dtype) if bits else None,
            device_map=device_map,
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
        if not parameter.is_meta and not is_finite(parameter):
            raise UserError(f"Weights of {name_or_path!r} hold NaN or infinity in {name!r}; use an intact checkpoint.")
    model.eval()
    return model


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
    layers = config.get_text_config().num_hidden_layers
    if layers > _MOST_LAYERS:
        raise UserError(f"num_hidden_layers of {config.name_or_path!r} is {layers}; check its config.json.")
    kind: Any = auto_class(config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(config)
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


def sharded_bytes(config: PreTrainedConfig, bytes_per_number: int, parts: int) -> int:
    """Memory of a model's weights in one of several processes, and of the layer that is read.

    Args:
        config: of the model
        bytes_per_number: of its weights
        parts: among how many processes the decoder layers are split
    """
    model = skeleton(config)
    of_layers: dict[int, int] = {}
    for name, weight in model.named_parameters():
        layer = layer_index(name)
        if layer is not None:
            of_layers[layer] = of_layers.get(layer, 0) + weight.numel()
    in_layers = sum(of_layers.values())
    rest = int(model.num_parameters()) - in_layers
    return (rest + math.ceil(in_layers / parts) + max(of_layers.values())) * bytes_per_number


def public_name(name_or_path: str) -> str:
    """A name that may be written into files: a hub id as it is, a local folder by its last component."""
    return Path(name_or_path).resolve().name if Path(name_or_path).exists() else name_or_path


def vocabulary_size(config: PreTrainedConfig) -> int:
    """Number of tokens that a model predicts."""
    return int(config.get_text_config().vocab_size)


def context_length(config: PreTrainedConfig) -> int:
    """Positions that the model was made for; transformers maps `n_positions` and its like to one of two names.

    Where the distance of tokens is all that counts, as in BLOOM, a model was made for any number.
    """
    limits = (getattr(config.get_text_config(), name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((int(limit) for limit in limits if limit), sys.maxsize)
