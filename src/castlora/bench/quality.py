"""Runs the quality benchmark: what is missing of the grid, one JSON file per run."""

import json
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from castlora.adapters.live import load_adapter
from castlora.bench.grid import Cell, Settings, record_path, score, write_missing
from castlora.bench.methods import METHODS, Method
from castlora.bench.spec import BenchmarkSpec
from castlora.bench.trained import OtherSkill
from castlora.bench.untrained import Constrained, LogitDelta
from castlora.config import Tuning, resolve_recipe
from castlora.errors import UserError
from castlora.execution.run_directory import write_whole
from castlora.models.loading import best_device, load_model

SETTINGS_FILE, REFERENCES_FILE = "settings.json", "references.json"


def run_quality(
    spec: BenchmarkSpec,
    out: Path,
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    steps: int = 800,
    batch_size: int = 4,
    passages: int = Settings.passages,
    max_length: int = Settings.max_length,
    running_length: int = Settings.running_length,
) -> None:
    """Runs what is missing of the grid; several processes can share it.

    Args:
        spec: models, pairs, skills, regimes and text
        out: folder of the results
        methods: names of methods; by default all that the files of the skills allow
        seeds: number of seeds
        steps: optimizer steps of each run
        batch_size: passages per step
        passages: passages drawn per run
        max_length: most tokens of a prompt with its answer
        running_length: tokens of a passage of running text

    Raises:
        UserError: a method is unknown, a number is out of range, a file cannot be read, or the folder has runs of other
            length.
    """
    unknown = [name for name in methods or () if name not in METHODS]
    if unknown:
        raise UserError(f"Method {unknown[0]!r} is unknown; choose from {'; '.join(METHODS)}.")
    if seeds < 1:
        raise UserError(f"seeds is {seeds}; give 1 or more.")
    if steps < 1:
        raise UserError(f"steps is {steps}; give a number above 0.")
    # A number out of range is refused before the folder is bound to it.
    resolve_recipe("default", None, steps, batch_size, Tuning(passages=passages, max_length=max_length))
    settings = Settings(spec, steps, batch_size, passages, max_length, running_length)
    for pair, skill in product(spec.pairs, spec.skills):
        _hold_to_references(spec, pair, skill, Cell(pair, skill, "none", 0).folder(out) / REFERENCES_FILE)
    _keep_settings(settings, out)
    for pair, skill in product(spec.pairs, spec.skills):
        folder = Cell(pair, skill, "none", 0).folder(out)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "references.lock"):
            write_missing(folder / REFERENCES_FILE, partial(reference_scores, spec, pair, skill))
    planned = plan_runs(spec, methods or possible_methods(spec), seeds)
    missing = sum(
        not record_path(out, cell, method).exists() for cell, of_cell in planned.items() for method in of_cell
    )
    with tqdm(total=missing, desc=f"runs of {steps} steps", unit="run") as progress:
        for cell, of_cell in planned.items():
            _run_cell(settings, cell, of_cell, out, progress)


def plan_runs(spec: BenchmarkSpec, methods: Sequence[str], seeds: int) -> dict[Cell, list[str]]:
    """The cells in the order in which they are run, and the methods that each one allows.

    Seeds come outermost: an early stop leaves every cell with the same number of seeds. Weights alone depend on none.
    """
    cells = [
        Cell(pair, skill, regime, seed)
        for seed, pair, skill, regime in product(range(seeds), spec.pairs, spec.skills, spec.regimes)
        if regime != "none" or seed == 0
    ]
    return {cell: [method for method in methods if cell.regime in METHODS[method].regimes] for cell in cells}


def reference_scores(spec: BenchmarkSpec, pair: str, skill: str) -> dict[str, Any]:
    """Scores of the models that every method is compared with."""
    source, target = pair.split(":")
    models = {
        "bare target": (target, None),
        "source + LoRA": (source, spec.adapter(source, skill)),
        "retrained": (target, spec.adapter(target, skill)),
    }
    references = {}
    for name, (base, adapter) in models.items():
        model, tokenizer = load_model(spec.base(base), device=best_device())
        scored = load_adapter(model, adapter, base) if adapter else model
        references[name] = score(spec, scored, tokenizer, skill)
    inputs = spec.fingerprints(pair, skill)
    return {"pair": pair, "skill": skill, "references": references, "inputs": inputs}


def _hold_to_references(spec: BenchmarkSpec, pair: str, skill: str, path: Path) -> None:
    """Compares with what a pair and a skill of a folder were measured with, so that no later run mixes others in."""
    inputs = spec.fingerprints(pair, skill)
    measured = json.loads(path.read_text(encoding="utf-8")).get("inputs", inputs) if path.exists() else inputs
    for what in sorted(inputs.keys() | measured.keys()):
        if inputs.get(what) != measured.get(what):
            raise UserError(f"{path.parent} was measured with other {what}; give another folder.")


def hold_to_settings(settings: Settings, out: Path) -> None:
    """Compares with the settings that a folder of results was begun with, so that no later run mixes others in.

    Raises:
        UserError: they differ.
    """
    path = out / SETTINGS_FILE
    if path.exists():
        for name, value in json.loads(path.read_text(encoding="utf-8")).items():
            if (asked := settings.numbers()[name]) != value:
                raise UserError(f"{out} holds runs with {name} {value}, not {asked}; give another folder.")


def _keep_settings(settings: Settings, out: Path) -> None:
    hold_to_settings(settings, out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / SETTINGS_FILE, json.dumps(settings.numbers(), indent=1) + "\n")


def possible_methods(spec: BenchmarkSpec) -> list[str]:
    """The methods that the files of the skills allow."""
    impossible: list[type[Method]] = []
    if not spec.has_labels():
        impossible.append(Constrained)
    if spec.lm_eval:
        # Its three models are no model that the harness could run.
        impossible.append(LogitDelta)
    if len(spec.skills) < 2:
        impossible.append(OtherSkill)
    return [name for name, method in METHODS.items() if not isinstance(method, tuple(impossible))]


def _run_cell(settings: Settings, cell: Cell, methods: Sequence[str], out: Path, progress: tqdm) -> None:
    try:
        with FileLock(cell.folder(out) / f"{cell.regime}.seed{cell.seed}.lock", timeout=0):
            for method in methods:
                wrote = write_missing(record_path(out, cell, method), partial(run_method, settings, cell, method))
                progress.update(wrote)
    except Timeout:
        tqdm.write(f"{cell} is being measured by another process")


def run_method(settings: Settings, cell: Cell, method: str) -> dict[str, Any]:
    """The record of one method in one cell."""
    fields = {"pair": cell.pair, "skill": cell.skill, "regime": cell.regime, "seed": cell.seed, "method": method}
    return {**fields, **METHODS[method].run(settings, cell)}
