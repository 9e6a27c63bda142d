"""How much of a skill arrives: pairs × skills × methods × text × seeds, one JSON file per run.

    python -m benchmarks.quality --tasks TASKS --text CORPUS/train-05.jsonl.gz --out benchmarks/results/quality

Runs that are already there are skipped, so a stopped benchmark goes on where it was. TASKS is made by
`python -m benchmarks.zoo.skills`. `python -m benchmarks.quality_report` renders the results into docs.
"""

import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from jsonargparse import auto_cli
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from benchmarks.zoo.specs import GRID_SKILLS
from castlora.config import Recipe, RecipeName, Start, Trained, Tuning, resolve_recipe
from castlora.demonstration import demo_models_path
from castlora.distill import measure_held_out
from castlora.evaluation import Evaluation, evaluate_model, load_adapter
from castlora.manifest import peak_memory_bytes, versions
from castlora.models import load_model
from castlora.stages import (
    Plan,
    TextSource,
    align_text,
    answer_prompts,
    choose_prompts,
    draw_text,
    load_models,
    plan_transfer,
    start_student,
    train_student,
)
from castlora.tasks import TaskItem, load_task
from castlora.text import Passage

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


@dataclass(frozen=True)
class Method:
    """A recipe with a start."""

    recipe: RecipeName
    start: Start
    trained: Trained | None = None
    """What is trained, if not what the recipe says."""
    candidates: int | None = None
    """Candidates per prompt of a prompt format, if not the recipe's."""


METHODS = {
    "ridge start": Method("default", "ridge"),
    "ridge start, maps": Method("default", "ridge", trained="maps"),
    "paper start": Method("default", "paper"),
    "fresh": Method("default", "fresh"),
    "ridge start, any prompts": Method("default", "ridge", candidates=1),
    "paper": Method("paper", "paper"),
}
"""The default, its variants, and the paper's recipe as a whole."""

TextRegime = Literal["general", "format", "prompts"]
REGIMES: tuple[TextRegime, ...] = ("general", "format", "prompts")


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
    general_length: int

    def base(self, name: str) -> Path:
        """Folder of a base model: of the zoo, or of the third-party models."""
        places = (self.zoo / "models", demo_models_path(), self.models)
        return next((place / name for place in places if (place / name).exists()), places[0] / name)

    def adapter(self, base: str, skill: str) -> Path:
        """Folder of an adapter of the zoo."""
        return self.zoo / "adapters" / base / skill

    def skill(self, skill: str) -> dict[str, Any]:
        """Description of a skill."""
        return dict(json.loads((self.tasks / skill / "skill.json").read_text()))


def reference_scores(settings: Settings, pair: str, skill: str) -> dict[str, Any]:
    """Scores of the models that every method is compared with."""
    source, target = pair.split(":")
    items = load_task(settings.tasks / skill / "test.jsonl")
    models = {
        "bare target": (target, None),
        "source + LoRA": (source, settings.adapter(source, skill)),
        "retrained": (target, settings.adapter(target, skill)),
    }
    return {
        "pair": pair,
        "skill": skill,
        "references": {name: _score(settings, base, adapter, items) for name, (base, adapter) in models.items()},
    }


@lru_cache(maxsize=16)
def taught_passages(
    settings: Settings, pair: str, skill: str, regime: TextRegime, seed: int, recipe: Recipe
) -> list[Passage]:
    """The text of a run, answers included; all starts of a recipe learn from the same."""
    source, _ = pair.split(":")
    # Only the length of general text depends on the target; prompts serve all targets of a source.
    readers = pair if regime == "general" else f"{source}:{source}"
    models = load_models(_plan(settings, readers, skill))
    drawn = draw_text(models, _text(settings, skill, regime), recipe, seed)
    return answer_prompts(models, choose_prompts(models, drawn, recipe), recipe, seed)


def run_method(settings: Settings, pair: str, skill: str, regime: TextRegime, seed: int, method: str) -> dict[str, Any]:
    """One transfer and its score on held-out test items."""
    started = time.monotonic()
    set_seed(seed)
    chosen = METHODS[method]
    tuning = Tuning(
        trained=chosen.trained,
        candidates=chosen.candidates,
        passages=settings.passages,
        max_length=settings.general_length if regime == "general" else settings.max_length,
    )
    recipe = resolve_recipe(chosen.recipe, chosen.start, settings.steps, settings.batch_size, tuning)
    passages = taught_passages(settings, pair, skill, regime, seed, replace(recipe, start="fresh", trained="maps"))
    plan = _plan(settings, pair, skill)
    models = load_models(plan)
    training, held_out = align_text(models, passages, recipe)
    text_seconds = time.monotonic() - started
    student = start_student(models, plan, recipe, training, plan.rank(recipe, None), seed)
    before = measure_held_out(models.teacher, student, held_out, models.shared, recipe)
    with tempfile.TemporaryDirectory() as state:
        log = train_student(models, student, training, recipe, seed, Path(state), quiet=True)
    after = measure_held_out(models.teacher, student, held_out, models.shared, recipe)
    train_seconds = time.monotonic() - started - text_seconds
    items = load_task(settings.tasks / skill / "test.jsonl")
    evaluation = evaluate_model(student.causal_lm(), models.target_tokenizer, items)
    return {
        "pair": pair,
        "skill": skill,
        "method": method,
        "regime": regime,
        "seed": seed,
        "recipe": asdict(recipe),
        "training_passages": len(training),
        **_figures(evaluation),
        "held_out_kl": [before.kl, after.kl],
        "agreement": [before.agreement, after.agreement],
        "last_loss": log[-1]["loss"],
        "text_seconds": round(text_seconds, 1),
        "train_seconds": round(train_seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def main(
    tasks: Path,
    text: Path,
    out: Path = Path("benchmarks/results/quality"),
    zoo: Path = ZOO,
    third_party: Path = Path("../shared/data/models"),
    pairs: Sequence[str] = PAIRS,
    skills: Sequence[str] = GRID_SKILLS,
    methods: Sequence[str] = tuple(METHODS),
    regimes: Sequence[TextRegime] = REGIMES,
    seeds: int = 3,
    steps: int = 200,
    batch_size: int = 16,
    passages: int = 1000,
    max_length: int = 96,
    general_length: int = 48,
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
        general_length: tokens of a passage of general text, by default about as many as the prompts have
        threads: processor threads
    """
    torch.set_num_threads(threads)
    disable_progress_bar()
    settings = Settings(zoo, third_party, tasks, text, steps, batch_size, passages, max_length, general_length)
    for pair, skill in product(pairs, skills):
        folder = out / pair.replace(":", "--") / skill
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "references.lock"):
            _write_missing(folder / "references.json", partial(reference_scores, settings, pair, skill))
    # Seeds outermost: an early stop leaves every cell with the same number of seeds.
    for seed, pair, skill, regime in product(range(seeds), pairs, skills, regimes):
        folder = out / pair.replace(":", "--") / skill
        try:
            with FileLock(folder / f"{regime}.seed{seed}.lock", timeout=0):
                for method in methods:
                    if METHODS[method].candidates is not None and regime != "format":
                        continue
                    path = folder / f"{method.replace(',', '').replace(' ', '-')}.{regime}.seed{seed}.json"
                    run = partial(run_method, settings, pair, skill, regime, seed, method)
                    _write_missing(path, run)
        except Timeout:
            print(folder, regime, seed, "is being measured by another process", flush=True)


def _write_missing(path: Path, run: Callable[[], dict[str, Any]]) -> None:
    """Runs and writes unless the result is there."""
    if path.exists():
        return
    result = {**run(), "environment": environment()}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)
    print(path, result.get("score", ""), flush=True)


def _plan(settings: Settings, pair: str, skill: str) -> Plan:
    source, target = pair.split(":")
    return plan_transfer(str(settings.adapter(source, skill)), str(settings.base(target)), str(settings.base(source)))


def _text(settings: Settings, skill: str, regime: TextRegime) -> TextSource:
    if regime == "prompts":
        return TextSource(prompts=str(settings.tasks / skill / "prompts.jsonl"))
    prompt_format = settings.skill(skill)["prompt_format"] if regime == "format" else None
    return TextSource(text=str(settings.text), prompt_format=prompt_format)


def _score(settings: Settings, base: str, adapter: Path | None, items: list[TaskItem]) -> dict[str, Any]:
    model, tokenizer = load_model(str(settings.base(base)))
    adapted = load_adapter(model, str(adapter), base) if adapter else model
    return _figures(evaluate_model(adapted, tokenizer, items))


def _figures(evaluation: Evaluation) -> dict[str, Any]:
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


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
