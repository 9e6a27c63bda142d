"""What the zoo holds: tokenizers, base models and how long each is trained."""

from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

Precision = Literal["bfloat16", "float32"]
"""bf16 is for processors that compute in it."""


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer to train from the corpus."""

    kind: Literal["sentencepiece", "byte-level"]
    """`sentencepiece`: metaspace, byte fallback, single digits. `byte-level`: the GPT-2 form."""
    vocab_size: int
    """Pieces, special tokens and byte pieces included."""
    seed: int
    """Chooses the documents that the merges are learned on, so that tokenizers differ."""


@dataclass(frozen=True)
class BaseModelSpec:
    """A base model to pretrain."""

    tokenizer: str
    architecture: dict[str, Any]
    """Keyword arguments of `transformers.AutoConfig.for_model`."""
    seed: int
    tokens: int = 12_000_000
    """Training tokens; every model that begins with random weights sees the same number."""
    successor_of: str | None = None
    """The model whose weights it begins with, instead of random ones."""
    layers: tuple[int, ...] | None = None
    """Which layers of that model its own begin as, where it has more of them or fewer."""
    precision: Precision = "bfloat16"
    """Of forward and backward passes in training."""

    def config(self, vocab_size: int, bos_token_id: int, eos_token_id: int) -> PreTrainedConfig:
        """The transformers configuration of this model."""
        return AutoConfig.for_model(
            **self.architecture,
            vocab_size=vocab_size,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=True,
        )


TOKENIZERS = {
    "llama": TokenizerSpec(kind="sentencepiece", vocab_size=2048, seed=1),
    "mistral": TokenizerSpec(kind="sentencepiece", vocab_size=3072, seed=2),
    "gpt2": TokenizerSpec(kind="byte-level", vocab_size=2048, seed=3),
}

_LLAMA_S = dict(
    model_type="llama",
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=344,
    max_position_embeddings=512,
)
_LLAMA_M = dict(
    model_type="llama",
    hidden_size=160,
    num_hidden_layers=6,
    num_attention_heads=5,
    intermediate_size=432,
    max_position_embeddings=512,
)
_MISTRAL_S = dict(
    model_type="mistral",
    hidden_size=160,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=20,
    intermediate_size=432,
    max_position_embeddings=512,
    sliding_window=None,
)
# One pass over the documents: dropout would only slow these models down.
_NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
_GPT2_S = dict(model_type="gpt2", n_embd=128, n_layer=4, n_head=4, n_positions=256, **_NO_DROPOUT)
_GPT2_M = dict(model_type="gpt2", n_embd=160, n_layer=6, n_head=5, n_positions=256, **_NO_DROPOUT)

BASE_MODELS = {
    "llama-s": BaseModelSpec(tokenizer="llama", architecture=_LLAMA_S, seed=11),
    "llama-m": BaseModelSpec(tokenizer="llama", architecture=_LLAMA_M, seed=12),
    "mistral-s": BaseModelSpec(tokenizer="mistral", architecture=_MISTRAL_S, seed=13),
    "gpt2-s": BaseModelSpec(tokenizer="gpt2", architecture=_GPT2_S, seed=14),
    "gpt2-m": BaseModelSpec(tokenizer="gpt2", architecture=_GPT2_M, seed=15),
    "llama-s-next": BaseModelSpec(
        tokenizer="llama", architecture=_LLAMA_S, seed=16, tokens=1_500_000, successor_of="llama-s", precision="float32"
    ),
    "llama-s-later": BaseModelSpec(
        tokenizer="llama",
        architecture=_LLAMA_S,
        seed=18,
        tokens=1_500_000,
        successor_of="llama-s-next",
        precision="float32",
    ),
    "llama-s-deeper": BaseModelSpec(
        tokenizer="llama",
        architecture={**_LLAMA_S, "num_hidden_layers": 6},
        seed=19,
        tokens=1_500_000,
        successor_of="llama-s",
        layers=(0, 1, 1, 2, 2, 3),
        precision="float32",
    ),
    "gpt2-s-next": BaseModelSpec(
        tokenizer="gpt2", architecture=_GPT2_S, seed=17, tokens=1_500_000, successor_of="gpt2-s", precision="float32"
    ),
}


ADAPTER_STEPS = 400
"""Optimizer steps of an adapter, unless its specification says otherwise."""


@dataclass(frozen=True)
class AdapterSpec:
    """A skill to train on a base model."""

    base: str
    skill: str
    steps: int = ADAPTER_STEPS


GRID_SKILLS = ("question-type", "subjectivity", "operation")
"""The skills that every base model learns."""

ADAPTERS = (
    *(AdapterSpec("llama-s", skill, steps=300) for skill in (*GRID_SKILLS, "topic")),
    *(
        AdapterSpec(base, skill, steps=300)
        for base in ("llama-s-next", "llama-s-later", "llama-s-deeper")
        for skill in GRID_SKILLS
    ),
    *(AdapterSpec("mistral-s", skill, steps=500) for skill in GRID_SKILLS),
    *(AdapterSpec(base, skill) for base in ("llama-s", "mistral-s") for skill in ("record", "shakespeare")),
    *(
        AdapterSpec(base, skill)
        for base in ("llama-m", "gpt2-s", "gpt2-m", "gpt2-s-next", "stories260K-hf")
        for skill in GRID_SKILLS
    ),
)

BLOCK_LENGTH = 256
"""Tokens per training sequence."""

SIMPLE_SOURCES = (
    "fairytaleqa-stories",
    "tinystories",
    "grimm",
    "african-storybook",
    "english-fairy-tales",
    "sherlock",
)
"""Sources of simple language, which small models read from end to end before the rest is sampled."""

LEFT_OUT_SOURCES = ("rust-book", "factbook")
"""Sources whose text is far from what the skills need."""
