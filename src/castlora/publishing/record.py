"""What a finished run says about itself: the manifest, the model card and the report."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from castlora.adapters.files import find_adapter
from castlora.config import Bits
from castlora.errors import UserError, first_line
from castlora.evaluation.imitation import Imitation
from castlora.evaluation.measured_tasks import read_task
from castlora.execution.run_directory import write_whole
from castlora.publishing.card import add_scores, write_card
from castlora.publishing.licences import CARD_FILE
from castlora.publishing.names import public_name
from castlora.publishing.runs import DETAILS_FILE, MANIFEST_FILE, TASKS, RunDetails, read_run, run_report, task_skills
from castlora.report import (
    BARE_TARGET,
    SOURCE_LORA,
    TRANSFERRED,
    ChangedText,
    Sample,
    Similarity,
    render_report,
    write_report,
)

logger = logging.getLogger("castlora")

REPORT_FILE = "report.html"
_SAMPLES = 6


def write_record(
    folder: Path,
    manifest: dict[str, Any],
    log: list[dict[str, float]],
    imitation: Imitation | None,
    changes: Sequence[ChangedText],
    similarity: Similarity,
) -> None:
    """Writes the manifest, the card and the report of a finished run beside its adapter.

    Args:
        folder: where the adapter lies
        manifest: the record of the run
        log: of the training
        imitation: what the models write after held-out prompts, where there are any
        changes: what the adapters change in held-out text
        similarity: how alike the bare models are at paired places
    """
    write_whole(folder / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")
    write_card(folder, manifest, task_skills(manifest))
    files = sorted([*(path.name for path in folder.iterdir()), DETAILS_FILE, REPORT_FILE])
    details = RunDetails(log, report_samples(imitation), changes, files, similarity)
    write_whole(folder / DETAILS_FILE, details.to_json())
    write_report(run_report(manifest, details), folder / REPORT_FILE)


def check_record(folder: str, model: str, bits: Bits | None) -> None:
    """Raises a UserError unless scores of `model` can be added to what the run in `folder` says about itself."""
    manifest = read_run(folder).report.manifest
    target, trained_bits = manifest["target"]["name"], manifest.get("target_bits")
    if _last_component(str(target)) != _last_component(model):
        raise UserError(
            f"{folder!r} is an adapter for {target!r}, and --model is {model!r}; record scores on its own base model, "
            "by that name or in a folder of that name."
        )
    if trained_bits != bits:
        remedy = f"give --bits {trained_bits}" if trained_bits else "leave out --bits"
        raise UserError(
            f"{folder!r} was trained beside a target in another precision; {remedy}, or leave out --record."
        )
    _read_card(Path(folder))


def warn_of_other_precision(adapter: str, bits: Bits | None) -> None:
    """Says so where an adapter was trained beside a target of other bits than it is to be scored on."""
    folder = find_adapter(adapter)
    try:
        trained = read_run(str(folder)).report.manifest.get("target_bits")
    except UserError:  # no adapter of ours, or one that lost its record
        return
    if trained and trained != bits:
        logger.warning("%r was trained beside a target of %d bits; --bits %d scores it so.", adapter, trained, trained)
    elif bits and not trained:
        logger.warning(
            "%r was trained beside a target that is not quantized; leave out --bits to score it so.", adapter
        )


def record_task(folder: Path, task: Mapping[str, Any]) -> None:
    """Adds the scores of a task to the manifest, the card and the report of a finished run.

    Scored again, a task takes the place of what it was, up to the score of source + LoRA, which only a run measures.
    What its owner has written into the card stays.

    Args:
        folder: where the adapter lies
        task: as `describe_task` writes it

    Raises:
        UserError: a file of the run is damaged.
    """
    card = _read_card(folder)
    manifest = dict(read_run(str(folder)).report.manifest)
    tasks = {other["sha256"]: other for other in manifest.get(TASKS, ())}
    task = _with_teacher(task, tasks.pop(task["sha256"], None))
    manifest[TASKS] = [*tasks.values(), task]
    write_whole(folder / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")
    add_scores(card, task_skills(manifest), read_task(task), manifest["adapter"]["name"])
    write_whole(folder / CARD_FILE, str(card))
    # Without the details that it was made of the page would lose what it shows.
    if (folder / REPORT_FILE).is_file() and (folder / DETAILS_FILE).is_file():
        write_whole(folder / REPORT_FILE, render_report(read_run(str(folder)).report))


def _with_teacher(task: Mapping[str, Any], before: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The scores of a task with that of source + LoRA, where it was measured before in the same way."""
    if before is None or SOURCE_LORA not in before["scores"] or before["chat"] != task["chat"]:
        return task
    teacher = {SOURCE_LORA: before["scores"][SOURCE_LORA]}
    return {**task, "scores": {BARE_TARGET: task["scores"][BARE_TARGET], **teacher, **task["scores"]}}


def _last_component(name: str) -> str:
    return public_name(name).split("/")[-1]


def _read_card(folder: Path) -> ModelCard:
    path = folder / CARD_FILE
    if not path.is_file():
        raise UserError(f"{str(folder)!r} has no {CARD_FILE}; give a folder that castlora transfer wrote.")
    try:
        card: ModelCard = ModelCard.load(path)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            f"{CARD_FILE} in {str(folder)!r} is no model card ({first_line(error)}); mend the metadata above its text."
        ) from error
    return card


def report_samples(imitation: Imitation | None) -> list[Sample]:
    """A few prompts with different answers, as far as there are any."""
    if imitation is None:
        return []
    by_answer = {answer.strip(): index for index, answer in reversed(list(enumerate(imitation.teacher)))}
    return [
        Sample(
            imitation.prompts[index],
            {BARE_TARGET: imitation.bare[index], TRANSFERRED: imitation.transferred[index]},
            imitation.teacher[index],
            SOURCE_LORA,
        )
        for index in sorted(by_answer.values())[:_SAMPLES]
    ]
