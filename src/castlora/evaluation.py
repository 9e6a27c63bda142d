"""Scores a model on a task file: accuracy among choices, or exact match of what it writes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from castlora import __version__
from castlora.adapter_files import CONFIG_FILE, find_adapter, read_fields
from castlora.chat import TEMPLATE_FILE, chat_items, chat_template, without_special_tokens
from castlora.completions import (
    CausalLM,
    completion_log_likelihoods,
    encode_completion,
    generate,
    readable_tokens,
)
from castlora.config import Bits
from castlora.errors import UserError, first_line
from castlora.formatting import score_interval
from castlora.lift import COUNTABLE_GAIN, bootstrap_interval, lift_with_interval
from castlora.measured_tasks import describe_task
from castlora.models import LIBRARY_ERRORS, best_device, load_model, public_name
from castlora.patterns import check_patterns
from castlora.record import check_record, record_task, warn_of_other_precision
from castlora.report import BARE_TARGET, RETRAINED, TRANSFERRED, Score, Skill
from castlora.tasks import TaskItem, load_task

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
    end-of-text token, and at the first newline where the expected completion has none. An end-of-text token
    after a completion counts neither for choices nor for `nll`.

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


def evaluate(
    model: str,
    task: str,
    adapter: str | None = None,
    out: str | None = None,
    batch_size: int = 32,
    revision: str | None = None,
    chat: bool = False,
    retrained: str | None = None,
    record: bool = False,
    bits: Bits | None = None,
) -> dict[str, Any]:
    """Scores a model, with or without an adapter, on a task file.

    Args:
        model: hub id or folder of the base model.
        task: JSON lines with `prompt`, `completion` and optional `choices`.
        adapter: hub id or folder of a PEFT adapter for the model.
        out: JSON file to write; beside the result it holds `items`: score, nll and prediction of each item.
        batch_size: sequences read at once.
        revision: revision of the model on the hub.
        chat: whether prompts are messages of a user, in the chat template of the model, or of the adapter's folder
            where the model has none.
        retrained: hub id or folder of an adapter that was trained on the task for the model; with it and the bare model
            the lift of `adapter` is measured.
        record: whether the scores, those of the bare model included, go into the manifest, the model card and the
            report of `adapter`, a folder that `castlora.transfer` wrote.
        bits: 4 (NF4) or 8, for a model whose layers are quantized by bitsandbytes.

    Returns:
        metric, score, n, ci95, nll, and what was scored: model, revision, bits, adapter, task, chat, task_sha256,
        versions.
        With `retrained` or `record` also scores, by what was scored, and with `retrained` the lift.

    Raises:
        UserError: the task file is malformed, an adapter does not fit the model, or nothing can be recorded.
    """
    items = load_task(task)
    _check_compared(model, adapter, retrained, record, bits)
    loaded, tokenizer = load_model(model, revision, best_device(), bits)
    template = _template(tokenizer, adapter) if chat else None
    compared: dict[str, Evaluation] = {}
    if retrained is not None or record:
        compared[BARE_TARGET] = evaluate_model(loaded, tokenizer, items, batch_size, template)
    scored: CausalLM = loaded if adapter is None else load_adapter(loaded, adapter, model)
    found = evaluate_model(scored, tokenizer, items, batch_size, template)
    digest = hashlib.sha256(Path(task).read_bytes()).hexdigest()
    result = {
        "metric": found.metric,
        "score": found.score,
        "n": found.n,
        "ci95": list(found.ci95),
        "nll": found.nll,
        "model": public_name(model),
        "revision": revision,
        "bits": bits,
        "adapter": adapter and public_name(adapter),
        "task": Path(task).name,
        "chat": chat,
        "task_sha256": digest,
        "versions": scoring_versions(),
    }
    if compared:
        compared[TRANSFERRED] = found
        # An adapter changes the model in place: the other one needs it anew, and memory holds it once.
        del scored, loaded
        if retrained is not None:
            anew = load_adapter(load_model(model, revision, best_device(), bits)[0], retrained, model)
            compared[RETRAINED] = evaluate_model(anew, tokenizer, items, batch_size, template)
        described = describe_task(skill_of(Path(task).stem, digest, compared), chat, scoring_versions())
        result |= {"scores": described["scores"], "lift": described["lift"]}
        if record and adapter is not None:
            record_task(Path(adapter), described)
    if out is not None:
        rows = zip(found.scores.tolist(), found.nlls.tolist(), found.predictions, strict=True)
        per_item = [{"score": score, "nll": nll, "prediction": prediction} for score, nll, prediction in rows]
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps({**result, "items": per_item}, indent=1) + "\n", encoding="utf-8")
    return result


def describe(result: Mapping[str, Any]) -> str:
    """The result of `evaluate` as text."""
    low, high = result["ci95"]
    lines = [
        f"{result['metric']} {result['score']:.3f} [{low:.3f}, {high:.3f}]  nll {result['nll']:.3f}  n {result['n']}"
    ]
    others = {name: found for name, found in result.get("scores", {}).items() if name != TRANSFERRED}
    lines += [f"{name} {found['score']:.3f}" for name, found in others.items()]
    lift = result.get("lift")
    if lift and lift["countable"]:
        lines.append(f"lift {lift['value']:.3f} {score_interval(lift['ci95'])}".rstrip())
    elif lift:
        lines.append(f"no lift: retraining gains less than {COUNTABLE_GAIN:.2f}")
    return "\n".join(lines)


def _check_compared(model: str, adapter: str | None, retrained: str | None, record: bool, bits: Bits | None) -> None:
    """Raises a UserError before anything is loaded if what is to be compared or recorded cannot be."""
    if adapter is None and (retrained is not None or record):
        option = "--record" if record else "--retrained"
        raise UserError(f"{option} is about an adapter; give one with --adapter.")
    if retrained is not None:
        find_adapter(retrained)
    if adapter is not None and record:
        check_record(adapter, model, bits)
    elif adapter is not None:
        warn_of_other_precision(adapter, bits)


def skill_of(name: str, sha256: str, evaluations: Mapping[str, Evaluation]) -> Skill:
    """What models reached on one task, with the lift where both ends of its scale were scored.

    Args:
        name: of the task
        sha256: digest of the task file
        evaluations: by model: BARE_TARGET, TRANSFERRED, and others as far as they were scored
    """
    scores = {model: found.summary for model, found in evaluations.items()}
    transferred, retrained = evaluations[TRANSFERRED], evaluations.get(RETRAINED)
    lift = None
    if retrained is not None:
        lift = lift_with_interval(evaluations[BARE_TARGET].scores, transferred.scores, retrained.scores)
    return Skill(name, scores, lift, transferred.metric, transferred.n, sha256)


def _template(tokenizer: PreTrainedTokenizerFast, adapter: str | None) -> str:
    beside = Path(adapter or "") / TEMPLATE_FILE
    if tokenizer.chat_template is None and adapter is not None and beside.is_file():
        return beside.read_text(encoding="utf-8")
    return chat_template(tokenizer)


def load_adapter(base: PreTrainedModel, adapter: str, model: str) -> PeftModelForCausalLM:
    """Applies an adapter to its base model.

    Args:
        base: the base model; PEFT changes it in place
        adapter: folder or hub id
        model: what the user called the base model

    Raises:
        UserError: the adapter cannot be loaded or does not fit.
    """
    folder = str(find_adapter(adapter))
    read_fields(adapter, Path(folder) / CONFIG_FILE)
    try:
        config = PeftConfig.from_pretrained(folder)
    except LIBRARY_ERRORS as error:
        raise UserError(f"{adapter}: its configuration is not one of PEFT ({first_line(error)}).") from error
    if isinstance(config, LoraConfig) and config.megatron_config:
        # PEFT would import the Python module that such a configuration names.
        raise UserError(f"{adapter}: megatron_config is set; only adapters without it can be scored.")
    check_patterns(adapter, config, [name for name, _ in base.named_modules()])
    try:
        adapted = PeftModel.from_pretrained(base, folder, config=config)
    except LIBRARY_ERRORS as error:  # modules or shapes that the model does not have
        raise UserError(f"{adapter}: cannot be loaded as an adapter of {model} ({first_line(error)}).") from error
    if not isinstance(adapted, PeftModelForCausalLM):
        task_type = adapted.peft_config["default"].task_type
        raise UserError(f"{adapter}: its task_type is {task_type}; only CAUSAL_LM adapters can be scored.")
    return adapted


def scoring_versions() -> dict[str, str]:
    """Versions of the packages that a score depends on."""
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "peft")}
    return {"castlora": __version__, **packages}
