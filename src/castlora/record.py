"""What a finished run says about itself: the manifest, the model card and the report."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from castlora.card import write_card
from castlora.imitation import Imitation
from castlora.manifest import MANIFEST_FILE
from castlora.pairing import Pairing
from castlora.report import (
    BARE_TARGET,
    SOURCE_LORA,
    TRANSFERRED,
    Distillation,
    Report,
    Sample,
    SitePair,
    write_report,
)
from castlora.report import Imitation as ReportImitation
from castlora.report import Pairing as ReportPairing
from castlora.run_directory import write_whole

REPORT_FILE = "report.html"
_SAMPLES = 6


def write_record(
    folder: Path,
    manifest: dict[str, Any],
    log: list[dict[str, float]],
    pairing: Pairing,
    imitation: Imitation | None,
) -> None:
    """Writes the manifest, the card and the report of a finished run beside its adapter.

    Args:
        folder: where the adapter lies
        manifest: the record of the run
        log: of the training
        pairing: which modules spoke for which
        imitation: what the models write after held-out prompts, where there are any
    """
    write_whole(folder / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")
    write_card(folder, manifest)
    report = Report(
        title=f"{manifest['adapter']['name']} → {manifest['target']['name']}",
        facts={"source": manifest["source"]["name"], "target": manifest["target"]["name"]},
        distillation=report_distillation(log, manifest["losses"]),
        imitation=report_imitation(imitation),
        pairing=report_pairing(pairing),
        samples=report_samples(imitation),
        manifest=manifest,
        command=manifest["command"],
        files=sorted([*(path.name for path in folder.iterdir()), REPORT_FILE]),
    )
    write_report(report, folder / REPORT_FILE)


def report_pairing(pairing: Pairing) -> ReportPairing:
    """The pairing as the report shows it: a row per target module and a layer-by-layer matrix."""
    sites = []
    for pair in pairing.pairs:
        label = _site_label(pair.target.name)
        sources = " + ".join(_site_label(branch.source_module) for branch in pair.branches)
        sites.append(SitePair(label, sources or None))
    source_layers = 1 + max(pairing.layer_map)
    matrix = [[1.0 if layer == source else 0.0 for layer in range(source_layers)] for source in pairing.layer_map]
    return ReportPairing(sites, matrix, measure="paired")


def report_distillation(log: Iterable[Mapping[str, float]], losses: Mapping[str, float]) -> Distillation:
    """The training log as the report shows it."""
    entries = list(log)
    loss = [(int(entry["step"]), entry["loss"]) for entry in entries]
    parts = {name for entry in entries for name in entry} & {"kl", "mse", "chunk"}
    components = {name: [(int(entry["step"]), entry[name]) for entry in entries] for name in sorted(parts)}
    return Distillation(
        loss,
        components if len(components) > 1 else {},
        held_out_before=losses["held_out_before"],
        held_out_after=losses["held_out_after"],
        agreement_before=losses["agreement_before"],
        agreement_after=losses["agreement_after"],
    )


def report_imitation(imitation: Imitation | None) -> ReportImitation | None:
    """How often the target writes what its teacher writes, for the report."""
    if imitation is None:
        return None
    return ReportImitation(len(imitation.prompts), imitation.same_before, imitation.same_after, imitation.ci95)


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


def _site_label(module_name: str) -> str:
    return module_name.removeprefix("model.").removeprefix("transformer.")
