"""Answers that the teacher writes after each prompt, so that every token of an answer is taught."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from castlora.execution.parts import NOTHING_KEPT, Parts
from castlora.models.completions import batches_by_length
from castlora.text.passages import Passage


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the left, ready to be continued."""

    passages: list[Passage]
    """The prompts, without answers."""
    ids: Tensor
    """Shape (prompts, tokens)."""
    mask: Tensor
    """Shape (prompts, tokens); 0 where padded."""


def prompt_batches(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Passage],
    max_prompt_tokens: int,
    batch_size: int,
    device: torch.device,
) -> list[PromptBatch]:
    """Prompts in batches, longest first, so that there is little padding and memory runs out at once or never.

    A prompt longer than `max_prompt_tokens` is left out, and batches of long ones have fewer than `batch_size`.
    """
    # Not verbose: it would warn of prompts that are too long for the model, and no model reads those.
    encoded = [
        (tokenizer(prompt.text, add_special_tokens=not prompt.is_chat, verbose=False)["input_ids"], prompt)
        for prompt in prompts
    ]
    kept = [pair for pair in encoded if len(pair[0]) <= max_prompt_tokens]
    pad = tokenizer.eos_token_id or 0
    groups = []
    for indices in batches_by_length([len(prompt_ids) for prompt_ids, _ in kept], batch_size):
        group = [kept[index] for index in indices]
        longest = len(group[0][0])
        ids = torch.tensor([[pad] * (longest - len(prompt_ids)) + prompt_ids for prompt_ids, _ in group])
        mask = torch.tensor([[0] * (longest - len(prompt_ids)) + [1] * len(prompt_ids) for prompt_ids, _ in group])
        groups.append(PromptBatch([prompt for _, prompt in group], ids.to(device), mask.to(device)))
    return groups


@torch.no_grad()
def write_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Passage],
    ends: Sequence[int],
    max_new_tokens: int,
    max_prompt_tokens: int,
    batch_size: int,
    seed: int,
    parts: Parts = NOTHING_KEPT,
) -> Iterator[Passage]:
    """Continues each prompt by sampling from the model until it ends the text.

    Where the answer cannot be told from the prompt, because the tokens of both together spell another beginning, the
    passage is the prompt alone: what follows it is still taught once.

    Args:
        model: source + LoRA
        tokenizer: its tokenizer
        prompts: what to continue, without answers
        ends: tokens that end an answer; none to write on to its greatest length
        max_new_tokens: longest answer, in tokens
        max_prompt_tokens: longest prompt, in tokens; longer ones are left out
        batch_size: prompts per batch
        seed: of the sampling
        parts: keeps the answers, batch by batch

    Yields:
        the prompts with their answers
    """
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    groups = prompt_batches(tokenizer, prompts, max_prompt_tokens, batch_size, device)
    for index, group in enumerate(tqdm(groups, desc="source + LoRA writes answers", unit="batch")):
        written = parts.json(
            f"answers-{index:05d}",
            [prompt.text for prompt in group.passages],
            partial(_sample_answers, model, tokenizer, group, ends, max_new_tokens),
        )
        # The batches after one that was kept are sampled as if it had just been.
        _set_generator(device, written["generator"])
        for answer, is_cut, prompt in zip(written["answers"], written["cut"], group.passages, strict=True):
            yield replace(prompt, text=prompt.text + answer, is_cut=is_cut)


@torch.no_grad()
def share_that_ends(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    groups: Sequence[PromptBatch],
    ends: Sequence[int],
    max_new_tokens: int,
) -> float:
    """Share of the prompts after which the likeliest answer ends the text within `max_new_tokens` tokens.

    Args:
        model: source + LoRA
        tokenizer: its tokenizer
        groups: the prompts, at least one
        ends: its tokens that end a text
        max_new_tokens: longest answer, in tokens
    """
    ended = []
    for group in groups:
        written = model.generate(
            input_ids=group.ids,
            attention_mask=group.mask,
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id or 0,
            eos_token_id=list(ends) or None,
        )
        answers = written[:, group.ids.shape[1] :]
        ended.append(torch.isin(answers, torch.tensor(ends, device=answers.device)).any(-1))
    return float(torch.cat(ended).float().mean())


def _sample_answers(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, group: PromptBatch, ends: Sequence[int], max_new_tokens: int
) -> dict[str, Any]:
    """Answers to a batch of prompts, and the state in which they leave the generator of random numbers."""
    pad = tokenizer.eos_token_id or 0
    written = model.generate(
        input_ids=group.ids,
        attention_mask=group.mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        # A model may be saved with one, which would change what it learned to say.
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=list(ends) or None,
    )
    # Some of them spell something elsewhere.
    is_new = torch.arange(written.shape[1], device=written.device) >= group.ids.shape[1]
    is_end = is_new & torch.isin(written, torch.tensor(ends, device=written.device))
    written = written.masked_fill(is_end, pad)
    read, texts = (
        tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (group.ids, written)
    )
    answers = [text[len(before) :] if text.startswith(before) else "" for before, text in zip(read, texts, strict=True)]
    cut = (~is_end.any(-1)).tolist()
    return {"answers": answers, "cut": cut, "generator": _generator(group.ids.device)}


def _generator(device: torch.device) -> str:
    """State of the generator that sampling on a device draws from, in hexadecimal."""
    state = torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
    return bytes(state.tolist()).hex()


def _set_generator(device: torch.device, state: str) -> None:
    read = torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8)
    if device.type == "cpu":
        torch.set_rng_state(read)
    else:
        torch.get_device_module(device).set_rng_state(read)
