"""What source + LoRA, the bare target and the transferred one write after held-out prompts, side by side."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from peft import PeftModel
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from castlora.lift import bootstrap_interval
from castlora.model_pair import Models
from castlora.models.completions import generate
from castlora.text.chat import without_special_tokens
from castlora.text.passages import Passage

logger = logging.getLogger("castlora")

_BATCH = 32


@dataclass(frozen=True)
class Imitation:
    """Greedy answers of three models to the same prompts."""

    prompts: list[str]
    """As the source reads them."""
    teacher: list[str]
    """What source + LoRA writes."""
    bare: list[str]
    transferred: list[str]

    @property
    def same_before(self) -> float:
        """Share of prompts after which the bare target writes what source + LoRA writes."""
        return float(_same(self.teacher, self.bare).mean())

    @property
    def same_after(self) -> float:
        """The same share for the transferred target."""
        return float(_same(self.teacher, self.transferred).mean())

    @property
    def same_by_chance(self) -> float | None:
        """The same share where each answer is held against those to the other prompts; None where there are none.

        A target that had learned which answers occur, and not from what they follow, would do no better.
        """
        count = len(self.prompts)
        if count < 2:
            return None
        teacher = Counter(answer.strip() for answer in self.teacher)
        alike = sum(teacher[answer.strip()] for answer in self.transferred)
        return float((alike - _same(self.teacher, self.transferred).sum()) / (count * (count - 1)))

    @property
    def ci95(self) -> tuple[float, float]:
        """Bootstrap interval of `same_after` over prompts."""
        return bootstrap_interval(_same(self.teacher, self.transferred))


def compare_answers(
    models: Models, student: PeftModel, passages: Sequence[Passage], max_new_tokens: int
) -> Imitation | None:
    """Lets three models answer the prompts of held-out passages.

    Args:
        models: both models; the source has its adapter acting in it, the target the student's update
        student: the PEFT model around the target, which can switch the update off
        passages: held-out text; passages without a prompt are left out
        max_new_tokens: longest answer, in tokens

    Returns:
        the answers; None where the text has no prompts
    """
    asked = [passage for passage in passages if passage.answer_start]
    if not asked:
        return None
    in_source = [passage.prompt for passage in asked]
    in_target = [passage.target_prompt or prompt for passage, prompt in zip(asked, in_source, strict=True)]

    def answers(
        model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], more_ends: Sequence[int] = ()
    ) -> list[str]:
        reads = without_special_tokens(tokenizer) if asked[0].is_chat else tokenizer
        return generate(model, reads, prompts, max_new_tokens, _BATCH, more_ends)

    models.use("source")
    teacher = answers(models.source, models.source_tokenizer, in_source, models.shared.source_ends)
    models.use("target")
    with parametrize.cached():
        transferred = answers(models.target, models.target_tokenizer, in_target, models.shared.target_ends)
    with student.disable_adapter():
        bare = answers(models.target, models.target_tokenizer, in_target, models.shared.target_ends)
    imitation = Imitation(in_source, teacher, bare, transferred)
    logger.info(
        "After %d held-out prompts the target writes what source + LoRA writes: %.0f %% bare, %.0f %% with the adapter",
        len(asked), 100 * imitation.same_before, 100 * imitation.same_after,
    )  # fmt: skip
    return imitation


def _same(left: Sequence[str], right: Sequence[str]) -> np.ndarray:
    return np.array([float(one.strip() == other.strip()) for one, other in zip(left, right, strict=True)])
