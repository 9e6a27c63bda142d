"""Runs the demo: transfer, four evaluations, a table, samples and a report."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from castlora.adapters.live import load_adapter
from castlora.config import Tuning
from castlora.demonstration.bundle import SOURCE, TARGET, DemoSkill, demo_models_path, demo_skill
from castlora.errors import UserError
from castlora.evaluation.accuracy import Evaluation, evaluate_model
from castlora.evaluation.measured_tasks import describe_task, skill_of
from castlora.evaluation.tasks import TaskItem, load_task
from castlora.lift import Lift, lift_with_interval
from castlora.models.completions import generate
from castlora.models.loading import best_device, load_model
from castlora.pipeline import TransferResult, transfer
from castlora.publishing.record import REPORT_FILE, record_task
from castlora.publishing.runs import read_run
from castlora.report import BARE_TARGET, RETRAINED, SOURCE_LORA, TRANSFERRED, Sample, write_report

logger = logging.getLogger("castlora")

RESULTS_FILE = "results.json"
_STEPS = 300
_SHOWN = 4
_GENERATED_TOKENS = 12


@dataclass(frozen=True)
class Demonstration:
    """What the demo measured; `str` of it is a text for the terminal."""

    record: dict[str, Any]
    text: str

    def __str__(self) -> str:
        return self.text


def demonstrate(out: str, seed: int = 0) -> Demonstration:
    """Moves the bundled skill, measures what arrived, and writes the result.

    Args:
        out: folder to write, new or empty
        seed: of everything random

    Returns:
        scores and answers side by side, and the record of them that was written

    Raises:
        UserError: `out` is not empty.
    """
    disable_progress_bar()
    # Models this small lose more to the meeting of threads than a second thread brings.
    torch.set_num_threads(1)
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {"adapter"}):
        raise UserError(f"--out {out!r} is not empty; give a new folder, nothing is ever overwritten.")
    started = time.monotonic()
    skill = demo_skill()
    logger.info("Moving the skill %r from %s to %s\n", skill.title, SOURCE, TARGET)
    result = transfer(
        adapter=str(skill.adapter(SOURCE)),
        target=str(demo_models_path() / TARGET),
        out=str(folder / "adapter"),
        source=str(demo_models_path() / SOURCE),
        prompts=str(skill.prompts),
        steps=_STEPS,
        seed=seed,
        tuning=Tuning(passages=600, max_length=96, answer_tokens=8),
    )
    items = load_task(skill.task)
    shown = _spread(items)
    evaluations, outputs = _evaluate_all(skill, result.folder, items, shown)
    bare, transferred, retrained = (evaluations[name].scores for name in (BARE_TARGET, TRANSFERRED, RETRAINED))
    lift = lift_with_interval(bare, transferred, retrained)
    samples = [
        Sample(item.prompt, {name: texts[index] for name, texts in outputs.items()}, item.completion)
        for index, item in enumerate(shown)
    ]
    record = _write_results(folder, skill, result, evaluations, lift, samples)
    paths = (folder / "adapter", folder / RESULTS_FILE, folder / REPORT_FILE)
    logger.info("\nWrote:\n%s", "\n".join(f"  {path}" for path in paths))
    logger.info("Finished in %.0f seconds.\n", time.monotonic() - started)
    return Demonstration(record, f"{_table(evaluations, lift)}\n\n{_side_by_side(samples)}")


def _evaluate_all(
    skill: DemoSkill, transferred: Path, items: Sequence[TaskItem], shown: Sequence[TaskItem]
) -> tuple[dict[str, Evaluation], dict[str, list[str]]]:
    adapters = {
        BARE_TARGET: (TARGET, None),
        SOURCE_LORA: (SOURCE, skill.adapter(SOURCE)),
        TRANSFERRED: (TARGET, transferred),
        RETRAINED: (TARGET, skill.adapter(TARGET)),
    }
    evaluations, outputs = {}, {}
    for name, (base_name, adapter) in adapters.items():
        logger.info("Evaluating %s on %d items", name, len(items))
        base, tokenizer = load_model(str(demo_models_path() / base_name), device=best_device())
        model = load_adapter(base, str(adapter), base_name) if adapter else base
        evaluations[name] = evaluate_model(model, tokenizer, items)
        outputs[name] = generate(model, tokenizer, [item.prompt for item in shown], _GENERATED_TOKENS, _SHOWN)
    return evaluations, outputs


def _spread(items: Sequence[TaskItem]) -> list[TaskItem]:
    """A few items from all over the test, with different answers as far as possible."""
    by_completion = {item.completion: item for item in items}
    return list(by_completion.values())[:_SHOWN]


def _write_results(
    folder: Path,
    skill: DemoSkill,
    result: TransferResult,
    evaluations: Mapping[str, Evaluation],
    lift: Lift,
    samples: Sequence[Sample],
) -> dict[str, Any]:
    digest = hashlib.sha256(skill.task.read_bytes()).hexdigest()
    task = describe_task(skill_of(skill.title, digest, evaluations), False, result.manifest["versions"])
    record = {
        "skill": skill.name,
        "scores": {
            name: {"metric": found.metric, "score": found.score, "ci95": found.ci95, "nll": found.nll, "n": found.n}
            for name, found in evaluations.items()
        },
        "lift": {"value": lift.lift, "ci95": lift.ci95, "ratio": lift.ratio},
        "transfer": result.manifest,
    }
    (folder / RESULTS_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record_task(result.folder, task)
    report = replace(
        read_run(str(result.folder)).report,
        title=f"{skill.title}: {SOURCE} → {TARGET}",
        facts={"source": SOURCE, "target": TARGET, "text": "unlabelled prompts"},
        samples=samples,
        command="castlora demo",
        files=["adapter/", RESULTS_FILE, REPORT_FILE],
    )
    write_report(report, folder / REPORT_FILE)
    return record


def _table(evaluations: Mapping[str, Evaluation], lift: Lift) -> str:
    lines = ["model            score   95 % interval   nll"]
    for name in (BARE_TARGET, SOURCE_LORA, TRANSFERRED, RETRAINED):
        found = evaluations[name]
        low, high = found.ci95
        lines.append(f"{name:<15}  {found.score:.3f}   [{low:.3f}, {high:.3f}]  {found.nll:.3f}")
    low, high = lift.ci95
    lines.append(f"\nratio {lift.ratio:.3f}   lift {lift.lift:.3f} [{low:.3f}, {high:.3f}]")
    return "\n".join(lines)


def _side_by_side(samples: Sequence[Sample]) -> str:
    blocks = []
    for sample in samples:
        lines = [sample.prompt, f"  {'expected':<15} {sample.expected}"]
        lines += [f"  {name:<15} {text!r}" for name, text in sample.outputs.items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
