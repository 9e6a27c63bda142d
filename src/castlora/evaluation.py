"""Scores a model on a task file: accuracy among choices, or exact match of what it writes."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel, PeftModelForCausalLM
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast

from castlora import __version__
from castlora.errors import UserError
from castlora.lift import bootstrap_interval
from castlora.models import load_model, public_name
from castlora.tasks import TaskItem, load_task

CausalLM = PreTrainedModel | PeftModelForCausalLM

GENERATION_MARGIN = 8
"""New tokens allowed beyond the longest expected completion, so that an answer that runs on is seen to."""


@dataclass(frozen=True)
class CompletionTokens:
    """A prompt and its completion, tokenised together."""

    ids: list[int]
    start: int
    """Index of the first token of the completion; at least 1."""


@dataclass(frozen=True)
class Evaluation:
    """The score of a model on a task."""

    metric: Literal["accuracy", "exact_match"]
    score: float
    n: int
    ci95: tuple[float, float]
    nll: float
    """Mean negative log-likelihood of the right completion, in nats: summed over its tokens, averaged over items."""
    scores: np.ndarray
    """Score of each item, 0 or 1, shape (n,)."""
    nlls: np.ndarray
    """Negative log-likelihood of each right completion in nats, shape (n,)."""
    predictions: list[str]
    """The picked choice, or the generated text, of each item."""


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
        ids, start = [_begin_token(tokenizer), *ids], 1
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


def _begin_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that stands in front of a text, for a completion that has no token before it."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no begin-of-text token; use a longer prompt.")


def _drop_left(ids: list[int], ends: list[int], max_length: int) -> list[int]:
    """At most `max_length` tokens: the special tokens in front, then the right end of the text."""
    specials = sum(end == 0 for end in ends)
    surplus = max(len(ids) - max_length, 0)
    return ids[:specials] + ids[specials + surplus :]


def evaluate_model(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[TaskItem],
    batch_size: int = 32,
) -> Evaluation:
    """Scores a model on the items of a task.

    With choices the score is accuracy: the choice with the highest log-likelihood, summed over its tokens, is
    picked. Without, it is exact match of the greedy generation, both sides stripped; the generation ends at an
    end-of-text token, and at the first newline where the expected completion has none. An end-of-text token
    after a completion counts neither for choices nor for `nll`.

    Raises:
        UserError: a completion does not fit into the model, or the model's log-likelihoods are not finite.
    """
    was_training = model.training
    model.eval()
    try:
        if items[0].choices is None:
            return _evaluate_generation(model, tokenizer, items, batch_size)
        return _evaluate_choices(model, tokenizer, items, batch_size)
    finally:
        model.train(was_training)


def _evaluate_choices(
    model: CausalLM, tokenizer: PreTrainedTokenizerFast, items: Sequence[TaskItem], batch_size: int
) -> Evaluation:
    return judge_choices(items, choice_log_likelihoods(model, tokenizer, items, batch_size))


def choice_log_likelihoods(
    model: CausalLM, tokenizer: PreTrainedTokenizerFast, items: Sequence[TaskItem], batch_size: int = 32
) -> list[np.ndarray]:
    """Log-likelihood of each choice of each item after its prompt, in nats, summed over tokens: (choices,) per item."""
    max_length = _max_length(model, tokenizer)
    pairs = [
        encode_completion(tokenizer, item.prompt, choice, max_length) for item in items for choice in item.choices or ()
    ]
    flat = completion_log_likelihoods(model, pairs, batch_size)
    ends = np.cumsum([len(item.choices or ()) for item in items])
    return np.split(flat, ends[:-1])


def judge_choices(items: Sequence[TaskItem], log_likelihoods: Sequence[np.ndarray]) -> Evaluation:
    """Accuracy of picking the likeliest choice.

    Args:
        items: items with choices
        log_likelihoods: of each item's choices, in nats, shape (choices,)
    """
    picked: list[str] = []
    nlls = np.empty(len(items))
    for i, (item, of_choices) in enumerate(zip(items, log_likelihoods, strict=True)):
        choices = item.choices or ()
        picked.append(choices[int(of_choices.argmax())])
        nlls[i] = -of_choices[choices.index(item.completion)]
    scores = np.array([float(choice == item.completion) for choice, item in zip(picked, items, strict=True)])
    return _summarise("accuracy", scores, nlls, picked)


def _evaluate_generation(
    model: CausalLM, tokenizer: PreTrainedTokenizerFast, items: Sequence[TaskItem], batch_size: int
) -> Evaluation:
    max_length = _max_length(model, tokenizer)
    pairs = [encode_completion(tokenizer, item.prompt, item.completion, max_length) for item in items]
    nlls = -completion_log_likelihoods(model, pairs, batch_size)
    longest = max(len(pair.ids) - pair.start for pair in pairs)
    max_new_tokens = min(longest + GENERATION_MARGIN, max_length - 1)
    texts = generate(model, tokenizer, [item.prompt for item in items], max_new_tokens, batch_size)
    for i, item in enumerate(items):
        if "\n" not in item.completion.strip():
            texts[i] = texts[i].partition("\n")[0]
        texts[i] = texts[i].strip()
    scores = np.array([float(text == item.completion.strip()) for text, item in zip(texts, items, strict=True)])
    return _summarise("exact_match", scores, nlls, texts)


def _summarise(
    metric: Literal["accuracy", "exact_match"], scores: np.ndarray, nlls: np.ndarray, predictions: list[str]
) -> Evaluation:
    return Evaluation(
        metric=metric,
        score=float(scores.mean()),
        n=len(scores),
        ci95=bootstrap_interval(scores),
        nll=float(nlls.mean()),
        scores=scores,
        nlls=nlls,
        predictions=predictions,
    )


def _max_length(model: CausalLM, tokenizer: PreTrainedTokenizerFast) -> int:
    """Tokens that the model can read; architectures without position limits leave it to the tokenizer."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
    return int(min(limit, tokenizer.model_max_length))


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
    for batch in _batches_by_length([len(context) for context in contexts], batch_size):
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
) -> list[str]:
    """Greedy continuations of the prompts, up to an end-of-text token; prompts are cut from the left to fit.

    Raises:
        UserError: the model cannot generate.
    """
    if not isinstance(model, GenerationMixin | PeftModelForCausalLM):
        raise UserError(f"{type(model).__name__} cannot generate; use a causal language model, or give `choices`.")
    room = _max_length(model, tokenizer) - max_new_tokens
    encoded = [_drop_left(*_encode(tokenizer, prompt), room) for prompt in prompts]
    ends = _end_tokens(model, tokenizer)
    texts = [""] * len(prompts)
    for batch in _batches_by_length([len(ids) for ids in encoded], batch_size):
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


def _end_tokens(model: CausalLM, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """End-of-text tokens of the tokenizer and of the model's generation configuration."""
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return sorted(ends - {None})


def _batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, so that a batch too large for memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))


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


def evaluate(
    model: str,
    task: str,
    adapter: str | None = None,
    out: str | None = None,
    batch_size: int = 32,
    revision: str | None = None,
) -> dict[str, Any]:
    """Scores a model, with or without an adapter, on a task file.

    Args:
        model: hub id or folder of the base model.
        task: JSON lines with `prompt`, `completion` and optional `choices`.
        adapter: hub id or folder of a PEFT adapter for the model.
        out: JSON file to write; beside the result it holds `items`: score, nll and prediction of each item.
        batch_size: sequences read at once.
        revision: revision of the model on the hub.

    Returns:
        metric, score, n, ci95, nll, and what was scored: model, revision, adapter, task, task_sha256, versions.

    Raises:
        UserError: the task file is malformed, or the adapter does not fit the model.
    """
    items = load_task(task)
    loaded, tokenizer = load_model(model, revision=revision)
    scored: CausalLM = loaded if adapter is None else load_adapter(loaded, adapter, model)
    result = evaluate_model(scored, tokenizer, items, batch_size)
    record = {
        "metric": result.metric,
        "score": result.score,
        "n": result.n,
        "ci95": list(result.ci95),
        "nll": result.nll,
        "model": public_name(model),
        "revision": revision,
        "adapter": adapter and public_name(adapter),
        "task": Path(task).name,
        "task_sha256": hashlib.sha256(Path(task).read_bytes()).hexdigest(),
        "versions": _versions(),
    }
    if out is not None:
        rows = zip(result.scores.tolist(), result.nlls.tolist(), result.predictions, strict=True)
        per_item = [{"score": score, "nll": nll, "prediction": prediction} for score, nll, prediction in rows]
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps({**record, "items": per_item}, indent=1) + "\n", encoding="utf-8")
    return record


def load_adapter(base: PreTrainedModel, adapter: str, model: str) -> PeftModelForCausalLM:
    """Applies an adapter to its base model.

    Args:
        base: the base model; PEFT changes it in place
        adapter: folder or hub id
        model: what the user called the base model

    Raises:
        UserError: the adapter cannot be loaded or does not fit.
    """
    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise UserError(f"{adapter}: no adapter_model.safetensors in this folder; name a folder with a PEFT adapter.")
    try:
        adapted = PeftModel.from_pretrained(base, adapter)
    except (ValueError, RuntimeError) as error:  # no such adapter; modules or shapes that the model does not have
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{adapter}: cannot be loaded as an adapter of {model} ({reason}).") from error
    if not isinstance(adapted, PeftModelForCausalLM):
        task_type = adapted.peft_config["default"].task_type
        raise UserError(f"{adapter}: its task_type is {task_type}; only CAUSAL_LM adapters can be scored.")
    return adapted


def _versions() -> dict[str, str]:
    """Versions of the packages that a score depends on."""
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "peft")}
    return {"castlora": __version__, **packages}
