"""What the speed benchmark runs on: two models with random weights, a LoRA for one of them, and aligned tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from castlora.adapters.factors import LowRank
from castlora.alignment.positions import AlignedPassage
from castlora.alignment.vocabulary import SharedVocabulary
from castlora.config import ShapeName
from castlora.maps.starts import BranchMaps, Maps
from castlora.models.loading import skeleton
from castlora.models.modules import LinearSlot, linear_slots, row_numbers
from castlora.models.pairing import ModulePair, Pairing, pair_modules

TextKind = Literal["running text", "answered prompts"]
"""Every position counts, as in the paper's recipe, or only those of an answer, as in the default."""
_ANSWER_SHARE = 1 / 8
_ALIGNED_SHARE = 3 / 4


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only model."""

    model_type: str
    width: int
    layers: int
    heads: int
    key_heads: int
    neurons: int
    """Width of the MLP."""
    vocabulary: int

    def config(self) -> PreTrainedConfig:
        """The transformers configuration."""
        return AutoConfig.for_model(
            self.model_type,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            intermediate_size=self.neurons,
            vocab_size=self.vocabulary,
            head_dim=self.width // self.heads,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        )


@dataclass(frozen=True)
class PairShape:
    """A source and a target."""

    source: Shape
    target: Shape


SHAPES: dict[ShapeName, PairShape] = {
    "zoo": PairShape(Shape("llama", 128, 4, 4, 4, 344, 2048), Shape("mistral", 160, 5, 8, 2, 432, 3072)),
    "1b": PairShape(Shape("llama", 2048, 22, 32, 4, 5632, 32000), Shape("mistral", 2048, 16, 32, 8, 8192, 32768)),
    "7b-13b": PairShape(Shape("llama", 4096, 32, 32, 32, 11008, 32000), Shape("llama", 5120, 40, 40, 40, 13824, 32000)),
    "7b": PairShape(Shape("llama", 4096, 32, 32, 32, 11008, 32000), Shape("mistral", 4096, 32, 32, 8, 14336, 32000)),
}
"""`zoo`: llama-s and mistral-s, which are in the package; `7b` and `7b-13b`: pairs of the paper."""


@dataclass(frozen=True)
class Subject:
    """Two models with random weights, and what a transfer between them needs."""

    shape: PairShape
    source: PreTrainedModel
    target: PreTrainedModel
    target_slots: dict[str, LinearSlot]
    factors: dict[str, LowRank]
    """A LoRA for all linear modules of the source."""
    pairing: Pairing
    shared: SharedVocabulary

    @classmethod
    def build(cls, shape: PairShape, rank: int, seed: int, device: torch.device) -> "Subject":
        """Draws all weights, those of the models fp32 on a processor and bf16 on an accelerator, as they are loaded."""
        torch.manual_seed(seed)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        with device:
            source, target = (
                AutoModelForCausalLM.from_config(one.config(), dtype=dtype).eval()
                for one in (shape.source, shape.target)
            )
        factors, pairing = random_adapter(shape, rank)
        slots = linear_slots(target, target.config)
        return cls(shape, source, target, slots, factors, pairing, partly_shared(shape))

    def passages(self, count: int, length: int, kind: TextKind, seed: int) -> list[AlignedPassage]:
        """Random tokens, as many for the source as for the target, three quarters of them aligned."""
        chance = np.random.default_rng(seed)
        last = length - 1

        def positions() -> list[int]:
            drawn = chance.choice(last, size=round(_ALIGNED_SHARE * last), replace=False)
            return [*sorted(drawn.tolist()), last]

        passages = []
        for _ in range(count):
            source_ids, target_ids = (
                chance.integers(model.vocabulary, size=length).tolist()
                for model in (self.shape.source, self.shape.target)
            )
            at_source, at_target = positions(), positions()
            counted_from = 0 if kind == "running text" else length - max(1, round(_ANSWER_SHARE * length))
            weights = [float(position >= counted_from) for position in at_target]
            passages.append(AlignedPassage(source_ids, target_ids, at_source, at_target, weights))
        return passages


def random_adapter(shape: PairShape, rank: int) -> tuple[dict[str, LowRank], Pairing]:
    """A LoRA for all linear modules of a source, and their pairing with those of the target; without any model."""
    source, target = (linear_slots(skeleton(one.config()), one.config()) for one in (shape.source, shape.target))
    factors = {
        name: LowRank(torch.randn(rank, slot.d_in) / slot.d_in**0.5, torch.randn(slot.d_out, rank))
        for name, slot in source.items()
    }
    return factors, pair_modules(source, target, factors)


def random_maps(pair: ModulePair, factors: Mapping[str, LowRank]) -> Maps:
    """Gaussian maps for the branches of one target module."""
    maps = {}
    for index, branch in enumerate(pair.branches):
        d_source = factors[branch.source_module].a.shape[1]
        target_rows, source_rows = (len(row_numbers(rows)) for rows in (branch.target_rows, branch.source_rows))
        maps[pair.target.name, index] = BranchMaps(
            torch.randn(d_source, pair.target.d_in).div_(d_source**0.5),
            torch.randn(target_rows, source_rows).div_(source_rows**0.5),
        )
    return maps


def partly_shared(shape: PairShape) -> SharedVocabulary:
    """Vocabularies of unlike tokenizers: three quarters of the smaller one are tokens of both, the rest joins them."""
    size = 3 * min(shape.source.vocabulary, shape.target.vocabulary) // 4
    ids = torch.arange(size)
    source, target = (1 + torch.arange(one.vocabulary) % size for one in (shape.source, shape.target))
    return SharedVocabulary(ids, ids, source, target, is_whole=False)
