"""What a finished run says about itself: the manifest, the model card and the report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from castlora.card import write_card
from castlora.imitation import Imitation
from castlora.report import BARE_TARGET, SOURCE_LORA, TRANSFERRED, ChangedText, Sample, write_report
from castlora.run_directory import write_whole
from castlora.runs import DETAILS_FILE, MANIFEST_FILE, RunDetails, run_report

REPORT_FILE = "report.html"
_SAMPLES = 6


def write_record(
    folder: Path,
    manifest: dict[str, Any],
    log: list[dict[str, float]],
    imitation: Imitation | None,
    changes: Sequence[ChangedText],
) -> None:
    """Writes the manifest, the card and the report of a finished run beside its adapter.

    Args:
        folder: where the adapter lies
        manifest: the record of the run
        log: of the training
        imitation: what the models write after held-out prompts, where there are any
        changes: what the adapters change in held-out text
    """
    write_whole(folder / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")
    write_card(folder, manifest)
    files = sorted([*(path.name for path in folder.iterdir()), DETAILS_FILE, REPORT_FILE])
    details = RunDetails(log, report_samples(imitation), changes, files)
    write_whole(folder / DETAILS_FILE, details.to_json())
    write_report(run_report(manifest, details), folder / REPORT_FILE)


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
