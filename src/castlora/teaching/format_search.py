"""Which prompt formats an adapter listens to, found by asking it.

Where the format of its prompts is not known, general text can be put into many. In most of them the adapter's answer
is vague, or none at all, and nothing of the skill shows. In the format of its training, or one that ends alike, it
answers with certainty, and differently to different texts, which the base model alone does not, and it comes to an
end, as in its training.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from castlora.alignment.tokens import ByteTokenizer
from castlora.execution.parts import NOTHING_KEPT, Parts
from castlora.teaching.answers import PromptBatch, prompt_batches, share_that_ends
from castlora.teaching.selection import next_token_probabilities
from castlora.text.passages import GENERIC_FORMATS, SLOT, Passage

logger = logging.getLogger("castlora")

FILLINGS = 64
"""Texts that a format is tried on."""
_FIRST_FILLINGS = 16
_SHORTLIST = 32
_MOST_KEPT = 8
_LEAST_SHARE_OF_BEST = 0.8
# People ask in the generic formats more often than the text ends a line in any other way.
_LEAST_SHARE_OF_BEST_IF_GENERIC = 0.5


def settled_share(distributions: Tensor, vocabulary: int) -> float:
    """Share of the uncertainty about the next token that the prompt settles.

    This is the uncertainty coefficient, mutual information over entropy, for prompts that are equally likely.

    Args:
        distributions: next-token distribution of each prompt, shape (prompts, outcomes); the last outcome stands for
            tokens that are no answer, and counts as if it were spread evenly over the vocabulary
        vocabulary: number of tokens
    """
    rest = float(distributions[:, -1].mean()) * math.log(vocabulary)
    conditional = float(torch.special.entr(distributions).sum(-1).mean()) + rest
    marginal = float(torch.special.entr(distributions.mean(0)).sum()) + rest
    return (marginal - conditional) / marginal if marginal > 0 else 0.0


def may_begin_answer(tokenizer: ByteTokenizer, ends: Sequence[int], vocabulary: int, inside_word: bool) -> Tensor:
    """Which tokens can be the first of an answer: those that spell something and do not lengthen the last word.

    Args:
        tokenizer: the source's tokenizer
        ends: tokens that end a text instead
        vocabulary: columns of the source's logits
        inside_word: whether the prompt ends in a letter or digit

    Returns:
        boolean, shape (vocabulary,)
    """
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    for token, spelling in enumerate(tokenizer.spellings[:vocabulary]):
        if spelling:
            allowed[token] = not (inside_word and spelling.decode(errors="ignore")[:1].isalnum())
    allowed[list(ends)] = False
    return allowed


def settled_effect(adapted: Tensor, bare: Tensor, answers: Tensor) -> float:
    """What the adapter changes in its first token, in nats, as far as the prompt decides it.

    The KL divergence from the prediction without the adapter, times the share of the uncertainty that the prompt
    settles.

    Args:
        adapted: next-token distribution of each prompt with the adapter, shape (prompts, vocabulary)
        bare: the same without it, shape (prompts, vocabulary)
        answers: which tokens may begin an answer, boolean, shape (vocabulary,); what changes in the others is no effect
    """
    vocabulary = adapted.shape[-1]
    adapted, bare = adapted[:, answers], bare[:, answers]
    tiny = torch.finfo(bare.dtype).tiny
    effect = float((torch.xlogy(adapted, adapted) - torch.xlogy(adapted, bare.clamp_min(tiny))).sum(-1).mean())
    rest = (1 - adapted.sum(-1, keepdim=True)).clamp_min(0)
    return max(effect, 0.0) * settled_share(torch.cat([adapted, rest], dim=-1), vocabulary)


@dataclass(frozen=True)
class _Asked:
    """Source + LoRA, asked in prompt formats."""

    teacher: PeftModel
    tokenizer: PreTrainedTokenizerFast
    answers: Mapping[bool, Tensor]
    """Which tokens can be the first of an answer, by whether the prompt ends inside a word."""
    ends: Sequence[int]
    max_prompt_tokens: int
    max_answer_tokens: int

    def effect(self, form: str, texts: Sequence[str]) -> float:
        """What the adapter changes in its first token, as far as the text decides it; none where no prompt fits."""
        groups = self._prompts(form, texts)
        if not groups:
            return 0.0
        adapted = self._predicted(groups)
        with self.teacher.disable_adapter():
            bare = self._predicted(groups)
        return settled_effect(adapted, bare, self.answers[form[-1].isalnum()])

    def share_that_ends(self, form: str, texts: Sequence[str]) -> float:
        """Share of the likeliest answers that end in time; none where no prompt fits."""
        groups = self._prompts(form, texts)
        return (
            share_that_ends(self.teacher, self.tokenizer, groups, self.ends, self.max_answer_tokens) if groups else 0.0
        )

    def _prompts(self, form: str, texts: Sequence[str]) -> list[PromptBatch]:
        prompts = [Passage(form.replace(SLOT, text)) for text in texts]
        device = next(self.teacher.parameters()).device
        return prompt_batches(self.tokenizer, prompts, self.max_prompt_tokens, len(prompts), device)

    def _predicted(self, groups: Sequence[PromptBatch]) -> Tensor:
        return torch.cat([next_token_probabilities(self.teacher, self.tokenizer, group) for group in groups])


def tokens_to_search(formats: int, prompt_tokens: int, answer_tokens: int) -> int:
    """How many tokens the source reads and writes at most in `find_formats`.

    Args:
        formats: that are tried
        prompt_tokens: of a filled format
        answer_tokens: of the longest answer
    """
    again = _SHORTLIST + len(GENERIC_FORMATS)
    # Each prompt is read with the adapter and without it.
    read = 2 * prompt_tokens * (formats * _FIRST_FILLINGS + again * FILLINGS)
    return read + again * _FIRST_FILLINGS * (prompt_tokens + answer_tokens)


@torch.no_grad()
def find_formats(
    teacher: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    byte_tokenizer: ByteTokenizer,
    ends: Sequence[int],
    formats: Sequence[str],
    fillings: Sequence[str],
    max_prompt_tokens: int,
    max_answer_tokens: int,
    parts: Parts = NOTHING_KEPT,
) -> list[str]:
    """The formats in which the adapter has the largest effect that depends on the text, and in which answers end.

    Every format is tried on a few texts, and the best of them and the generic ones on all.

    Args:
        teacher: source + LoRA
        tokenizer: its tokenizer
        byte_tokenizer: the same tokenizer, with the bytes of each token
        ends: its tokens that end a text
        formats: formats to try, each with a `{text}` slot
        fillings: texts for the slot
        max_prompt_tokens: longest prompt, in tokens; longer ones are left out
        max_answer_tokens: longest answer, in tokens
        parts: keeps the effect in each format, and how many answers end there

    Returns:
        the best format, up to seven that come near it, and the generic ones that come half as near; none where the
        adapter has no such effect in any
    """
    vocabulary = teacher.config.get_text_config().vocab_size
    answers = {inside: may_begin_answer(byte_tokenizer, ends, vocabulary, inside) for inside in (True, False)}
    asked = _Asked(teacher, tokenizer, answers, ends, max_prompt_tokens, max_answer_tokens)

    def each(
        stage: str,
        measure: Callable[[str, Sequence[str]], float],
        forms: Sequence[str],
        texts: Sequence[str],
        said: str,
    ) -> dict[str, float]:
        return {
            form: parts.json(f"{stage}-{index:05d}", [form, *texts], partial(measure, form, texts))
            for index, form in enumerate(tqdm(forms, desc=said, unit="format"))
        }

    few = fillings[:_FIRST_FILLINGS]
    first = each("format", asked.effect, formats, few, "source + LoRA tries prompt formats")
    shortlist = sorted(first, key=lambda form: -first[form])[:_SHORTLIST]
    again = list(dict.fromkeys([*shortlist, *(form for form in formats if form in GENERIC_FORMATS)]))
    final = each("format-again", asked.effect, again, fillings, "the best of them again")
    heard = [form for form in again if final[form] > 0]
    shares = each("format-ends", asked.share_that_ends, heard, few, "source + LoRA answers in them")
    found = near_best(discounted(final, shares))
    described = ", ".join(f"{form!r} ({final[form]:.2f})" for form in found) or "none"
    logger.info("Prompt formats that the adapter listens to, with its effect there in nats: %s", described)
    return found


def discounted(effects: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, float]:
    """Effects, less what answers end less often than in the format where most of them do.

    Args:
        effects: effect of the adapter by format, in nats
        shares: share of the answers that end, for some of these formats
    """
    most = max(shares.values(), default=0.0)
    return {form: effects[form] * (1 - (most - share)) for form, share in shares.items()}


def near_best(effects: Mapping[str, float]) -> list[str]:
    """The formats with the largest effects, best first: up to eight, and the generic ones that reach half of the best.

    Args:
        effects: effect of the adapter by format, in nats
    """
    best = sorted((form for form in effects if effects[form] > 0), key=lambda form: -effects[form])
    most = effects[best[0]] if best else 0.0
    kept = [form for form in best if effects[form] >= _LEAST_SHARE_OF_BEST * most][:_MOST_KEPT]
    generic = [form for form in best if form in GENERIC_FORMATS and form not in kept]
    return kept + [form for form in generic if effects[form] >= _LEAST_SHARE_OF_BEST_IF_GENERIC * most]
