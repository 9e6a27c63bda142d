"""What a model makes of completions: their log-likelihoods after a prompt, and the ones that it writes itself."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from peft import PeftModelForCausalLM
from tqdm.auto import tqdm
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast

from castlora.errors import UserError
from castlora.models.loading import context_length

CausalLM = PreTrainedModel | PeftModelForCausalLM
_BATCH_TOKENS = 8192
"""Keys and values of so many tokens take 4 GiB in a model like Llama-2-7B, which has them for each head."""
_SECONDS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class CompletionTokens:
    """A prompt and its completion, tokenised together."""

    ids: list[int]
    start: int
    """Index of the first token of the completion; at least 1."""


def encode_completion(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str, max_length: int
) -> CompletionTokens:
    """Tokenises prompt and completion as one text; the first token that ends past the prompt begins the completion.

    Neither an end-of-text token nor anything else is added after the completion. A prompt that is too long
    loses its left end but not its begin-of-text token.

    Raises:
        UserError: the completion leaves no room for any prompt.
    """
    ids, ends = _encode(tokenizer, prompt + completion)
    start = next(i for i, end in enumerate(ends) if end > len(prompt))
    if start == 0:
        first = begin_token(tokenizer)
        if first is None:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no begin-of-text token; use a longer prompt.")
        ids, start = [first, *ids], 1
        ends = [0, *ends]
    kept = _drop_left(ids, ends, max_length)
    start -= len(ids) - len(kept)
    if start < 1:
        raise UserError(
            f"The completion {completion[:40]!r} is longer than the {max_length} tokens that the model can read."
        )
    return CompletionTokens(kept, start)


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[int]]:
    """Token ids and the character at which each token ends (0 for special tokens in front of the text)."""
    encoding = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids, ends = list(encoding["input_ids"]), [end for _, end in encoding["offset_mapping"]]
    while ends and ends[-1] == 0:  # an end-of-text token that the tokenizer appends
        ids, ends = ids[:-1], ends[:-1]
    return ids, ends


def begin_token(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token that stands in front of a text, or the one that ends the text before it; None without either."""
    return next((int(token) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), None)


def _drop_left(ids: list[int], ends: list[int], max_length: int) -> list[int]:
    """At most `max_length` tokens: the special tokens in front, then the right end of the text."""
    specials = sum(end == 0 for end in ends)
    surplus = max(len(ids) - max_length, 0)
    return ids[:specials] + ids[specials + surplus :]


def readable_tokens(model: CausalLM, tokenizer: PreTrainedTokenizerFast) -> int:
    """Tokens that the model can read; architectures without position limits leave it to the tokenizer."""
    return min(context_length(model.config), int(tokenizer.model_max_length))


@torch.inference_mode()
def completion_log_likelihoods(model: CausalLM, pairs: Sequence[CompletionTokens], batch_size: int) -> np.ndarray:
    """Log-likelihood of each completion after its prompt, in nats, summed over its tokens; shape (len(pairs),).

    Raises:
        UserError: a log-likelihood is not finite.
    """
    # The last token is predicted, never read: choices of one token after the same prompt are one reading.
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        by_context.setdefault(tuple(pair.ids[:-1]), []).append(index)
    contexts = list(by_context)
    totals = np.zeros(len(pairs))
    for batch in _shown(batches_by_length([len(context) for context in contexts], batch_size), "scores completions"):
        ids, mask = _pad([list(contexts[i]) for i in batch], "right", model.device)
        asked = [(row, index) for row, i in enumerate(batch) for index in by_context[contexts[i]]]
        first = min(pairs[index].start for _, index in asked) - 1
        kept = torch.arange(first, ids.shape[1], device=model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
        log_probabilities = logits.float().log_softmax(-1).cpu()
        for row, index in asked:
            tokens = torch.tensor(pairs[index].ids[pairs[index].start :])
            begin = pairs[index].start - 1 - first
            predicted = log_probabilities[row, begin : begin + len(tokens)]
            totals[index] = float(predicted.gather(-1, tokens[:, None]).double().sum())
    if not np.isfinite(totals).all():
        raise UserError("The model gives log-likelihoods that are not finite; load it in float32 or bfloat16.")
    return totals


def text_loss(
    model: CausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_length: int = 128
) -> float:
    """Mean negative log-likelihood of the tokens of running text, in nats per token.

    Compares what adapters do to the general ability of one base model; its exponential is the perplexity.

    Args:
        model: the model
        tokenizer: its tokenizer
        texts: passages; each has at least two tokens
        max_length: tokens read of each passage
    """
    was_training = model.training
    model.eval()
    try:
        read = [CompletionTokens(_encode(tokenizer, text)[0][:max_length], 1) for text in texts]
        total = completion_log_likelihoods(model, read, batch_size=32).sum()
    finally:
        model.train(was_training)
    return float(-total / sum(len(tokens.ids) - 1 for tokens in read))


@torch.inference_mode()
def generate(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    more_ends: Sequence[int] = (),
) -> list[str]:
    """Greedy continuations of the prompts, up to an end-of-text token; prompts are cut from the left to fit.

    Args:
        model: the model
        tokenizer: its tokenizer
        prompts: to be continued
        max_new_tokens: of the longest continuation
        batch_size: of prompts
        more_ends: tokens that end a text besides those that tokenizer and model name

    Raises:
        UserError: the model cannot generate.
    """
    if not isinstance(model, GenerationMixin | PeftModelForCausalLM):
        raise UserError(f"{type(model).__name__} cannot generate; use a causal language model, or give `choices`.")
    room = readable_tokens(model, tokenizer) - max_new_tokens
    encoded = [_drop_left(*_encode(tokenizer, prompt), room) for prompt in prompts]
    ends = sorted({*end_tokens(model, tokenizer), *more_ends})
    texts = [""] * len(prompts)
    for batch in _shown(batches_by_length([len(ids) for ids in encoded], batch_size), "writes answers"):
        ids, mask = _pad([encoded[i] for i in batch], "left", model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        for i, new in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            answer = list(itertools.takewhile(lambda token: token not in ends, new))
            texts[i] = str(tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return texts


def end_tokens(model: CausalLM, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """End-of-text tokens of the tokenizer and of the model's generation configuration."""
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return sorted(ends - {None})


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, so that a batch too large for memory fails at once.

    Args:
        lengths: in tokens
        batch_size: of texts; fewer where they are so long that what a model keeps of them would not fit beside it
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        end = start + max(1, min(batch_size, _BATCH_TOKENS // longest))
        yield order[start:end]
        start = end


def _shown(batches: Iterable[list[int]], said: str) -> Iterable[list[int]]:
    """The batches, with a bar of their progress where they take long."""
    known = list(batches)
    return tqdm(known, said, unit="batch", leave=False, delay=_SECONDS_WITHOUT_PROGRESS) if len(known) > 1 else known


def _pad(
    rows: Sequence[list[int]], side: Literal["left", "right"], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both of shape (len(rows), longest row)."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids.to(device), mask.to(device)
