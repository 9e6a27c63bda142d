"""Finished runs as they lie on disk: what they hold for their report, and reading it again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from castlora.errors import UserError
from castlora.report import ChangedPiece, ChangedText, Distillation, Imitation, Pairing, Report, Sample, SitePair

MANIFEST_FILE = "castlora.json"
DETAILS_FILE = "report.json"
_MOST_LAYERS = 1000


@dataclass(frozen=True)
class RunDetails:
    """What a report shows beyond the manifest. It holds some of the user's prompts, the manifest none."""

    log: Sequence[Mapping[str, float]] = ()
    """Of the training: `step`, `loss` and the parts of the loss."""
    samples: Sequence[Sample] = ()
    changes: Sequence[ChangedText] = ()
    files: Sequence[str] = ()
    """Names of the files written."""

    def to_json(self) -> str:
        """The text of `DETAILS_FILE`."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunDetails":
        """Reads what `to_json` wrote."""
        record = json.loads(text)
        return cls(
            [{str(name): float(value) for name, value in entry.items()} for entry in record["log"]],
            [_sample(sample) for sample in record["samples"]],
            [_changed_text(change) for change in record["changes"]],
            [str(name) for name in record["files"]],
        )


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: Name of its folder.
        manifest: The record of the run.
        report: What its page shows.
    """

    name: str
    manifest: Mapping[str, Any]
    report: Report


def read_run(folder: str) -> Run:
    """Reads a folder that `castlora.transfer` wrote; without `DETAILS_FILE` its report has no curves and no texts.

    Raises:
        UserError: it is no such folder, or a file in it is damaged.
    """
    place = Path(folder)
    if not (place / MANIFEST_FILE).is_file():
        raise UserError(f"{folder!r} has no {MANIFEST_FILE}; give folders of finished runs of castlora transfer.")
    name = MANIFEST_FILE
    try:
        manifest = json.loads((place / name).read_text(encoding="utf-8"))
        run_report(manifest, RunDetails())
        name = DETAILS_FILE
        details = place / DETAILS_FILE
        known = RunDetails.from_json(details.read_text(encoding="utf-8")) if details.is_file() else RunDetails()
        return Run(place.resolve().name, manifest, run_report(manifest, known))
    except (OSError, AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{name} in {folder!r} is damaged or not from castlora transfer; copy the folder of the run again."
        ) from error


def run_report(manifest: Mapping[str, Any], details: RunDetails) -> Report:
    """What a finished run has to show."""
    return Report(
        title=f"{manifest['adapter']['name']} → {manifest['target']['name']}",
        facts={"source": str(manifest["source"]["name"]), "target": str(manifest["target"]["name"])},
        distillation=_distillation(details.log, manifest["losses"]),
        imitation=_imitation(manifest["answers"]),
        pairing=_pairing(manifest["pairing"], manifest["layer_map"]),
        samples=details.samples,
        changes=details.changes,
        manifest=manifest,
        command=str(manifest["command"]),
        files=details.files,
    )


def _pairing(sites: Sequence[Mapping[str, Any]], layer_map: Sequence[int]) -> Pairing:
    """A row per target module and a layer-by-layer matrix."""
    pairs = []
    for site in sites:
        sources = " + ".join(_site_label(source["module"]) for source in site["sources"])
        pairs.append(SitePair(_site_label(site["target"]), sources or None))
    if not all(0 <= layer < _MOST_LAYERS for layer in [len(layer_map), *layer_map]):
        raise ValueError("layer_map")
    columns = range(1 + max(layer_map))
    matrix = [[float(layer == source) for layer in columns] for source in layer_map]
    return Pairing(pairs, matrix, measure="paired")


def _distillation(log: Sequence[Mapping[str, float]], losses: Mapping[str, float]) -> Distillation:
    loss = [(int(entry["step"]), entry["loss"]) for entry in log]
    parts = {name for entry in log for name in entry} & {"kl", "mse", "chunk"}
    components = {name: [(int(entry["step"]), entry[name]) for entry in log] for name in sorted(parts)}
    return Distillation(
        loss,
        components if len(components) > 1 else {},
        held_out_before=float(losses["held_out_before"]),
        held_out_after=float(losses["held_out_after"]),
        agreement_before=float(losses["agreement_before"]),
        agreement_after=float(losses["agreement_after"]),
    )


def _imitation(answers: Mapping[str, Any] | None) -> Imitation | None:
    if answers is None:
        return None
    low, high = map(float, answers["ci95"])
    return Imitation(int(answers["prompts"]), float(answers["same_before"]), float(answers["same_after"]), (low, high))


def _sample(record: Mapping[str, Any]) -> Sample:
    outputs = {str(model): str(text) for model, text in record["outputs"].items()}
    expected = record["expected"]
    return Sample(
        str(record["prompt"]), outputs, None if expected is None else str(expected), str(record["expected_of"])
    )


def _changed_text(record: Mapping[str, Any]) -> ChangedText:
    pieces = [
        ChangedPiece(str(piece["text"]), float(piece["source"]), float(piece["target"]), bool(piece["in_answer"]))
        for piece in record["pieces"]
    ]
    return ChangedText(str(record["source_lead"]), str(record["target_lead"]), pieces)


def _site_label(module_name: str) -> str:
    return module_name.removeprefix("model.").removeprefix("transformer.")
