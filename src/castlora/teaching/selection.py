"""Which filled prompts are worth teaching: those from whose answers one could tell the prompts apart.

A prompt format filled with unrelated text asks the teacher about things it was never trained on, and to most of them
it gives the same vague answer. Such prompts teach only how often each answer occurs. The few to which source + LoRA
gives an answer of its own show what the skill looks at, provided that no answer drowns the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from castlora.execution.parts import NOTHING_KEPT, Parts
from castlora.teaching.answers import PromptBatch, prompt_batches
from castlora.text.passages import Passage

_LIKELIEST = 64
_OUTCOMES = 256
_ITERATIONS = 100
_BATCHES_KEPT_TOGETHER = 8


@dataclass(frozen=True)
class FirstTokens:
    """What a model predicts after each of many prompts."""

    prompts: list[Passage]
    ids: Tensor
    """The likeliest next tokens of each prompt, shape (prompts, likeliest)."""
    probabilities: Tensor
    """Their probabilities, shape (prompts, likeliest)."""
    mean: Tensor
    """Mean probability of every token over all prompts, shape (vocabulary,)."""

    def distributions(self) -> Tensor:
        """The next-token distribution of each prompt over the tokens that are likely in the mean, and one rest.

        Returns:
            shape (prompts, outcomes), rows sum to 1
        """
        outcomes = self.mean.topk(min(_OUTCOMES, len(self.mean))).indices
        rest = len(outcomes)
        columns = torch.full_like(self.mean, rest, dtype=torch.long)
        columns[outcomes] = torch.arange(rest)
        table = torch.zeros(len(self.prompts), rest + 1).scatter_add_(1, columns[self.ids], self.probabilities)
        table[:, rest] += 1 - self.probabilities.sum(-1)
        return table.clamp_min(0)


def information_gain(distributions: Tensor, mean: Tensor) -> Tensor:
    """KL divergence of each prompt's next-token distribution from a mean distribution, in nats.

    Where the mean is that of the same prompts, its average is the mutual information between prompt and next token.

    Args:
        distributions: shape (prompts, outcomes)
        mean: shape (outcomes,)

    Returns:
        shape (prompts,)
    """
    tiny = torch.finfo(distributions.dtype).tiny
    log_mean = mean.clamp_min(tiny).log().expand_as(distributions)
    return functional.kl_div(log_mean, distributions, reduction="none").sum(-1)


def most_informative(distributions: Tensor, count: int) -> Tensor:
    """The `count` prompts whose answers tell most about which of them was asked.

    Maximises the mutual information between prompt and next token over distributions on the prompts that give none
    more than 1 / `count`. The objective is concave and its gradient is the information gain, so that Frank-Wolfe
    steps do it: each moves towards the prompts with the largest gain under the mean of the mixture so far, which
    makes answers that are rare in the mixture worth more.

    Args:
        distributions: next-token distribution of each prompt, shape (prompts, outcomes)
        count: prompts to choose, at most all

    Returns:
        indices in ascending order, shape (count,)
    """
    mixture = torch.full((len(distributions),), 1 / len(distributions))
    for step in range(_ITERATIONS):
        gains = information_gain(distributions, mixture @ distributions)
        best = torch.zeros_like(mixture)
        best[gains.argsort(descending=True, stable=True)[:count]] = 1 / count
        mixture = mixture.lerp(best, 2 / (step + 2))
    # Systematic sampling, prompts of like answers side by side, keeps the share that each answer has in the mixture.
    by_answer = distributions.argmax(-1).argsort(stable=True)
    shares = (mixture[by_answer].double() * count).cumsum(0)
    return by_answer[torch.searchsorted(shares, torch.arange(count) + 0.5)].sort().values


def mutual_information(distributions: Tensor) -> float:
    """Mutual information between prompt and next token, in nats, for prompts that are equally likely.

    Args:
        distributions: shape (prompts, outcomes)
    """
    return float(information_gain(distributions, distributions.mean(0)).mean())


@torch.no_grad()
def predict_first_tokens(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Passage],
    max_prompt_tokens: int,
    batch_size: int,
    parts: Parts = NOTHING_KEPT,
) -> FirstTokens:
    """What the model predicts right after each prompt.

    Args:
        model: source + LoRA
        tokenizer: its tokenizer
        prompts: the prompts, without answers
        max_prompt_tokens: longest prompt, in tokens; longer ones are left out
        batch_size: prompts per batch
        parts: keeps the predictions, some batches at a time
    """
    groups = prompt_batches(tokenizer, prompts, max_prompt_tokens, batch_size, next(model.parameters()).device)
    predicted = []
    with tqdm(total=len(groups), desc="source + LoRA reads candidate prompts", unit="batch") as progress:
        for start in range(0, len(groups), _BATCHES_KEPT_TOGETHER):
            some = groups[start : start + _BATCHES_KEPT_TOGETHER]
            asked = [prompt.text for group in some for prompt in group.passages]
            compute = partial(_predict, model, tokenizer, some)
            predicted.append(parts.tensors(f"first-tokens-{start:05d}", asked, compute))
            progress.update(len(some))
    kept = [prompt for group in groups for prompt in group.passages]
    ids, probabilities = (torch.cat([part[name] for part in predicted]) for name in ("ids", "probabilities"))
    mean = torch.stack([part["sum"] for part in predicted]).sum(0) / len(kept)
    return FirstTokens(kept, ids, probabilities, mean.float())


def _predict(model: PeftModel, tokenizer: PreTrainedTokenizerFast, groups: Sequence[PromptBatch]) -> dict[str, Tensor]:
    """The likeliest first tokens after each prompt, and the sum of all distributions."""
    ids, probabilities, total = [], [], torch.zeros((), dtype=torch.float64)
    for group in groups:
        distribution = next_token_probabilities(model, tokenizer, group)
        likeliest = distribution.topk(min(_LIKELIEST, distribution.shape[-1]))
        ids.append(likeliest.indices)
        probabilities.append(likeliest.values)
        total = total + distribution.sum(0, dtype=torch.float64)
    return {"ids": torch.cat(ids), "probabilities": torch.cat(probabilities), "sum": total}


def next_token_probabilities(model: PeftModel, tokenizer: PreTrainedTokenizerFast, batch: PromptBatch) -> Tensor:
    """The distribution of the token after each prompt of a batch, shape (prompts, vocabulary), on the processor."""
    answer = model.generate(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        do_sample=False,
        max_new_tokens=1,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.eos_token_id or 0,
    )
    probabilities: Tensor = answer.logits[0].float().softmax(-1)
    return probabilities.cpu()
