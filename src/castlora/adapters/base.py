"""The base model as an adapter knows it, where that is not its configuration as it stands."""

import copy
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from castlora.adapters.files import WEIGHTS_FILE
from castlora.adapters.vocabulary import with_vocabulary_of
from castlora.models.loading import reads_images, skeleton
from castlora.models.modules import linear_slots


def as_trained(adapter: Path, base_config: PreTrainedConfig) -> PreTrainedConfig:
    """The base model's configuration, with the class and the number of tokens that the adapter was trained with.

    Args:
        adapter: its folder
        base_config: of its base model
    """
    return with_vocabulary_of(adapter, _with_class_of(adapter, base_config))


def _with_class_of(adapter: Path, base_config: PreTrainedConfig) -> PreTrainedConfig:
    """Names the class for text alone where the adapter was trained on that.

    Of some models for images and text, as Qwen 3.5, `AutoModelForCausalLM` loads the part for text, whose modules have
    other names than in the whole model, and adapters for either are published.
    """
    for_text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(base_config.model_type)
    if not reads_images(base_config) or for_text is None or for_text in (base_config.architectures or ()):
        return base_config
    slots = linear_slots(skeleton(base_config), base_config)
    parts = {slot.text_part.rsplit(".", 1)[-1] for slot in slots.values()}
    try:
        with safe_open(adapter / WEIGHTS_FILE, "pt") as file:
            names = {part for key in file.offset_keys() for part in key.split(".")}
    except (SafetensorError, OSError):
        # Whoever reads the weights says what is wrong with them.
        return base_config
    if parts & names:
        return base_config
    alone = copy.deepcopy(base_config)
    alone.architectures = [for_text]
    return alone
