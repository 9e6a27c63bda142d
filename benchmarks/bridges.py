"""Maps that serve many adapters: what they carry of a skill they have not seen, and what they save as a start.

    python -m benchmarks.bridges --tasks TASKS --text CORPUS/train-05.jsonl.gz

One skill is left out, and one set of maps is trained to move the adapters of all others, each along its own unlabelled
prompts. Then the adapter of the skill that was left out goes through these maps: as it comes out, and as the start of a
training, beside the two starts that need no other adapter. What is already there is skipped. The records are rendered
into docs.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from benchmarks.bridge_page import BATCH, BRIDGE_BATCH, BRIDGES, PAIR, STARTS, Found, render
from benchmarks.quality import ZOO, zoo_models
from benchmarks.steps import STEPS
from benchmarks.zoo.specs import GRID_SKILLS
from castlora.adapters.factors import LowRank
from castlora.adapters.live import attach_lora, lora_maps, start_from_factors
from castlora.alignment.positions import AlignedPassage, collate
from castlora.bench.grid import Cell, Settings, record_path, score, write_missing
from castlora.bench.plots import curve_chart
from castlora.bench.quality import reference_scores, run_quality
from castlora.bench.reading import Reading, cell_recipe, read_text
from castlora.bench.spec import BenchmarkSpec
from castlora.bench.trained import Distilled
from castlora.config import Recipe, Tuning
from castlora.distillation.distill import HeldOut, Student, measure_held_out, total_loss
from castlora.distillation.teacher import Teacher
from castlora.distillation.training import ADAM_BETAS, WARMUP_FRACTION, peak_learning_rate, reading_order
from castlora.maps.cast_layer import balance
from castlora.maps.fitting import ridge_maps, solve_in_parts
from castlora.maps.scaling import SOLVED_SCALES, best_scale, losses_by_scale
from castlora.maps.starts import BranchMaps, Maps, fold_maps, parametrize_by_maps
from castlora.models.pairing import Pairing
from castlora.stages import STATISTICS_PASSAGES, hold_teacher, last_layer_to_solve

ADAPTERS = (*GRID_SKILLS, "topic", "record", "shakespeare")
SharedMaps = dict[tuple[str, str], BranchMaps]
"""(target module, source module) → maps, for sources without fused modules. The index of a branch would not do: where
an adapter leaves out the keys, the values have their place."""
_LOOKS = 8
"""How often the maps are looked at while they are trained."""
_MAX_GRADIENT_NORM = 1.0
_PASSAGES, _MAX_LENGTH, _RUNNING_LENGTH = 1000, 96, 48
"""As in the grid."""


@dataclass(frozen=True)
class FromBridge(Distilled):
    """The default recipe, started from given maps instead of the closed form."""

    maps: SharedMaps = field(default_factory=dict)

    def start_student(self, reading: Reading, recipe: Recipe, seed: int) -> Student:
        """The target with the balanced factors of the adapter's fold through the maps; the last layer is free."""
        torch.manual_seed(seed)
        models, plan = reading.models, reading.plan
        last_layer = last_layer_to_solve(models, plan, recipe)
        solved = {last_layer.module} if last_layer else set()
        model = attach_lora(models.target, {*plan.target_modules, *solved}, plan.rank(recipe, None))
        folded = fold_maps(plan.pairing, plan.factors, maps_along(plan.pairing, self.maps))
        start_from_factors(model, {name: balance(lora) for name, lora in folded.items()})
        return Student(model, models.target.config.hidden_size, models.source.config.hidden_size, with_head=False)


@dataclass(frozen=True)
class TaughtAdapter:
    """An adapter, with what source + LoRA says to its prompts."""

    reading: Reading
    teacher: Teacher
    held_out_teacher: Teacher

    def measure(self, student: Student, recipe: Recipe) -> HeldOut:
        """How close a student is to source + LoRA on held-out prompts."""
        shared = self.reading.models.shared
        return measure_held_out(self.held_out_teacher, student, self.reading.held_out, shared, recipe)


def teach_adapter(settings: Settings, skill: str, recipe: Recipe) -> TaughtAdapter:
    """The adapter of a skill with its unlabelled prompts."""
    reading = read_text(settings, Cell(PAIR, skill, "prompts", 0), recipe)
    return TaughtAdapter(reading, *hold_teacher(reading.models, reading.training, reading.held_out, recipe))


def widest(taught: Sequence[TaughtAdapter]) -> Reading:
    """That of the adapter with the most modules, among which are those of the others."""
    return max((adapter.reading for adapter in taught), key=lambda reading: len(reading.plan.factors))


def solve_maps(taught: Sequence[TaughtAdapter], recipe: Recipe) -> Maps:
    """Closed-form maps for all modules, from the prompts of all adapters in equal parts."""
    each = STATISTICS_PASSAGES // len(taught)
    passages = [passage for adapter in taught for passage in adapter.reading.training[:each]]
    models, plan = widest(taught).models, widest(taught).plan
    with models.teacher.disable_adapter():
        return solve_in_parts(
            models.source,
            models.target,
            plan.pairing,
            plan.factors,
            passages,
            lambda moments: ridge_maps(moments, plan.pairing, recipe.ridge),
        )


def carry(model: PeftModel, pairing: Pairing, factors: Mapping[str, LowRank]) -> None:
    """Puts another adapter between the maps of a model that is parametrized by them; nothing where it has no update."""
    for pair in pairing.mapped:
        lora_a, lora_b = lora_maps(model, pair.target.name)
        folded_a, folded_b = (one_map.parametrizations.weight[0] for one_map in (lora_a, lora_b))
        for index, branch in enumerate(pair.branches):
            a, b = folded_a.get_buffer(f"lora_a{index}"), folded_b.get_buffer(f"lora_b{index}")
            update = factors.get(branch.source_module)
            # No update takes no rank, since branches of one module share its ranks.
            setattr(folded_a, f"lora_a{index}", update.a if update else a.new_zeros(0, a.shape[1]))
            setattr(folded_b, f"lora_b{index}", update.b[branch.source_rows] if update else b.new_zeros(b.shape[0], 0))


def maps_along(pairing: Pairing, shared: SharedMaps) -> Maps:
    """Those of the maps that an adapter goes through."""
    return {
        (pair.target.name, index): shared[pair.target.name, one.source_module]
        for pair, index, one in pairing.branches()
    }


def maps_of(model: PeftModel, pairing: Pairing) -> SharedMaps:
    """The maps as they stand in a model that is parametrized by them."""
    maps = {}
    for pair, index, branch in pairing.branches():
        weights = [linear.parametrizations.weight for linear in lora_maps(model, pair.target.name)]
        to_source, from_source = (getattr(weight, f"original{index}").detach().clone() for weight in weights)
        maps[pair.target.name, branch.source_module] = BranchMaps(to_source, from_source)
    return maps


def learn_maps(
    taught: Sequence[TaughtAdapter], start: Maps, rank: int, recipe: Recipe, look: Callable[[int, Student], None]
) -> SharedMaps:
    """Trains one set of maps to move every adapter, a random one at each step.

    Args:
        taught: adapters of one source for one target
        start: maps to begin with
        rank: the largest of the adapters, those that are only looked at too
        recipe: objective, steps and batch size
        look: called with the number of steps behind it and the student, before the first step and after each
    """
    models, plan = widest(taught).models, widest(taught).plan
    model = attach_lora(models.target, plan.target_modules, rank)
    parametrize_by_maps(model, plan.pairing, plan.factors, start)
    student = Student(model, models.target.config.hidden_size, models.source.config.hidden_size, with_head=False)
    parameters = list(student.trainable().values())
    rate = peak_learning_rate(recipe, student.hidden_size) * recipe.map_learning_rate_ratio
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=ADAM_BETAS, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP_FRACTION * recipe.steps), recipe.steps)
    turns = random.Random(0)
    batches = [_batches(adapter, recipe) for adapter in taught]
    look(0, student)
    for step in tqdm(range(1, recipe.steps + 1), desc="maps", unit="step"):
        index = turns.randrange(len(taught))
        adapter = taught[index]
        carry(model, plan.pairing, adapter.reading.plan.factors)
        batch = collate(next(batches[index]))
        losses = student(adapter.teacher.predict(batch), batch, adapter.reading.models.shared, recipe)
        total_loss(losses, recipe).backward()
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        look(step, student)
    return maps_of(model, plan.pairing)


def _batches(adapter: TaughtAdapter, recipe: Recipe) -> Iterator[list[AlignedPassage]]:
    size = recipe.batch_size
    order = reading_order(adapter.reading.training, recipe.steps * size, size, seed=0)
    return (order[start : start + size] for start in range(0, len(order), size))


def look_at(
    settings: Settings,
    seen: Sequence[TaughtAdapter],
    unseen: TaughtAdapter,
    skill: str,
    recipe: Recipe,
    student: Student,
) -> dict[str, Any]:
    """What maps carry, of the adapters that they were trained with and of one that they were not.

    Without training nothing says how strong an update must be, so that of several scales the one is taken that fits
    the unseen skill's held-out prompts best.
    """
    pairing, known = widest(seen).plan.pairing, []
    for adapter in seen:
        carry(student.model, pairing, adapter.reading.plan.factors)
        known.append(adapter.measure(student, recipe).kl)
    carry(student.model, pairing, unseen.reading.plan.factors)
    losses = losses_by_scale(student, lambda scaled: unseen.measure(scaled, recipe), SOLVED_SCALES)
    scale = best_scale(losses)
    with rescale_adapter_scale(student.model, scale):
        held_out = unseen.measure(student, recipe)
        scored = score(settings.spec, student.causal_lm(), unseen.reading.models.target_tokenizer, skill)
    with rescale_adapter_scale(student.model, 0.0):
        bare = unseen.measure(student, recipe)
    return {
        "seen_kl": float(np.mean(known)), "unseen": asdict(held_out), "bare_kl": bare.kl, "scale": scale, **scored,
    }  # fmt: skip


def learn_bridge(settings: Settings, adapters: Sequence[str], skill: str) -> tuple[SharedMaps, dict[str, Any]]:
    """Trains maps on all adapters but that of a skill, and tells how they did on the way."""
    cell = Cell(PAIR, skill, "prompts", 0)
    recipe = cell_recipe(settings, cell, "default", "ridge", Tuning(trained="maps", rehearsal_weight=0.0))
    seen = [teach_adapter(settings, other, recipe) for other in adapters if other != skill]
    unseen = teach_adapter(settings, skill, recipe)
    points = []

    def look(step: int, student: Student) -> None:
        if step * _LOOKS % recipe.steps == 0:
            points.append({"step": step, **look_at(settings, seen, unseen, skill, recipe, student)})

    rank = max(adapter.reading.plan.rank(recipe, None) for adapter in (*seen, unseen))
    maps = learn_maps(seen, solve_maps(seen, recipe), rank, recipe, look)
    references = reference_scores(settings.spec, PAIR, skill)
    return maps, {**references, "seed": cell.seed, "recipe": asdict(recipe), "points": points}


def shared_maps(settings: Settings, adapters: Sequence[str], skill: str, record: Path, maps_file: Path) -> SharedMaps:
    """The maps that have not seen a skill's adapter, learned if they are not there."""
    if not maps_file.exists():
        maps, learned = learn_bridge(settings, adapters, skill)
        write_missing(record, lambda: learned)
        # Last, so that a run that was stopped before it has no maps without a record.
        write_maps(maps, maps_file)
    return read_maps(maps_file)


def write_maps(maps: SharedMaps, file: Path) -> None:
    """Writes maps for `read_maps`."""
    tensors = {}
    for (target_module, source_module), one in maps.items():
        tensors[f"{target_module}/{source_module}/to_source"] = one.to_source.contiguous()
        tensors[f"{target_module}/{source_module}/from_source"] = one.from_source.contiguous()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


def read_maps(file: Path) -> SharedMaps:
    """The maps that `write_maps` wrote."""
    sides: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(file).items():
        target_module, source_module, side = key.split("/")
        sides.setdefault((target_module, source_module), {})[side] = tensor
    return {key: BranchMaps(**of_branch) for key, of_branch in sides.items()}


def main(
    tasks: Path,
    text: Path,
    work: Path = Path("bridges"),
    out: Path = Path("benchmarks/results/bridges"),
    page: Path = Path("docs/bridges.md"),
    third_party: Path = Path("../shared/data/models"),
    skills: Sequence[str] = GRID_SKILLS,
    adapters: Sequence[str] = ADAPTERS,
    steps: Sequence[int] = STEPS,
    bridge_steps: int = 2000,
) -> None:
    """Runs what is missing, and renders it.

    Args:
        tasks: folder of task files, one folder per skill
        text: general text
        work: folder of the maps, which are no result
        out: folder of the results
        page: Markdown file to write
        third_party: folder of models that the zoo does not hold
        skills: each is left out once
        adapters: names of all skills, the one that is left out too
        steps: numbers of optimizer steps from each start
        bridge_steps: optimizer steps of the maps
    """
    torch.set_num_threads(1)
    disable_progress_bar()
    models = zoo_models(ZOO, third_party)
    spec = BenchmarkSpec(models, [PAIR], list(skills), str(tasks), str(text)).narrowed(regimes=["prompts"])
    others = [start for start in STARTS if start not in BRIDGES]
    for number in steps:
        run_quality(spec, out / "steps" / str(number), others, seeds=1, steps=number, batch_size=BATCH)
    (out / "learned").mkdir(parents=True, exist_ok=True)
    for skill in skills:
        cell, record = Cell(PAIR, skill, "prompts", 0), out / "learned" / f"{skill}.json"
        of_maps = Settings(spec, bridge_steps, BRIDGE_BATCH, _PASSAGES, _MAX_LENGTH, _RUNNING_LENGTH)
        maps = partial(shared_maps, of_maps, adapters, skill, record, work / f"{skill}.safetensors")
        for number in steps:
            settings = replace(of_maps, steps=number, batch_size=BATCH)
            for method in BRIDGES:
                file = record_path(out / "steps" / str(number), cell, method)
                write_missing(file, partial(move, settings, cell, method, maps))
    found, chart = Found.read(out, skills), page.with_suffix(".svg")
    page.write_text(render(found, chart.name), encoding="utf-8")
    chart.write_text(curve_chart(found.curves(), "optimizer steps", "lift"), encoding="utf-8")


def move(settings: Settings, cell: Cell, method: str, maps: Callable[[], SharedMaps]) -> dict[str, Any]:
    """The record of a training that starts from shared maps."""
    fields = {"pair": cell.pair, "skill": cell.skill, "regime": cell.regime, "seed": cell.seed, "method": method}
    return {**fields, **FromBridge("default", BRIDGES[method], maps=maps()).run(settings, cell)}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
