"""Lift against the number of steps, by what is known about the task.

    python -m benchmarks.steps --tasks TASKS --text CORPUS/train-05.jsonl.gz

Each number of steps is a run of its own, with a schedule of its own; runs that are already there are skipped.
`python -m benchmarks.quality_report` renders the records.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality import ZOO, zoo_models
from castlora.bench.lengths import run_lengths
from castlora.bench.spec import BenchmarkSpec

Known = Literal["general", "format", "prompts"]
"""What is known about the task."""
STEPS = (50, 100, 200, 400, 800)
PAIRS = ("llama-s:mistral-s", "gpt2-s:gpt2-m")
SKILLS = ("question-type", "operation")
METHODS: dict[Known, tuple[str, ...]] = {
    "general": ("default", "ridge start", "fresh"),
    "format": ("default", "ridge start", "fresh"),
    "prompts": (
        "default", "default, last layer solved", "ridge start, rehearsed", "fresh, rehearsed", "ridge start",
        "readout start", "fresh", "paper start",
    ),
}  # fmt: skip
_BATCH = 4


def main(
    tasks: Path,
    text: Path,
    out: Path = Path("benchmarks/results/steps"),
    third_party: Path = Path("../shared/data/models"),
    steps: Sequence[int] = STEPS,
    pairs: Sequence[str] = PAIRS,
    skills: Sequence[str] = SKILLS,
    regimes: Sequence[Known] = tuple(METHODS),
) -> None:
    """Runs what is missing.

    Args:
        tasks: folder of task files, one folder per skill
        text: general text
        out: folder of the results, a folder per number of steps
        third_party: folder of models that the zoo does not hold
        steps: numbers of optimizer steps
        pairs: SOURCE:TARGET, each
        skills: names of skills
        regimes: what is known about the task
    """
    torch.set_num_threads(1)
    disable_progress_bar()
    spec = BenchmarkSpec(zoo_models(ZOO, third_party), list(pairs), list(skills), str(tasks), str(text))
    for regime in regimes:
        run_lengths(spec.narrowed(regimes=[regime]), out, METHODS[regime], seeds=1, lengths=steps, batch_size=_BATCH)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
