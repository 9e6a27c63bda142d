"""Finished runs as they lie on disk: what they hold for their report, and reading it again."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from castlora.errors import UserError
from castlora.evaluation.measured_tasks import measured, read_task
from castlora.execution.run_directory import check_absent, check_finished, check_folder_of, write_new_file
from castlora.report import (
    AGREEMENT,
    TASK_SCORE,
    ChangedPiece,
    ChangedText,
    ComparedRun,
    Distillation,
    Imitation,
    Pairing,
    Report,
    Sample,
    Similarity,
    SitePair,
    Skill,
    compare_runs,
    describe_comparison,
    render_comparison,
    render_report,
)
from castlora.report.formatting import number
from castlora.report.settings import identity, measured_positions, objective, settings_in_words

logger = logging.getLogger("castlora")

MANIFEST_FILE = "castlora.json"
DETAILS_FILE = "report.json"
TASKS = "tasks"
"""Where the manifest keeps the scores on tasks, of the run itself and measured later."""
_MOST_LAYERS = 1000
_ALONG = {"KL to the teacher": "held_out_kl", "drift": "drift", AGREEMENT: "agreement", TASK_SCORE: "task_score"}
"""What is measured during a training, as the report and as the log call it."""


@dataclass(frozen=True)
class RunDetails:
    """What a report shows beyond the manifest. It holds some of the user's prompts, the manifest none."""

    log: Sequence[Mapping[str, float]] = ()
    """Of the training: `step`, `loss` and the parts of the loss."""
    samples: Sequence[Sample] = ()
    changes: Sequence[ChangedText] = ()
    files: Sequence[str] = ()
    """Names of the files written."""
    similarity: Similarity | None = None
    """How alike the bare models are at paired places."""

    def to_json(self) -> str:
        """The text of `DETAILS_FILE`."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunDetails":
        """Reads what `to_json` wrote."""
        record = json.loads(text)
        return cls(
            [{str(name): measured(value) for name, value in entry.items()} for entry in record["log"]],
            [_sample(sample) for sample in record["samples"]],
            [_changed_text(change) for change in record["changes"]],
            [str(name) for name in record["files"]],
            _similarity(record.get("similarity")),
        )


def report_runs(runs: Sequence[str], out: str) -> dict[str, Any]:
    """Writes one HTML page: several finished runs side by side, or one run's own report anew.

    Args:
        runs: folders that `castlora.transfer` wrote
        out: HTML file to write

    Returns:
        the comparison as JSON takes it: what differs, why the runs cannot be ranked or their ranking, and what each
        reached; of one run its manifest

    Raises:
        UserError: a folder is not one of a finished run, or `out` cannot be written.
    """
    check_folder_of(out)
    check_absent(out)
    page, described = runs_page(runs)
    write_new_file(out, page)
    logger.info("Wrote %s", out)
    return described


def runs_page(runs: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The page of `report_runs` as HTML, and what it shows as JSON takes it.

    Raises:
        UserError: a folder is not one of a finished run.
    """
    read = [read_run(run) for run in runs]
    if len(read) == 1:
        return render_report(read[0].report), dict(read[0].report.manifest)
    comparison = compare_runs(read)
    return render_comparison(comparison), describe_comparison(comparison)


def read_run(folder: str) -> ComparedRun:
    """Reads a folder that `castlora.transfer` wrote; without `DETAILS_FILE` it has no curves and no texts.

    Raises:
        UserError: it is no such folder, or a file in it is damaged.
    """
    place = Path(folder)
    check_finished(place)
    if not (place / MANIFEST_FILE).is_file():
        raise UserError(f"{folder!r} has no {MANIFEST_FILE}; give folders of finished runs of castlora transfer.")
    name = MANIFEST_FILE
    try:
        manifest = json.loads((place / name).read_text(encoding="utf-8"))
        run = _run(place.resolve().name, manifest, RunDetails())
        name = DETAILS_FILE
        if not (place / name).is_file():
            return run
        return replace(run, report=run_report(manifest, RunDetails.from_json((place / name).read_text("utf-8"))))
    except (OSError, AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{name} in {folder!r} is damaged or not from castlora transfer; copy the folder of the run again."
        ) from error


def _run(name: str, manifest: Mapping[str, Any], details: RunDetails) -> ComparedRun:
    losses = manifest["losses"]
    return ComparedRun(
        name,
        run_report(manifest, details),
        settings_in_words(manifest),
        identity(manifest),
        measured_positions(manifest),
        objective(manifest),
        (measured(losses.get("kl_bare", losses["kl_before"])), measured(losses["kl_after"])),
        measured(manifest["seconds"]),
        measured(manifest["peak_memory_bytes"]),
    )


def run_report(manifest: Mapping[str, Any], details: RunDetails) -> Report:
    """What a finished run has to show."""
    return Report(
        title=f"{manifest['adapter']['name']} → {manifest['target']['name']}",
        facts={"source": str(manifest["source"]["name"]), "target": str(manifest["target"]["name"])},
        skills=task_skills(manifest),
        distillation=_distillation(details.log, manifest["losses"], manifest.get("scored_along")),
        imitation=_imitation(manifest["answers"]),
        pairing=_pairing(manifest["pairing"], manifest["layer_map"], details.similarity),
        samples=details.samples,
        changes=details.changes,
        manifest=manifest,
        cost=_cost(manifest),
        command=str(manifest["command"]),
        files=details.files,
    )


def task_skills(manifest: Mapping[str, Any]) -> list[Skill]:
    """The tasks that the transferred adapter has been scored on since."""
    return [read_task(task) for task in manifest.get(TASKS, ())]


def _pairing(sites: Sequence[Mapping[str, Any]], layer_map: Sequence[int], similarity: Similarity | None) -> Pairing:
    """A row per target module and a layer-by-layer matrix: of similarities, or of what is paired."""
    modules, layers = (similarity.modules, similarity.layers) if similarity else ({}, [])
    pairs = []
    for site in sites:
        sources = " + ".join(_site_label(source["module"]) for source in site["sources"])
        pairs.append(SitePair(_site_label(site["target"]), sources or None, modules.get(site["target"])))
    if not all(0 <= layer < _MOST_LAYERS for layer in [len(layer_map), *layer_map]):
        raise ValueError("layer_map")
    if layers:
        return Pairing(pairs, layers, "CKA of hidden states, before the transfer", layer_map)
    columns = range(1 + max(layer_map))
    return Pairing(pairs, [[float(layer == source) for layer in columns] for source in layer_map], "paired", layer_map)


def _similarity(record: Mapping[str, Any] | None) -> Similarity | None:
    if record is None:
        return None
    layers = [[measured(value) for value in row] for row in record["layers"]]
    if max(len(layers), *map(len, layers), 0) >= _MOST_LAYERS:
        raise ValueError("layers")
    return Similarity({str(name): measured(value) for name, value in record["modules"].items()}, layers)


def _distillation(
    log: Sequence[Mapping[str, float]], losses: Mapping[str, float], task_sha256: str | None
) -> Distillation:
    loss = _points(log, "loss")
    parts = {name for entry in log for name in entry} & {"kl", "mse", "chunk", "rehearsal"}
    components = {name: _points(log, name) for name in sorted(parts)}
    return Distillation(
        loss,
        components if len(components) > 1 else {},
        held_out_before=measured(losses["held_out_before"]),
        held_out_after=measured(losses["held_out_after"]),
        agreement_before=measured(losses["agreement_before"]),
        agreement_after=measured(losses["agreement_after"]),
        held_out_bare=_measured_if_known(losses.get("held_out_bare")),
        agreement_bare=_measured_if_known(losses.get("agreement_bare")),
        along={name: points for name, key in _ALONG.items() if (points := _points(log, key))},
        drift_after=_measured_if_known(losses.get("drift_after")),
        task_sha256=task_sha256,
    )


def _points(log: Sequence[Mapping[str, float]], key: str) -> list[tuple[int, float]]:
    """The entries of a log that have a value, with their steps."""
    return [(int(entry["step"]), entry[key]) for entry in log if key in entry]


def _cost(manifest: Mapping[str, Any]) -> dict[str, str]:
    on_accelerator = _measured_if_known(manifest.get("peak_accelerator_bytes"))
    return {
        f"wall time{', since it was resumed' if manifest.get('resumed') else ''}": (
            f"{number(measured(manifest['seconds']))} s"
        ),
        "peak memory": _gibibytes(measured(manifest["peak_memory_bytes"])),
        **({"peak memory of the accelerator": _gibibytes(on_accelerator)} if on_accelerator is not None else {}),
        **{f"{kind.replace('_', '-')} passages": str(count) for kind, count in manifest["passages"].items()},
    }


def _gibibytes(count: float) -> str:
    return f"{number(count / 2**30)} GiB"


def _measured_if_known(value: object) -> float | None:
    return None if value is None else measured(value)


def _imitation(answers: Mapping[str, Any] | None) -> Imitation | None:
    if answers is None:
        return None
    low, high = map(measured, answers["ci95"])
    before, after = measured(answers["same_before"]), measured(answers["same_after"])
    by_chance = _measured_if_known(answers.get("same_by_chance"))
    return Imitation(int(answers["prompts"]), before, after, (low, high), by_chance)


def _sample(record: Mapping[str, Any]) -> Sample:
    outputs = {str(model): str(text) for model, text in record["outputs"].items()}
    expected = record["expected"]
    return Sample(
        str(record["prompt"]), outputs, None if expected is None else str(expected), str(record["expected_of"])
    )


def _changed_text(record: Mapping[str, Any]) -> ChangedText:
    pieces = [
        ChangedPiece(str(piece["text"]), measured(piece["source"]), measured(piece["target"]), bool(piece["in_answer"]))
        for piece in record["pieces"]
    ]
    return ChangedText(str(record["source_lead"]), str(record["target_lead"]), pieces)


def _site_label(module_name: str) -> str:
    return module_name.removeprefix("model.").removeprefix("transformer.")
