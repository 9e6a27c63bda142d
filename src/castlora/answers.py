"""Answers that the teacher writes after each prompt, so that every token of an answer is taught."""

from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from castlora.text import Passage


@torch.no_grad()
def write_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    max_new_tokens: int,
    max_prompt_tokens: int,
    batch_size: int,
    seed: int,
) -> Iterator[Passage]:
    """Continues each prompt by sampling from the model until it ends the text.

    Prompts are taken longest first, so that a batch has little padding and memory runs out at once
    or never. A prompt longer than `max_prompt_tokens` is left out. Where decoding does not give back
    the prompt as it was, the passage is the prompt alone: what follows it is still taught once.

    Args:
        model: source + LoRA
        tokenizer: its tokenizer
        prompts: what to continue
        max_new_tokens: longest answer, in tokens
        max_prompt_tokens: longest prompt, in tokens
        batch_size: prompts per batch
        seed: of the sampling

    Yields:
        the prompts with their answers
    """
    torch.manual_seed(seed)
    encoded = [(tokenizer(prompt)["input_ids"], prompt) for prompt in prompts]
    kept = sorted((pair for pair in encoded if len(pair[0]) <= max_prompt_tokens), key=lambda pair: -len(pair[0]))
    device = next(model.parameters()).device
    pad = tokenizer.eos_token_id or 0
    for start in tqdm(range(0, len(kept), batch_size), desc="source + LoRA writes answers", unit="batch"):
        group = kept[start : start + batch_size]
        longest = len(group[0][0])
        ids = torch.tensor([[pad] * (longest - len(prompt_ids)) + prompt_ids for prompt_ids, _ in group])
        mask = torch.tensor([[0] * (longest - len(prompt_ids)) + [1] * len(prompt_ids) for prompt_ids, _ in group])
        written = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        for text, (_, prompt) in zip(texts, group, strict=True):
            yield Passage(text if text.startswith(prompt) else prompt, len(prompt.encode()))
