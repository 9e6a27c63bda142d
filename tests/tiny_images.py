"""Tiny models for images and text with random weights, of every family that castlora names."""

from pathlib import Path
from typing import Any

from tiny import CONTEXT, save_model, sentencepiece_type
from transformers import AutoConfig, AutoModelForImageTextToText

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "max_position_embeddings": CONTEXT,
}  # fmt: skip
IMAGES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
OF_QWEN = {"depth": 2, "hidden_size": 16, "embed_dim": 16, "intermediate_size": 32, "num_heads": 2,
           "out_hidden_size": 32, "patch_size": 14}  # fmt: skip
THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": {"query_pre_attn_scalar": 8}, "vision_config": IMAGES, "mm_tokens_per_image": 4},
    "mistral3": {"text_config": {"model_type": "mistral"},
                 "vision_config": {**IMAGES, "head_dim": 8, "model_type": "pixtral"}},
    "qwen2_5_vl": {"text_config": THREE_AXES, "vision_config": OF_QWEN},
    "qwen3_vl": {"text_config": THREE_AXES, "vision_config": {**OF_QWEN, "deepstack_visual_indexes": [0]}},
    "qwen3_5": {"text_config": LINEAR_ATTENTION, "vision_config": OF_QWEN},
    "gemma4": {"text_config": {"global_head_dim": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
                               "vocab_size_per_layer_input": 320,
                               "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
               "vision_config": {**IMAGES, "num_key_value_heads": 2, "head_dim": 8}, "audio_config": None},
    "llama4": {"text_config": {"intermediate_size_mlp": 48, "num_local_experts": 2},
               "vision_config": {**IMAGES, "intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16,
                                 "projector_output_dim": 16}},
    "llava": {"text_config": {"model_type": "llama"}, "vision_config": {**IMAGES, "model_type": "siglip_vision_model"}},
    "internvl": {"text_config": {"model_type": "qwen2"},
                 "vision_config": {**IMAGES, "image_size": [28, 28], "patch_size": [14, 14]}},
}  # fmt: skip


def save_image_model(folder: Path, name: str) -> Path:
    """A base model with random weights and its tokenizer, as transformers saves them."""
    tokenizer = sentencepiece_type(60)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": len(tokenizer)}
    given = FAMILIES[name]
    of_text = {**TEXT, **special, "initializer_range": 0.2, **given["text_config"]}
    config = AutoConfig.for_model(name, **{**given, "text_config": of_text})
    return save_model(folder, config, tokenizer, kind=AutoModelForImageTextToText)
