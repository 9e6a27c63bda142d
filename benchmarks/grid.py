"""The cells of the quality benchmark: which models, adapters and text each one uses, and where its record lies."""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from castlora.config import Recipe
from castlora.demonstration import demo_models_path
from castlora.evaluation import Evaluation
from castlora.manifest import versions
from castlora.stages import Plan, TextSource, answer_prompts, choose_prompts, draw_text, load_models, plan_transfer
from castlora.tasks import TaskItem, load_task
from castlora.text import Passage

PAIRS = (
    "llama-s:mistral-s",
    "gpt2-s:gpt2-m",
    "llama-s:llama-m",
    "llama-m:llama-s",
    "llama-s:gpt2-s",
    "stories260K-hf:llama-s",
    "llama-s:stories260K-hf",
)

Regime = Literal["none", "general", "format", "prompts"]
REGIMES: tuple[Regime, ...] = ("none", "general", "format", "prompts")
"""What a method reads: weights alone, general text, text in the adapter's prompt format, or unlabelled prompts."""


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    zoo: Path
    models: Path
    tasks: Path
    text: Path
    steps: int
    batch_size: int
    passages: int
    max_length: int
    running_length: int

    def base(self, name: str) -> Path:
        """Folder of a base model: of the zoo, or of the third-party models."""
        places = (self.zoo / "models", demo_models_path(), self.models)
        return next((place / name for place in places if (place / name).exists()), places[0] / name)

    def adapter(self, base: str, skill: str) -> Path:
        """Folder of an adapter of the zoo."""
        return self.zoo / "adapters" / base / skill

    def test_items(self, skill: str) -> list[TaskItem]:
        """Held-out items of a skill."""
        return load_task(self.tasks / skill / "test.jsonl")

    def training_items(self, skill: str) -> list[TaskItem]:
        """Labelled items of a skill, which a transfer never sees."""
        return load_task(self.tasks / skill / "train.jsonl")

    def text_source(self, skill: str, regime: Regime) -> TextSource:
        """What a regime lets a transfer read."""
        if regime == "prompts":
            return TextSource(prompts=str(self.tasks / skill / "prompts.jsonl"))
        if regime == "general":
            return TextSource(text=str(self.text))
        description = json.loads((self.tasks / skill / "skill.json").read_text())
        return TextSource(text=str(self.text), prompt_format=description["prompt_format"])


@dataclass(frozen=True)
class Cell:
    """One place of the grid, for any method."""

    pair: str
    """SOURCE:TARGET."""
    skill: str
    regime: Regime
    seed: int

    @property
    def source(self) -> str:
        """Name of the source model."""
        return self.pair.split(":")[0]

    @property
    def target(self) -> str:
        """Name of the target model."""
        return self.pair.split(":")[1]

    def plan(self, settings: Settings) -> Plan:
        """The transfer of this cell, before any model is loaded."""
        return plan_transfer(
            str(settings.adapter(self.source, self.skill)),
            str(settings.base(self.target)),
            str(settings.base(self.source)),
        )

    def folder(self, out: Path) -> Path:
        """Where the records of this pair and skill lie."""
        return out / self.pair.replace(":", "--") / self.skill


def record_path(out: Path, cell: Cell, method: str) -> Path:
    """File of one run."""
    name = method.replace(",", "").replace(" ", "-")
    return cell.folder(out) / f"{name}.{cell.regime}.seed{cell.seed}.json"


@lru_cache(maxsize=16)
def taught_passages(settings: Settings, cell: Cell, recipe: Recipe) -> list[Passage]:
    """The text of a run, answers included; all starts of a recipe learn from the same."""
    models = load_models(cell.plan(settings))
    drawn = draw_text(models, settings.text_source(cell.skill, cell.regime), recipe, cell.seed)
    return answer_prompts(models, choose_prompts(models, drawn, recipe), recipe, cell.seed)


def write_missing(path: Path, run: Callable[[], dict[str, Any]]) -> None:
    """Runs and writes a record unless it is there."""
    if path.exists():
        return
    result = {**run(), "environment": environment()}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)
    print(path, result.get("score", ""), flush=True)


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """What a record keeps of a score."""
    return {
        "metric": evaluation.metric,
        "score": evaluation.score,
        "ci95": evaluation.ci95,
        "nll": evaluation.nll,
        "n": evaluation.n,
        "scores": "".join(str(int(score)) for score in evaluation.scores),
    }


def environment() -> dict[str, Any]:
    """What a result was measured with."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit,
        "versions": versions(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used",
    }
