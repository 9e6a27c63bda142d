"""How much of a skill arrives: pairs × skills × methods × text × seeds, one JSON file per run.

    python -m benchmarks.quality --tasks TASKS --text CORPUS/train-05.jsonl.gz --out benchmarks/results/quality

Runs that are already there are skipped, so a stopped benchmark goes on where it was. TASKS is made by
`python -m benchmarks.zoo.skills`. `python -m benchmarks.quality_report` renders the results into docs.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from jsonargparse import auto_cli
from transformers.utils.logging import disable_progress_bar

from benchmarks.grid import PAIRS, REGIMES, Cell, Regime, Settings, figures, record_path, write_missing
from benchmarks.methods import METHODS
from benchmarks.zoo.specs import GRID_SKILLS
from castlora.evaluation import evaluate_model, load_adapter
from castlora.models import load_model

ZOO = Path(__file__).parent / "zoo"


def reference_scores(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Scores of the models that every method is compared with."""
    models = {
        "bare target": (cell.target, None),
        "source + LoRA": (cell.source, settings.adapter(cell.source, cell.skill)),
        "retrained": (cell.target, settings.adapter(cell.target, cell.skill)),
    }
    references = {}
    for name, (base, adapter) in models.items():
        model, tokenizer = load_model(str(settings.base(base)))
        scored = load_adapter(model, str(adapter), base) if adapter else model
        references[name] = figures(evaluate_model(scored, tokenizer, settings.test_items(cell.skill)))
    return {"pair": cell.pair, "skill": cell.skill, "references": references}


def main(
    tasks: Path,
    text: Path,
    out: Path = Path("benchmarks/results/quality"),
    zoo: Path = ZOO,
    third_party: Path = Path("../shared/data/models"),
    pairs: Sequence[str] = PAIRS,
    skills: Sequence[str] = GRID_SKILLS,
    methods: Sequence[str] = tuple(METHODS),
    regimes: Sequence[Regime] = REGIMES,
    seeds: int = 3,
    steps: int = 800,
    batch_size: int = 4,
    passages: int = 1000,
    max_length: int = 96,
    running_length: int = 48,
    threads: int = 1,
) -> None:
    """Runs what is missing of the grid.

    Args:
        tasks: folder of task files, one folder per skill
        text: general text
        out: folder of the results
        zoo: folder of the zoo's models and adapters
        third_party: folder of models that the zoo does not hold
        pairs: SOURCE:TARGET, each
        skills: names of skills
        methods: names of methods
        regimes: what is known about the task
        seeds: number of seeds
        steps: optimizer steps of each run
        batch_size: passages per step
        passages: passages drawn per run
        max_length: most tokens of a prompt with its answer
        running_length: tokens of a passage of running text, by default about as many as the prompts have
        threads: processor threads
    """
    torch.set_num_threads(threads)
    disable_progress_bar()
    settings = Settings(zoo, third_party, tasks, text, steps, batch_size, passages, max_length, running_length)
    for pair, skill in product(pairs, skills):
        cell = Cell(pair, skill, "none", 0)
        cell.folder(out).mkdir(parents=True, exist_ok=True)
        with FileLock(cell.folder(out) / "references.lock"):
            write_missing(cell.folder(out) / "references.json", partial(reference_scores, settings, cell))
    # Seeds outermost: an early stop leaves every cell with the same number of seeds.
    for seed, pair, skill, regime in product(range(seeds), pairs, skills, regimes):
        cell = Cell(pair, skill, regime, seed)
        chosen = [method for method in methods if regime in METHODS[method].regimes]
        if regime == "none" and seed > 0:
            continue  # weights alone: nothing depends on a seed
        try:
            with FileLock(cell.folder(out) / f"{regime}.seed{seed}.lock", timeout=0):
                for method in chosen:
                    write_missing(record_path(out, cell, method), partial(run_method, settings, cell, method))
        except Timeout:
            print(cell, "is being measured by another process", flush=True)


def run_method(settings: Settings, cell: Cell, method: str) -> dict[str, Any]:
    """The record of one method in one cell."""
    return {**asdict(cell), "method": method, **METHODS[method].run(settings, cell)}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
