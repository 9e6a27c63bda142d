"""Scores a model on a task file, and puts the scores of a transferred adapter into its record."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from castlora.adapters.base import as_trained
from castlora.adapters.files import find_adapter
from castlora.adapters.live import load_adapter
from castlora.adapters.vocabulary import resize_vocabulary, tokenizer_of, with_vocabulary_of
from castlora.config import Bits
from castlora.errors import UserError
from castlora.evaluation.accuracy import Evaluation, evaluate_model, scoring_versions
from castlora.evaluation.measured_tasks import describe_task, skill_of
from castlora.evaluation.tasks import load_task
from castlora.execution.run_directory import check_absent, write_new_file
from castlora.lift import COUNTABLE_GAIN
from castlora.models.completions import CausalLM
from castlora.models.loading import best_device, load_config, load_model, public_name
from castlora.publishing.record import check_record, record_task, warn_of_other_precision
from castlora.report import BARE_TARGET, RETRAINED, TRANSFERRED
from castlora.report.formatting import score_interval
from castlora.text.chat import chat_template


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
        chat: whether prompts are messages of a user, in the chat template of the tokenizer beside the adapter, or else
            of the model, or else in the one that lies beside the adapter alone.
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
    if out is not None:
        check_absent(out)
    items = load_task(task)
    _check_compared(model, adapter, retrained, record, bits)
    loaded, tokenizer = _load_base(model, revision, bits, adapter)
    if adapter is not None:
        folder = find_adapter(adapter)
        resize_vocabulary(loaded, with_vocabulary_of(folder, loaded.config))
        tokenizer = tokenizer_of(folder, tokenizer, loaded.config)
    template = chat_template(tokenizer) if chat else None
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
            anew = load_adapter(_load_base(model, revision, bits, retrained)[0], retrained, model)
            compared[RETRAINED] = evaluate_model(anew, tokenizer, items, batch_size, template)
        described = describe_task(skill_of(Path(task).stem, digest, compared), chat, scoring_versions())
        result |= {"scores": described["scores"], "lift": described["lift"]}
        if record and adapter is not None:
            record_task(Path(adapter), described)
    if out is not None:
        rows = zip(found.scores.tolist(), found.nlls.tolist(), found.predictions, strict=True)
        per_item = [{"score": score, "nll": nll, "prediction": prediction} for score, nll, prediction in rows]
        write_new_file(out, json.dumps({**result, "items": per_item}, indent=1) + "\n")
    return result


def _load_base(
    model: str, revision: str | None, bits: Bits | None, adapter: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A base model, as the class that the adapter was trained on."""
    architectures = None
    if adapter is not None:
        architectures = as_trained(find_adapter(adapter), load_config(model, revision)).architectures
    return load_model(model, revision, best_device(), bits, architectures)


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
