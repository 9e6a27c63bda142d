"""Scores a model on the items of a task: accuracy among choices, or exact match of what it writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from castlora import __version__
from castlora.evaluation.tasks import TaskItem, chat_items
from castlora.lift import bootstrap_interval
from castlora.models.completions import (
    CausalLM,
    completion_log_likelihoods,
    encode_completion,
    generate,
    readable_tokens,
)
from castlora.models.endings import end_tokens_of
from castlora.report import Score
from castlora.text.chat import without_special_tokens

GENERATION_MARGIN = 8
"""New tokens allowed beyond the longest expected completion, so that an answer that runs on is seen to."""


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

    @property
    def summary(self) -> Score:
        """The score as reports show it."""
        return Score(self.score, self.ci95, self.nll)


def evaluate_model(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[TaskItem],
    batch_size: int = 32,
    template: str | None = None,
) -> Evaluation:
    """Scores a model on the items of a task.

    With choices the score is accuracy: the choice with the highest log-likelihood, summed over its tokens, is
    picked. Without, it is exact match of the greedy generation, both sides stripped; the generation ends at an
    end-of-text token or one that the model predicts alike, and at the first newline where the expected completion
    has none. An end-of-text token after a completion counts neither for choices nor for `nll`.

    Args:
        model: with or without an adapter
        tokenizer: its tokenizer
        items: of one task
        batch_size: sequences read at once
        template: chat template in which prompts are read as messages of a user; by default they are read as they are

    Raises:
        UserError: a completion does not fit into the model, the model's log-likelihoods are not finite, or the template
            refuses a message.
    """
    if template is not None:
        items, tokenizer = chat_items(items, tokenizer, template), without_special_tokens(tokenizer)
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
    max_length = readable_tokens(model, tokenizer)
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
    max_length = readable_tokens(model, tokenizer)
    pairs = [encode_completion(tokenizer, item.prompt, item.completion, max_length) for item in items]
    nlls = -completion_log_likelihoods(model, pairs, batch_size)
    longest = max(len(pair.ids) - pair.start for pair in pairs)
    max_new_tokens = min(longest + GENERATION_MARGIN, max_length - 1)
    ends = end_tokens_of(model, tokenizer.eos_token_id)
    texts = generate(model, tokenizer, [item.prompt for item in items], max_new_tokens, batch_size, ends)
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


def scoring_versions() -> dict[str, str]:
    """Versions of the packages that a score depends on."""
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "peft")}
    return {"castlora": __version__, **packages}
