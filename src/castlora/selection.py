"""Which filled prompts are worth teaching: those whose answer says most about the prompt.

A prompt format filled with unrelated text asks the teacher about things it was never trained on, and to most of them
it gives the same vague answer. Such prompts teach only how often each answer occurs. The few to which source + LoRA
gives an answer of its own show what the skill looks at.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from castlora.answers import prompt_batches

_LIKELIEST = 64


@dataclass(frozen=True)
class FirstTokens:
    """What a model predicts after each of many prompts."""

    prompts: list[str]
    ids: Tensor
    """The likeliest next tokens of each prompt, shape (prompts, likeliest)."""
    probabilities: Tensor
    """Their probabilities, shape (prompts, likeliest)."""
    mean: Tensor
    """Mean probability of every token over all prompts, shape (vocabulary,)."""


def information_gain(first_tokens: FirstTokens) -> Tensor:
    """KL divergence of each prompt's next-token distribution from the mean over all prompts, in nats.

    Its mean is the mutual information between prompt and next token. The tokens outside a prompt's likeliest count
    as one outcome, which makes each value a lower bound.

    Returns:
        shape (prompts,)
    """
    tiny = torch.finfo(first_tokens.probabilities.dtype).tiny
    mean = first_tokens.mean[first_tokens.ids]
    outcomes = torch.cat([first_tokens.probabilities, 1 - first_tokens.probabilities.sum(-1, keepdim=True)], dim=-1)
    expected = torch.cat([mean, 1 - mean.sum(-1, keepdim=True)], dim=-1)
    return (outcomes * (outcomes.clamp_min(tiny).log() - expected.clamp_min(tiny).log())).sum(-1)


@dataclass(frozen=True)
class Selection:
    """The prompts that were chosen, in the order in which they were given."""

    prompts: list[str]
    information: float
    """Mean information gain of the chosen prompts, in nats."""
    information_of_all: float
    """Mean information gain of all prompts, in nats."""


def most_informative(first_tokens: FirstTokens, count: int) -> Selection:
    """The `count` prompts with the largest information gain."""
    gains = information_gain(first_tokens)
    chosen = gains.argsort(descending=True, stable=True)[:count].sort().values
    prompts = [first_tokens.prompts[index] for index in chosen.tolist()]
    return Selection(prompts, float(gains[chosen].mean()), float(gains.mean()))


@torch.no_grad()
def predict_first_tokens(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    max_prompt_tokens: int,
    batch_size: int,
) -> FirstTokens:
    """What the model predicts right after each prompt.

    Args:
        model: source + LoRA
        tokenizer: its tokenizer
        prompts: the prompts
        max_prompt_tokens: longest prompt, in tokens; longer ones are left out
        batch_size: prompts per batch
    """
    groups = prompt_batches(tokenizer, prompts, max_prompt_tokens, batch_size, next(model.parameters()).device)
    kept, ids, probabilities, sums = [], [], [], []
    for group in tqdm(groups, desc="source + LoRA reads candidate prompts", unit="batch"):
        answer = model.generate(
            input_ids=group.ids,
            attention_mask=group.mask,
            do_sample=False,
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=tokenizer.eos_token_id or 0,
        )
        distribution = answer.logits[0].float().softmax(-1).cpu()
        likeliest = distribution.topk(min(_LIKELIEST, distribution.shape[-1]))
        kept += group.prompts
        ids.append(likeliest.indices)
        probabilities.append(likeliest.values)
        sums.append(distribution.sum(0))
    return FirstTokens(kept, torch.cat(ids), torch.cat(probabilities), torch.stack(sums).sum(0) / len(kept))
