"""Both models of a transfer, loaded, and text that both of them read."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from castlora.adapters.vocabulary import resize_vocabulary, tokenizer_of
from castlora.alignment.positions import AlignedPassage, Side, align_passages
from castlora.alignment.tokens import ByteTokenizer
from castlora.alignment.vocabulary import SharedVocabulary
from castlora.config import Bits, Recipe
from castlora.errors import UserError
from castlora.execution.offloading import Offloading
from castlora.models.endings import end_tokens_of
from castlora.models.loading import best_device, load_model, load_sharded, vocabulary_size
from castlora.plan import Plan
from castlora.text.passages import Passage

logger = logging.getLogger("castlora")

HELD_OUT_PASSAGES = 64


@dataclass(frozen=True)
class Loading:
    """How the models of a transfer are held."""

    low_memory: bool = False
    source_bits: Bits | None = None
    """Of a weight of the source's layers; by default those of its dtype."""
    target_bits: Bits | None = None
    sharded: bool = False
    """Whether each process keeps a part of both models' layers."""

    @property
    def can_move(self) -> bool:
        """Whether the models can leave an accelerator."""
        return not self.sharded and 8 not in (self.source_bits, self.target_bits)

    @property
    def takes_turns(self) -> bool:
        """Whether the accelerator holds one model at a time; parts of both leave no need for that."""
        return self.low_memory and not self.sharded

    def check(self, is_plain: bool, processes: int) -> None:
        """Looks whether it can be done.

        Args:
            is_plain: whether the adapter is a plain LoRA, whose update does not depend on the weights
            processes: how many load the models

        Raises:
            UserError: it cannot.
        """
        for name, bits in (("--source-bits", self.source_bits), ("--target-bits", self.target_bits)):
            if bits == 8 and self.low_memory:
                raise UserError(f"{name} 8 cannot be had with --low-memory, since such weights do not move; give 4.")
        if self.source_bits and not is_plain:
            raise UserError("--source-bits is for plain LoRAs, and this adapter merges into the weights; leave it out.")
        if self.sharded:
            self._check_sharded(is_plain, processes)

    def _check_sharded(self, is_plain: bool, processes: int) -> None:
        if processes == 1:
            raise UserError("--sharded splits models among processes, and there is one; start several with torchrun.")
        if self.source_bits or self.target_bits:
            raise UserError("--sharded takes weights in full precision; leave out --source-bits and --target-bits.")
        if not is_plain:
            raise UserError("--sharded is for plain LoRAs, and this adapter merges into the weights; leave it out.")

    def load(
        self, name_or_path: str, revision: str | None, bits: Bits | None, architectures: list[str] | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """Loads one of the models to where it runs; `architectures` as in `load_model`."""
        if self.sharded:
            return load_sharded(name_or_path, revision, best_device(), architectures)
        return load_model(name_or_path, revision, best_device(), bits, architectures)


IN_FULL = Loading()


@dataclass(frozen=True, kw_only=True)
class BaseModels:
    """Source and target as they are."""

    source: PreTrainedModel
    target: PreTrainedModel
    source_tokenizer: PreTrainedTokenizerFast
    target_tokenizer: PreTrainedTokenizerFast
    source_bytes: ByteTokenizer
    target_bytes: ByteTokenizer
    takes_turns: bool = False
    """Whether the accelerator holds only the model in use."""
    can_move: bool = True
    """Whether the models can leave the accelerator."""
    offloading: Offloading = field(default_factory=Offloading)

    def use(self, side: Side) -> None:
        """Has the model of a side where it runs; where they take turns, the other waits in the machine's memory."""
        if self.takes_turns:
            used, waits = (self.source, self.target) if side == "source" else (self.target, self.source)
            self.offloading.move(waits, torch.device("cpu"))
            clear_device_cache()
            self.offloading.move(used, best_device())

    def put_away(self) -> None:
        """Leaves the accelerator to others, as far as the models can."""
        if self.can_move:
            for model in (self.source, self.target):
                self.offloading.move(model, torch.device("cpu"))
        clear_device_cache()


@dataclass(frozen=True, kw_only=True)
class Models(BaseModels):
    """Both models. The source carries the adapter; the target is bare until a student is made of it."""

    teacher: PeftModel
    """The source with the adapter, which acts in the source itself unless it is disabled."""
    shared: SharedVocabulary
    recomputes: bool = False
    """Whether the target's activations are computed again for the way back instead of being kept."""


def load_base_models(source: str, target: str, loading: Loading) -> BaseModels:
    """Loads both models without any adapter.

    Args:
        source: folder or hub id
        target: folder or hub id
        loading: in what precision, and where they are held
    """
    model, tokenizer = loading.load(source, None, loading.source_bits)
    offloading = Offloading()
    if loading.takes_turns:
        offloading.move(model, torch.device("cpu"))
    target_model, target_tokenizer = loading.load(target, None, loading.target_bits)
    return BaseModels(
        source=model,
        target=target_model,
        source_tokenizer=tokenizer,
        target_tokenizer=target_tokenizer,
        source_bytes=ByteTokenizer.from_tokenizer(tokenizer),
        target_bytes=ByteTokenizer.from_tokenizer(target_tokenizer),
        takes_turns=loading.takes_turns,
        offloading=offloading,
    )


def load_models(plan: Plan, loading: Loading = IN_FULL) -> Models:
    """Loads both models and applies the adapter to the source.

    Args:
        plan: of the transfer
        loading: in what precision, and where they are held
    """
    source, teacher, source_tokenizer = _load_teacher(plan, loading)
    source_ends = _ends("source", teacher, source_tokenizer)
    offloading = Offloading()
    if loading.takes_turns:
        offloading.move(source, torch.device("cpu"))
    target, target_tokenizer = loading.load(plan.target, None, loading.target_bits)
    target_ends = _ends("target", target, target_tokenizer)
    source_bytes = ByteTokenizer.from_tokenizer(source_tokenizer)
    target_bytes = ByteTokenizer.from_tokenizer(target_tokenizer)
    sizes = vocabulary_size(plan.source_config), vocabulary_size(plan.target_config)
    shared = SharedVocabulary.of(source_bytes, target_bytes, *sizes, source_ends, target_ends)
    return Models(
        source=source,
        teacher=teacher,
        target=target,
        source_tokenizer=source_tokenizer,
        target_tokenizer=target_tokenizer,
        source_bytes=source_bytes,
        target_bytes=target_bytes,
        shared=shared,
        recomputes=loading.low_memory,
        can_move=loading.can_move,
        takes_turns=loading.takes_turns,
        offloading=offloading,
    )


def load_teacher(plan: Plan, loading: Loading = IN_FULL) -> Models:
    """Loads source + LoRA alone, which stands in the place of the target too, for what needs none."""
    source, teacher, tokenizer = _load_teacher(plan, loading)
    spelled = ByteTokenizer.from_tokenizer(tokenizer)
    vocabulary = vocabulary_size(plan.source_config)
    shared = SharedVocabulary.of(spelled, spelled, vocabulary, vocabulary, _ends("source", teacher, tokenizer))
    return Models(
        source=source,
        teacher=teacher,
        target=source,
        source_tokenizer=tokenizer,
        target_tokenizer=tokenizer,
        source_bytes=spelled,
        target_bytes=spelled,
        shared=shared,
    )


def _load_teacher(plan: Plan, loading: Loading) -> tuple[PreTrainedModel, PeftModel, PreTrainedTokenizerFast]:
    """The source, the source with the adapter acting in it, and the tokenizer that the adapter was trained with."""
    source, tokenizer = loading.load(
        plan.source, plan.source_revision, loading.source_bits, plan.source_config.architectures
    )
    trained, of_base = vocabulary_size(plan.source_config), vocabulary_size(source.config)
    if trained != of_base:
        logger.info(
            "The adapter was trained with %d tokens, its base model has %d; the tokenizer in its folder reads them.",
            trained, of_base,
        )  # fmt: skip
        resize_vocabulary(source, plan.source_config)
    teacher = PeftModel.from_pretrained(source, str(plan.adapter.folder)).eval()
    return source, teacher, tokenizer_of(plan.adapter.folder, tokenizer, plan.source_config)


def _ends(side: Side, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    ends = end_tokens_of(model, tokenizer.eos_token_id)
    if len(ends) > 1:
        logger.info(
            "The %s predicts %d tokens as it predicts %r, which ends its texts; each of them counts as that end.",
            side, len(ends) - 1, tokenizer.eos_token,
        )  # fmt: skip
    return ends


def align_text(
    models: BaseModels, passages: Sequence[Passage], recipe: Recipe
) -> tuple[list[AlignedPassage], list[AlignedPassage]]:
    """Passages in both tokenizers, split into training and held-out ones; no variant is held out.

    Raises:
        UserError: too little text has aligned positions.
    """
    in_both = models.source_bytes, models.target_bytes, recipe.max_length, recipe.context_weight
    given = list(align_passages([passage for passage in passages if not passage.is_variant], *in_both))
    variants = list(align_passages([passage for passage in passages if passage.is_variant], *in_both))
    if len(given) < 2:
        raise UserError("Too little of the text has positions where both tokenizers agree; give longer text.")
    held_out = held_out_count(len(given))
    logger.debug("%d of %d passages have positions where both tokenizers agree", len(given + variants), len(passages))
    return (given[:-held_out] + variants)[: recipe.passages], given[-held_out:]


def held_out_count(passages: int) -> int:
    """How many passages at the end of those given are held out."""
    return max(1, min(HELD_OUT_PASSAGES, passages // 5))
