"""Adapters inside a model: loaded, attached, set, and read again."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from castlora.adapters.factors import KEY_PREFIX, LowRank
from castlora.adapters.files import CONFIG_FILE, find_adapter, read_fields
from castlora.adapters.patterns import check_patterns
from castlora.adapters.vocabulary import resize_vocabulary, with_vocabulary_of
from castlora.errors import UserError, first_line
from castlora.models.loading import LIBRARY_ERRORS

ADAPTER_NAME = "default"
"""The name that PEFT gives an adapter unless told otherwise."""


def attach_lora(model: PreTrainedModel, modules: Iterable[str], rank: int) -> PeftModel:
    """The model with a fresh trainable LoRA of scale 1 on the named modules, as PEFT starts it."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(modules), task_type="CAUSAL_LM")
    student = get_peft_model(model, config)
    assert isinstance(student, PeftModel)
    return student


def start_from_factors(student: PeftModel, factors: Mapping[str, LowRank]) -> None:
    """Sets the student's LoRA to given updates; ranks that they leave free start like those of a fresh LoRA."""
    for name, lora in factors.items():
        lora_a, lora_b = lora_maps(student, name)
        with torch.no_grad():
            lora_a.weight[: lora.rank] = lora.a
            lora_b.weight.zero_()
            lora_b.weight[:, : lora.rank] = lora.b


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


def load_adapter(base: PreTrainedModel, adapter: str, model: str) -> PeftModelForCausalLM:
    """Applies an adapter to its base model.

    Args:
        base: the base model; PEFT changes it in place
        adapter: folder or hub id
        model: what the user called the base model

    Raises:
        UserError: the adapter cannot be loaded or does not fit.
    """
    folder = str(find_adapter(adapter))
    read_fields(adapter, Path(folder) / CONFIG_FILE)
    try:
        config = PeftConfig.from_pretrained(folder)
    except LIBRARY_ERRORS as error:
        raise UserError(f"{adapter}: its configuration is not one of PEFT ({first_line(error)}).") from error
    if isinstance(config, LoraConfig) and config.megatron_config:
        # PEFT would import the Python module that such a configuration names.
        raise UserError(f"{adapter}: megatron_config is set; only adapters without it can be scored.")
    check_patterns(adapter, config, [name for name, _ in base.named_modules()])
    resize_vocabulary(base, with_vocabulary_of(Path(folder), base.config))
    try:
        with warnings.catch_warnings():
            # PEFT would go on with a module that stays as it was.
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted = PeftModel.from_pretrained(base, folder, config=config)
    except (*LIBRARY_ERRORS, UserWarning) as error:  # modules or shapes that one has and the other has not
        raise UserError(f"{adapter}: cannot be loaded as an adapter of {model} ({first_line(error)}).") from error
    if not isinstance(adapted, PeftModelForCausalLM):
        task_type = adapted.peft_config["default"].task_type
        raise UserError(f"{adapter}: its task_type is {task_type}; only CAUSAL_LM adapters can be scored.")
    return adapted
