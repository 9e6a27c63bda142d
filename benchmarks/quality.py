"""How much of a skill arrives, on the zoo: pairs × skills × methods × text × seeds, one JSON file per run.

    python -m benchmarks.quality --tasks TASKS --text CORPUS/train-05.jsonl.gz --held_out_text CORPUS/valid.jsonl.gz

Runs that are already there are skipped, so a stopped benchmark goes on where it was. TASKS is made by
`python -m benchmarks.zoo.skills`. `python -m benchmarks.quality_report` renders the results into docs.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import auto_cli
from transformers.utils.logging import disable_progress_bar

from benchmarks.zoo.specs import BASE_MODELS, GRID_SKILLS
from castlora.bench.methods import METHODS
from castlora.bench.quality import run_quality
from castlora.bench.spec import SKILL_SLOT, BenchmarkModel, BenchmarkSpec
from castlora.config import REGIMES, Regime
from castlora.demonstration.bundle import demo_models_path

ZOO = Path(__file__).parent / "zoo"
PAIRS = (
    "llama-s:mistral-s",
    "gpt2-s:gpt2-m",
    "llama-s:llama-m",
    "llama-m:llama-s",
    "llama-s:gpt2-s",
    "stories260K-hf:llama-s",
    "llama-s:stories260K-hf",
)


def zoo_models(zoo: Path, third_party: Path) -> dict[str, BenchmarkModel]:
    """Base models of the zoo, of the package's demo, and those that others have trained, each with its adapters."""

    def base(name: str) -> Path:
        places = (zoo / "models", demo_models_path(), third_party)
        return next((place / name for place in places if (place / name).exists()), places[0] / name)

    names = (*BASE_MODELS, "stories260K-hf")
    return {name: BenchmarkModel(str(base(name)), str(zoo / "adapters" / name / SKILL_SLOT)) for name in names}


def main(
    tasks: Path,
    text: Path,
    held_out_text: Path,
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
    threads: int = 1,
) -> None:
    """Runs what is missing of the grid.

    Args:
        tasks: folder of task files, one folder per skill
        text: general text
        held_out_text: general text that nothing was trained on
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
        threads: processor threads
    """
    torch.set_num_threads(threads)
    disable_progress_bar()
    spec = BenchmarkSpec(
        zoo_models(zoo, third_party), list(PAIRS), list(GRID_SKILLS), str(tasks), str(text), str(held_out_text)
    )
    run_quality(spec.narrowed(list(pairs), list(skills), list(regimes)), out, methods, seeds, steps, batch_size)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
