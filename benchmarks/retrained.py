"""How much an adapter that is retrained on the target differs from seed to seed: the ceiling that lift is measured by.

    python -m benchmarks.retrained --tasks TASKS --held_out_text CORPUS/valid.jsonl.gz

Adapters that are already in the record are skipped. The records are rendered into docs.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality import PAIRS, ZOO, zoo_models
from benchmarks.zoo.specs import ADAPTERS, GRID_SKILLS
from benchmarks.zoo.train_adapters import LEARNING_RATE, adapt
from castlora.bench.grid import score, write_missing
from castlora.bench.results import References, read_results
from castlora.bench.spec import BenchmarkSpec
from castlora.bench.tables import mean_with_interval, measured_with
from castlora.models.loading import load_model

Learned = tuple[str, str]
"""A base model, or a pair, and a skill."""
TRAINED = {
    (adapter.base, adapter.skill): adapter.steps
    for adapter in ADAPTERS
    if adapter.skill in GRID_SKILLS and any(adapter.base in pair.split(":") for pair in PAIRS)
}
"""How many steps the adapters of the grid were trained for."""
_INTRODUCTION = """
Lift is (transferred − bare target) / (retrained − bare target), and the retrained adapters that it is measured by are
those of seed 0. Here the same adapters are trained again from other seeds: same data, labels, rank, steps and learning
rate, another start and another order of the examples. Their lift is what a transfer that equals retraining would have,
had the ceiling been drawn again.
"""


def record_path(out: Path, base: str, skill: str, seed: int) -> Path:
    """File of one adapter."""
    return out / base / f"{skill}.seed{seed}.json"


def retrain(spec: BenchmarkSpec, base: str, skill: str, seed: int) -> dict[str, Any]:
    """Trains an adapter on the labels of a task as the zoo's are, and scores it."""
    model, tokenizer = load_model(spec.base(base))
    adapted, _ = adapt(model, tokenizer, Path(spec.tasks) / skill, seed, TRAINED[base, skill], LEARNING_RATE)
    scored = score(spec, adapted, tokenizer, skill)
    return {"base": base, "skill": skill, "seed": seed, "steps": TRAINED[base, skill], **scored}


def ceilings(references: References) -> dict[Learned, tuple[float, float]]:
    """Scores of the bare target and of the retrained one, by target and skill."""
    return {
        (pair.split(":")[1], skill): (scores["bare target"]["score"], scores["retrained"]["score"])
        for (pair, skill), scores in references.items()
    }


def lifts_by_seed(references: References, records: Sequence[Mapping[str, Any]]) -> dict[int, dict[Learned, float]]:
    """Lift of retrained adapters on every pair and skill whose target they were trained on."""
    of_target = ceilings(references)
    scores = {(record["base"], record["skill"], record["seed"]): record["score"] for record in records}
    lifts: dict[int, dict[Learned, float]] = {}
    for seed, (pair, skill) in product(sorted({record["seed"] for record in records}), references):
        target = pair.split(":")[1]
        if (target, skill, seed) in scores:
            bare, retrained = of_target[target, skill]
            lifts.setdefault(seed, {})[pair, skill] = (scores[target, skill, seed] - bare) / (retrained - bare)
    return lifts


def pooled(lifts: Mapping[int, Mapping[Learned, float]]) -> list[float]:
    """Mean over the seeds of each pair and skill, which then has one voice."""
    places = dict.fromkeys(place for of_seed in lifts.values() for place in of_seed)
    return [float(np.mean([of_seed[place] for of_seed in lifts.values() if place in of_seed])) for place in places]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """What `retrain` found, of all adapters in the record."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]


def render(references: References, records: Sequence[dict[str, Any]]) -> str:
    """The page."""
    lifts = lifts_by_seed(references, records)
    seeds = list(lifts)
    rows = [
        f"| target | skill | bare | seed 0 | {' | '.join(f'seed {seed}' for seed in seeds)} |",
        "|---" * (4 + len(seeds)) + "|",
    ]
    scores = {(record["base"], record["skill"], record["seed"]): record["score"] for record in records}
    for (target, skill), (bare, retrained) in sorted(ceilings(references).items()):
        again = [scores.get((target, skill, seed)) for seed in seeds]
        written = " | ".join("–" if value is None else f"{value:.3f}" for value in again)
        rows.append(f"| {target} | {skill} | {bare:.3f} | {retrained:.3f} | {written} |")
    means = [
        f"Seed {seed}: mean lift {mean_with_interval(list(of_seed.values()))} over {len(of_seed)} pairs and skills."
        for seed, of_seed in lifts.items()
    ]
    together = f"Together: {mean_with_interval(pooled(lifts))}; intervals are bootstrap 95 % over pairs and skills."
    parts = ["# Retrained adapters of other seeds", " ".join(_INTRODUCTION.split()), " ".join([*means, together])]
    return "\n\n".join([*parts, "\n".join(rows), "## Environment", measured_with(records)]) + "\n"


def main(
    tasks: Path,
    held_out_text: Path,
    out: Path = Path("benchmarks/results/retrained"),
    results: Path = Path("benchmarks/results/quality"),
    page: Path = Path("docs/retrained.md"),
    third_party: Path = Path("../shared/data/models"),
    bases: Sequence[str] = tuple(dict.fromkeys(base for base, _ in TRAINED)),
    seeds: Sequence[int] = (1, 2),
) -> None:
    """Trains what is missing, and renders all that is there.

    Args:
        tasks: folder of task files, one folder per skill
        held_out_text: general text that nothing was trained on
        out: folder of the records
        results: folder of the quality benchmark, for the scores that lift is measured by
        page: Markdown file to write
        third_party: folder of models that the zoo does not hold
        bases: names of base models
        seeds: of the start of an adapter and the order of the examples
    """
    torch.set_num_threads(1)
    disable_progress_bar()
    models = zoo_models(ZOO, third_party)
    spec = BenchmarkSpec(models, [], list(GRID_SKILLS), str(tasks), held_out_text=str(held_out_text))
    wanted = [(base, skill, seed) for seed, base, skill in product(seeds, bases, GRID_SKILLS)]
    for base, skill, seed in tqdm(wanted, desc="adapters", unit="adapter"):
        path = record_path(out, base, skill, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_missing(path, partial(retrain, spec, base, skill, seed))
    page.write_text(render(read_results(results)[0], read_records(out)), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
