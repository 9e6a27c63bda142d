"""Tiny base models with random weights, text, and LoRA adapters for them."""

import functools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from castlora.alignment.positions import AlignedPassage, align_passages
from castlora.alignment.tokens import ByteTokenizer
from castlora.config import Tuning
from castlora.text.passages import Passage

NOUNS = "fox hen miller ring king river mountain garden lantern letter".split()
VERBS = "finds carries hides follows forgets remembers".split()
PLACES = "near the old mill, under the bridge, behind the house, over the hill".split(", ")
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
CONTEXT = 96
"""Positions that every tiny model has."""

SHORT = Tuning(
    passages=24, filled_passages=24, candidates=4, format_candidates=0, max_length=88, answer_tokens=8,
    rehearsal_passages=8, rehearsal_tokens=12,
)  # fmt: skip
"""Text of a transfer that takes a second; to look for prompt formats takes longer than all else together."""

FAMILIES = ("llama", "mistral", "phi3", "gpt2", "gpt2-deep")
LINEAR_MODULES = {
    **dict.fromkeys(
        ("llama", "mistral"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    **dict.fromkeys(("gpt2", "gpt2-deep"), ("c_attn", "c_proj", "c_fc")),
}
"""All kinds of linear modules of a family's decoder layers."""


def sentences(count: int, seed: int = 0) -> Iterator[str]:
    chance = random.Random(seed)
    for number in range(count):
        first, second = chance.sample(NOUNS, 2)
        yield f"The {first} {chance.choice(VERBS)} the {second} {chance.choice(PLACES)} on day {number}."


@functools.cache
def sentencepiece_type(merges: int) -> PreTrainedTokenizerFast:
    """Dummy prefix, byte fallback, and a begin-of-text token on every text, as Llama 2 has them."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(sentences(60), trainers.BpeTrainer(vocab_size=merges, show_progress=False))
    state = json.loads(learned.to_str())["model"]
    specials = ["<unk>", "<s>", "</s>"]
    vocabulary = {piece: number for number, piece in enumerate([*specials, *BYTE_PIECES, *state["vocab"]])}
    pairs = [(left, right) for left, right in state["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens([AddedToken(special, normalized=False, special=True) for special in specials])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@functools.cache
def byte_level(vocab_size: int) -> PreTrainedTokenizerFast:
    """The GPT-2 form: one special token, which no text begins with."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sentences(60), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def family(name: str) -> tuple[PreTrainedConfig, PreTrainedTokenizerFast]:
    """Configuration and tokenizer of one of the tiny models."""
    is_gpt2 = name.startswith("gpt2")
    tokenizer = byte_level(300) if is_gpt2 else sentencepiece_type(60 if name == "mistral" else 50)
    tokens = dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    gated = dict(max_position_embeddings=CONTEXT, tie_word_embeddings=False, num_attention_heads=4)
    three_layers = dict(hidden_size=32, num_hidden_layers=3, intermediate_size=56)
    configs: dict[str, PreTrainedConfig] = {
        "llama": LlamaConfig(**tokens, **gated, **three_layers),
        "mistral": MistralConfig(
            **tokens, **gated, hidden_size=48, num_hidden_layers=4, intermediate_size=64, num_key_value_heads=2
        ),
        "phi3": Phi3Config(**tokens, **gated, **three_layers, num_key_value_heads=2),
        "gpt2": GPT2Config(**tokens, n_positions=CONTEXT, n_embd=32, n_layer=3, n_head=4),
        "gpt2-deep": GPT2Config(**tokens, n_positions=CONTEXT, n_embd=40, n_layer=5, n_head=4),
    }
    return configs[name], tokenizer


def save_model(
    folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, seed: int = 0,
    kind: Any = AutoModelForCausalLM,
) -> Path:  # fmt: skip
    """A base model with random weights and its tokenizer, as transformers saves them."""
    torch.manual_seed(seed)
    model = kind.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(
    folder: Path, base: Path, target_modules: Sequence[str] | str, seed: int = 1, **options: Any
) -> PeftModel:
    """A LoRA with random factors (r 4, alpha 16), as PEFT saves it; returns the live model."""
    torch.manual_seed(seed)
    modules = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": modules, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(load(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model.eval()


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def load_adapted(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(load(base), adapter).eval()


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def aligned(source: str, target: str, count: int = 60) -> list[AlignedPassage]:
    """Sentences in the tokenizers of two families."""
    tokenizers = [ByteTokenizer.from_tokenizer(family(name)[1]) for name in (source, target)]
    return list(align_passages(map(Passage, sentences(count)), *tokenizers, 48, 0.1))


def maps_in(folder) -> dict[str, torch.Tensor]:
    """The maps of a bridge, by site and name."""
    return {
        f"{path.stem} {name}": tensor.float()
        for path in sorted(folder.glob("layer-*.safetensors"))
        for name, tensor in load_file(path).items()
    }
