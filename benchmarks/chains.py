"""How much of a skill is left after two moves: S → T → U beside S → U, each with unlabelled prompts.

    python -m benchmarks.chains --tasks TASKS

The second move takes the adapter that the first one wrote; the task's labels are never seen. Moves that are already in
the record are skipped. The record is rendered into docs.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality import ZOO, zoo_models
from benchmarks.zoo.specs import GRID_SKILLS
from castlora import evaluate, transfer
from castlora.bench.grid import environment
from castlora.bench.spec import BenchmarkModel
from castlora.execution.run_directory import write_whole
from castlora.lift import bootstrap_interval

CHAINS = ("llama-s:mistral-s:llama-m", "llama-s:gpt2-s:gpt2-m", "gpt2-s:llama-s:mistral-s")
_STEPS, _BATCH = 800, 4
_INTRODUCTION = """
A skill is moved from S to T, and the adapter that this wrote is moved on from T to U, beside the direct move from S to
U. Each move reads unlabelled prompts of the task and nothing else, and starts from closed-form maps;
no label is seen. Lift on U is (moved − bare U) /
(adapter retrained on U − bare U), lift on T likewise. Lost at the second hop is the lift on T
minus the lift on U of the chain.
"""


def move(models: Mapping[str, BenchmarkModel], route: Sequence[str], skill: str, tasks: Path, seed: int) -> list[float]:
    """Accuracy on each model of a route but the first, as the skill is moved from model to model."""
    scores = []
    adapter = models[route[0]].adapters.replace("{skill}", skill)
    with tempfile.TemporaryDirectory() as temporary:
        for hop, (source, target) in enumerate(pairwise(route)):
            out = Path(temporary) / str(hop)
            places = {"adapter": adapter, "source": models[source].base, "target": models[target].base}
            prompts = str(tasks / skill / "prompts.jsonl")
            transfer(**places, prompts=prompts, out=str(out), start="ridge", steps=_STEPS, batch_size=_BATCH, seed=seed)
            adapter = str(out)
            scores.append(accuracy(models, target, skill, tasks, adapter))
    return scores


def accuracy(
    models: Mapping[str, BenchmarkModel], model: str, skill: str, tasks: Path, adapter: str | None = None
) -> float:
    """Accuracy of a model on the test items of a skill."""
    scored = evaluate(models[model].base, str(tasks / skill / "test.jsonl"), adapter)
    return float(scored["score"])


def measure(
    models: Mapping[str, BenchmarkModel], chain: str, skill: str, tasks: Path, seed: int
) -> dict[str, str | int | float]:
    """Lifts of one chain and skill."""
    first, middle, last = chain.split(":")

    def lift(score: float, model: str) -> float:
        bare = accuracy(models, model, skill, tasks)
        retrained = accuracy(models, model, skill, tasks, models[model].adapters.replace("{skill}", skill))
        return (score - bare) / (retrained - bare)

    (direct,) = move(models, (first, last), skill, tasks, seed)
    halfway, chained = move(models, (first, middle, last), skill, tasks, seed)
    return {
        "chain": chain,
        "skill": skill,
        "seed": seed,
        "first_hop": lift(halfway, middle),
        "chained": lift(chained, last),
        "direct": lift(direct, last),
    }


def render(record: Mapping[str, Any]) -> str:
    """The record as a page."""
    rows = ["| chain | skill | lift on T | lift on U, by way of T | lift on U, direct |", "|---|---|---|---|---|"]
    for run in record["runs"]:
        lifts = " | ".join(f"{run[field]:.2f}" for field in ("first_hop", "chained", "direct"))
        rows.append(f"| {run['chain'].replace(':', ' → ')} | {run['skill']} | {lifts} |")
    means = [np.mean([run[field] for run in record["runs"]]) for field in ("first_hop", "chained", "direct")]
    rows.append(f"| mean | | {means[0]:.2f} | {means[1]:.2f} | {means[2]:.2f} |")
    lost = {
        "at the second hop": _differences(record, "first_hop", "chained"),
        "against the direct move": _differences(record, "direct", "chained"),
    }
    summary = ", ".join(f"{what} {mean:+.2f} [{low:+.2f}, {high:+.2f}]" for what, (mean, (low, high)) in lost.items())
    made_with = record["environment"]
    footer = (
        f"{_STEPS} steps × {_BATCH} prompts, seed {record['runs'][0]['seed']}; commit {made_with['commit'][:10]}; "
        f"{made_with['machine']}; torch {made_with['versions']['torch']}."
    )
    sections = [
        "# Chains", " ".join(_INTRODUCTION.split()), "\n".join(rows),
        f"Lift lost, with a bootstrap 95 % interval over chains and skills: {summary}.", footer,
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def _differences(record: Mapping[str, Any], before: str, after: str) -> tuple[float, tuple[float, float]]:
    differences = np.array([run[before] - run[after] for run in record["runs"]])
    return float(differences.mean()), bootstrap_interval(differences)


def main(
    tasks: Path,
    record: Path = Path("benchmarks/results/chains.json"),
    page: Path = Path("docs/chains.md"),
    third_party: Path = Path("../shared/data/models"),
    chains: Sequence[str] = CHAINS,
    skills: Sequence[str] = GRID_SKILLS,
    seed: int = 0,
) -> None:
    """Runs what is missing of the record, and renders it.

    Args:
        tasks: folder of task files, one folder per skill
        record: JSON file of the results
        page: Markdown file to write
        third_party: folder of models that the zoo does not hold
        chains: S:T:U, each
        skills: names of skills
        seed: of everything random
    """
    torch.set_num_threads(1)
    disable_progress_bar()
    models = zoo_models(ZOO, third_party)
    runs = json.loads(record.read_text())["runs"] if record.exists() else []
    done = {(run["chain"], run["skill"], run["seed"]) for run in runs}
    for chain, skill in product(chains, skills):
        if (chain, skill, seed) not in done:
            runs.append(measure(models, chain, skill, tasks, seed))
            write_whole(record, json.dumps({"runs": runs, "environment": environment()}, indent=1) + "\n")
    page.write_text(render(json.loads(record.read_text())), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
