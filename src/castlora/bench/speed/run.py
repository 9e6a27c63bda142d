"""Runs the speed benchmark: things timed side by side, in one record and one page."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from castlora.bench.grid import environment
from castlora.bench.speed.folding import measure_folding
from castlora.bench.speed.growth import measure_growth
from castlora.bench.speed.limits import measure_limits
from castlora.bench.speed.measures import SpeedSettings, measure_fit, measure_serving
from castlora.bench.speed.page import page
from castlora.bench.speed.sketching import measure_sketching
from castlora.bench.speed.steps import measure_steps
from castlora.bench.speed.timing import Clock
from castlora.bench.speed.translating import measure_translating
from castlora.config import check_seed
from castlora.errors import UserError
from castlora.execution.run_directory import write_whole
from castlora.models.loading import best_device

logger = logging.getLogger("castlora")

RECORD_FILE, PAGE_FILE = "speed.json", "speed.md"
MEASURES = ("serving", "fit", "steps", "sketching", "limits", "folding", "translating", "growth")
_AT_LEAST = {
    "repeats": 1, "rank": 1, "length": 8, "batch_size": 1, "passages": 1, "doublings": 1, "threads": 1,
}  # fmt: skip


def run_speed(out: Path, settings: SpeedSettings, measures: Sequence[str] = MEASURES) -> dict[str, Any]:
    """Takes the times and writes `speed.json` and `speed.md`.

    Args:
        out: folder for both
        settings: sizes and repetitions
        measures: of `MEASURES`

    Returns:
        the record

    Raises:
        UserError: a measure is unknown, or a number is out of range.
    """
    unknown = [name for name in measures if name not in MEASURES]
    if unknown:
        raise UserError(f"Measure {unknown[0]!r} is unknown; choose from {', '.join(MEASURES)}.")
    for field, least in _AT_LEAST.items():
        if getattr(settings, field) < least:
            raise UserError(f"{field} is {getattr(settings, field)}; give {least} or more.")
    check_seed(settings.seed)
    record = measure(settings, measures)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / RECORD_FILE, json.dumps(record, indent=1) + "\n")
    write_whole(out / PAGE_FILE, page(record))
    return record


def measure(settings: SpeedSettings, measures: Sequence[str]) -> dict[str, Any]:
    """The record: settings, environment, and what was found under `ratios` and the names of the other measures."""
    device = best_device()
    ratios = {"serving": measure_serving, "fit": measure_fit, "steps": measure_steps, "sketching": measure_sketching}
    found: dict[str, list[Any]] = {"ratios": [], "limits": [], "folding": [], "translating": [], "growth": []}
    with _threads(settings.threads):
        surroundings = {**environment(), "device": _name(device), "seconds": Clock(device).kind}
        for name in measures:
            logger.info("Measures %s", name)
            if name in ratios:
                found["ratios"] += ratios[name](settings, device)
            elif name == "limits":
                found["limits"] += measure_limits(settings, device)
            elif name == "folding":
                found["folding"] += measure_folding(settings)
            elif name == "translating":
                found["translating"] += measure_translating(settings)
            else:
                found["growth"] += measure_growth(settings, device)
    described = {kind: [one.describe() for one in of_kind] for kind, of_kind in found.items()}
    return {"settings": asdict(settings), **described, "environment": surroundings}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
