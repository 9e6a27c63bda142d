"""The cells of the quality benchmark: which models, adapters and text each one uses, and where its record lies."""

import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from castlora.bench.harness import harness_figures
from castlora.bench.spec import BenchmarkSpec
from castlora.config import Recipe, Regime
from castlora.evaluation.accuracy import Evaluation, evaluate_model
from castlora.execution.run_directory import write_whole
from castlora.model_pair import load_models
from castlora.models.completions import CausalLM, text_loss
from castlora.plan import Plan, plan_transfer
from castlora.publishing.manifest import versions
from castlora.teaching.curriculum import TextSource, prompt_formats, teach_text
from castlora.text.passages import Passage

logger = logging.getLogger("castlora")


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    spec: BenchmarkSpec
    steps: int
    """Optimizer steps of each run."""
    batch_size: int
    """Passages per step."""
    passages: int = 1000
    """Passages drawn per run."""
    max_length: int = 96
    """Most tokens of a prompt with its answer."""
    running_length: int = 48
    """Tokens of a passage of running text, by default about as many as short prompts have."""

    def numbers(self) -> dict[str, int]:
        """All but the specification, by name."""
        return {name: value for name, value in vars(self).items() if name != "spec"}


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

    def plan(self, spec: BenchmarkSpec) -> Plan:
        """The transfer of this cell, before any model is loaded."""
        return plan_transfer(spec.adapter(self.source, self.skill), spec.base(self.target), spec.base(self.source))

    def text_source(self, spec: BenchmarkSpec) -> TextSource:
        """What this cell's regime lets a transfer read."""
        if self.regime == "prompts":
            return spec.prompts(self.skill)
        return spec.general_text() if self.regime == "general" else spec.formatted_text(self.skill)

    def folder(self, out: Path) -> Path:
        """Where the records of this pair and skill lie."""
        return out / self.pair.replace(":", "--") / self.skill


def record_path(out: Path, cell: Cell, method: str) -> Path:
    """File of one run."""
    name = method.translate({ord(","): None, ord(":"): None, ord(" "): "-"})
    return cell.folder(out) / f"{name}.{cell.regime}.seed{cell.seed}.json"


@lru_cache(maxsize=64)
def taught_passages(spec: BenchmarkSpec, cell: Cell, recipe: Recipe) -> list[Passage]:
    """The text of a run, answers included; all starts and schedules of a recipe learn from the same."""
    models = load_models(cell.plan(spec))
    text = cell.text_source(spec)
    formats = prompt_formats(models, text, recipe, cell.seed)
    return teach_text(models, text, formats, recipe, cell.seed)


def write_missing(path: Path, run: Callable[[], dict[str, Any]]) -> bool:
    """Runs and writes a record unless it is there; tells whether it did."""
    if path.exists():
        return False
    result = {**run(), "environment": environment()}
    write_whole(path, json.dumps(result, indent=1) + "\n")
    with tqdm.external_write_mode():
        logger.info("Wrote %s%s", path, f": {result['metric']} {result['score']:.3f}" if "score" in result else "")
    return True


def score(spec: BenchmarkSpec, model: CausalLM, tokenizer: PreTrainedTokenizerFast, skill: str) -> dict[str, Any]:
    """What a record keeps of a model: how it does on a skill's test items, and on held-out text."""
    passages = spec.held_out_passages()
    return {
        **_task_figures(spec, model, tokenizer, skill),
        **({"text_loss": text_loss(model, tokenizer, passages)} if passages else {}),
    }


def _task_figures(
    spec: BenchmarkSpec, model: CausalLM, tokenizer: PreTrainedTokenizerFast, skill: str
) -> dict[str, Any]:
    if skill in spec.lm_eval:
        return harness_figures(model, tokenizer, skill, spec.lm_eval_tasks, spec.lm_eval_shots)
    return figures(evaluate_model(model, tokenizer, spec.test_items(skill)))


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
    return {
        "commit": _commit(),
        "versions": versions(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used",
    }


def _commit() -> str:
    """The commit of castlora, where it runs from a checkout that holds this file; else nothing."""
    here = Path(__file__)
    if shutil.which("git") is None:
        return ""
    tracked = subprocess.run(["git", "ls-files", "--error-unmatch", here.name], cwd=here.parent, capture_output=True)
    if tracked.returncode != 0:
        return ""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here.parent, capture_output=True, text=True, check=True)
    return head.stdout.strip()
