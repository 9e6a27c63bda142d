"""What castlora's steps cost beside the bare work in them, as ratios of times that are taken in turns."""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from castlora.adapters import LowRank
from castlora.config import Recipe, ShapeName, Tuning, resolve_recipe
from castlora.distill import Student, distillation_losses, read_batch, total_loss
from castlora.errors import UserError
from castlora.maps import fold_from_source, fold_to_source
from castlora.models import best_device, linear_slots
from castlora.pairing import Pairing, pair_modules
from castlora.positions import AlignedPassage, Batch, batches
from castlora.stages import train_student
from castlora.starts import (
    Maps,
    attach_lora,
    cast_layer,
    collect_moments,
    fold_maps,
    lora_maps,
    parametrize_by_maps,
    random_maps,
    ridge_maps,
    start_from_factors,
    student_factors,
)
from castlora.teacher import LiveTeacher, RecordedTeacher, Teacher
from castlora.vocabulary import SharedVocabulary

_STEPS = 40
"""Optimizer steps of a timed training."""
_FEW_STEPS = 5
"""Steps where sizes grow."""
_NEW_TOKENS = 32
_FIT_BATCH = 16
_RIDGE = 0.01


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-style model."""

    layers: int
    width: int
    mlp: int
    heads: int
    vocabulary: int


SHAPES: dict[ShapeName, Shape] = {
    "zoo": Shape(4, 128, 344, 4, 2048),
    "1b": Shape(16, 2048, 5632, 32, 32000),
    "7b": Shape(32, 4096, 11008, 32, 32000),
}


@dataclass(frozen=True)
class Workload:
    """What is timed: two models of one shape with random weights, and random text."""

    shape: Shape
    rank: int = 8
    passages: int = 512
    tokens: int = 48
    answer_tokens: int = 8
    """Tokens at the end of a passage whose predictions count, as those of an answer do."""
    batch_size: int = 4


@dataclass(frozen=True)
class Ratio:
    """Times of one thing against those of another."""

    measure: str
    of: str
    to: str
    seconds: dict[str, list[float]]
    """Name → seconds of every repetition."""
    at_most: float
    """What the ratio should not exceed."""

    @property
    def ratios(self) -> list[float]:
        """One ratio per repetition, of times that were taken one after the other."""
        return [one / other for one, other in zip(self.seconds[self.of], self.seconds[self.to], strict=True)]

    @property
    def median(self) -> float:
        """The ratio in the middle."""
        return median(self.ratios)


@dataclass(frozen=True)
class Growth:
    """Times at sizes that double."""

    measure: str
    size: str
    seconds: dict[int, float]
    """Size → shortest time of the repetitions."""


@dataclass(frozen=True)
class _Pair:
    """Two models in memory, and text."""

    work: Workload
    teacher: PeftModel
    source: PreTrainedModel
    target: PreTrainedModel
    pairing: Pairing
    factors: dict[str, LowRank]
    shared: SharedVocabulary
    passages: list[AlignedPassage]

    @property
    def modules(self) -> list[str]:
        return [pair.target.name for pair in self.pairing.mapped]

    def maps(self) -> Maps:
        return random_maps(self.pairing, self.factors, seed=0)

    def plain(self) -> PeftModel:
        """A copy of the target with a plain LoRA whose update is not zero."""
        model = attach_lora(copy.deepcopy(self.target), self.modules, self.work.rank)
        for name in self.modules:
            nn.init.normal_(lora_maps(model, name)[1].weight, std=0.01)
        return model.to(best_device())

    def folded(self) -> PeftModel:
        """A copy of the target with what the maps fold into."""
        model = attach_lora(copy.deepcopy(self.target), self.modules, self.work.rank)
        start_from_factors(model, fold_maps(self.pairing, self.factors, self.maps()))
        return model.to(best_device())

    def unfolded(self) -> PreTrainedModel:
        """A copy of the target whose modules run the maps around the source's LoRA."""
        model, maps = copy.deepcopy(self.target), self.maps()
        for pair, index, branch in self.pairing.branches():
            layer = cast_layer(branch, self.factors, maps[pair.target.name, index]).to(best_device())

            def add(_module: nn.Module, arguments: tuple[Tensor], output: Tensor, layer: nn.Module = layer) -> Tensor:
                changed: Tensor = output + layer(arguments[0].float()).to(output.dtype)
                return changed

            model.get_submodule(pair.target.name).register_forward_hook(add)
        return model

    def student(self, trained: Literal["maps", "factors"]) -> Student:
        model = attach_lora(copy.deepcopy(self.target), self.modules, self.work.rank)
        if trained == "maps":
            parametrize_by_maps(model, self.pairing, self.factors, self.maps())
        width = self.work.shape.width
        return Student(model, width, width, with_head=False).to(best_device())


def measure_speed(shape: ShapeName, repeats: int, seed: int) -> dict[str, Any]:
    """Times everything.

    Args:
        shape: of both models
        repeats: how often each time is taken
        seed: of weights and text

    Returns:
        `workload`, `ratios`, `folding` and `growth`

    Raises:
        UserError: too few repetitions.
    """
    if repeats < 2:
        raise UserError(f"repeats is {repeats}; give 2 or more, so that there is a spread.")
    work = Workload(SHAPES[shape])
    pair = _make_pair(work, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ratios = [*serving(pair, repeats), fitting(pair, repeats), *distillation(pair, repeats)]
    return {
        "shape": shape,
        "seed": seed,
        "workload": asdict(work),
        "ratios": [{**asdict(ratio), "ratios": ratio.ratios, "median": ratio.median} for ratio in ratios],
        "folding": [folding(name, work.rank, repeats) for name in ("zoo", "7b")],
        "growth": [asdict(growth) for growth in grow(work, repeats, seed)],
    }


def side_by_side(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, taken in turns after a first call of each."""
    for function in functions.values():
        function()
    rounds = [{name: _seconds(function) for name, function in functions.items()} for _ in range(repeats)]
    return {name: [times[name] for times in rounds] for name in functions}


def _seconds(function: Callable[[], object]) -> float:
    _wait()
    started = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    """Lets an accelerator finish what it was given."""
    if best_device().type != "cpu":
        torch.accelerator.synchronize()


def serving(pair: _Pair, repeats: int) -> list[Ratio]:
    """Writing text with the folded adapter, a plain LoRA of its rank, and the maps left unfolded."""
    prompts = torch.tensor([passage.target_ids for passage in pair.passages[: pair.work.batch_size]])
    prompts = prompts.to(best_device())
    models = {"folded adapter": pair.folded(), "plain LoRA": pair.plain(), "unfolded maps": pair.unfolded()}

    def write(model: Any) -> Callable[[], object]:
        counts = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS}
        return lambda: model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=0, **counts
        )

    seconds = side_by_side({name: write(model) for name, model in models.items()}, repeats)
    return [
        Ratio("serving", "folded adapter", "plain LoRA", _of(seconds, "folded adapter", "plain LoRA"), 1.0),
        Ratio("serving", "folded adapter", "unfolded maps", _of(seconds, "folded adapter", "unfolded maps"), 1.0),
    ]


def fitting(pair: _Pair, repeats: int) -> Ratio:
    """The closed-form maps against running both models over the same text."""
    with pair.teacher.disable_adapter():
        names = "closed-form maps", "forward passes of both models"
        seconds = side_by_side({names[0]: partial(_fit, pair), names[1]: partial(_read, pair)}, repeats)
    return Ratio("fit", *names, seconds, 1.15)


def distillation(pair: _Pair, repeats: int) -> list[Ratio]:
    """Trainings against the passes that they cannot do without."""
    live = LiveTeacher(pair.teacher, with_hidden=False)
    recorded = RecordedTeacher(pair.teacher, pair.passages, with_hidden=False)
    factors, maps, plain = pair.student("factors"), pair.student("maps"), pair.plain()
    both, alone = "bare passes of source + LoRA and target", "bare passes of the target"
    functions: dict[str, Callable[[], object]] = {
        "training": partial(_train, pair, live, factors),
        "training of maps": partial(_train, pair, live, maps),
        "objective and its gradient": partial(_objective_steps, pair, live, factors, _STEPS),
        both: partial(_bare_steps, pair, plain, pair.teacher),
        "training on remembered predictions": partial(_train, pair, recorded, factors),
        alone: partial(_bare_steps, pair, plain, None),
    }
    seconds = side_by_side(functions, repeats)
    compared = [
        ("objective and its gradient", both),
        ("training", both),
        ("training of maps", both),
        ("training on remembered predictions", alone),
    ]
    return [Ratio("distillation", of, to, _of(seconds, of, to), 1.10) for of, to in compared]


def folding(name: ShapeName, rank: int, repeats: int) -> dict[str, Any]:
    """Seconds to fold an adapter of a model's every module, with the maps of one layer in memory."""
    shape = SHAPES[name]
    to_mlp, from_mlp = (shape.width, shape.mlp), (shape.mlp, shape.width)
    sides = [(shape.width, shape.width)] * 4 + [to_mlp, to_mlp, from_mlp]
    maps = {width: torch.randn(width, width) for width in {shape.width, shape.mlp}}
    factors = [(torch.randn(rank, d_in), torch.randn(d_out, rank)) for d_in, d_out in sides]

    def fold() -> None:
        for _ in range(shape.layers):
            for a, b in factors:
                fold_to_source(a, maps[a.shape[1]])
                fold_from_source(maps[b.shape[0]], b)

    seconds = side_by_side({"fold": fold}, repeats)["fold"]
    map_bytes = 4 * sum(d_in**2 + d_out**2 for d_in, d_out in sides)
    return {"shape": name, "rank": rank, "seconds": seconds, "map_bytes_per_layer": map_bytes}


def grow(work: Workload, repeats: int, seed: int) -> list[Growth]:
    """Seconds of the closed-form maps and of a training step as sizes double."""
    shape = work.shape
    sizes: dict[str, dict[int, Workload]] = {
        "passages": {n: replace(work, passages=n) for n in _doublings(work.passages // 8)},
        "layers": {n: replace(work, shape=replace(shape, layers=n)) for n in _doublings(max(1, shape.layers // 2))},
        "width": {n: _widened(work, n) for n in _doublings(shape.width // 2)},
        "rank": {n: replace(work, rank=n) for n in _doublings(work.rank)},
    }
    found = []
    for size, works in tqdm(sizes.items(), desc="growth", unit="size"):
        seconds: dict[str, dict[int, float]] = {"closed-form maps": {}, "objective and its gradient": {}}
        for number, grown in works.items():
            pair = _make_pair(grown, seed)
            live, student = LiveTeacher(pair.teacher, with_hidden=False), pair.student("factors")
            with pair.teacher.disable_adapter():
                fits = side_by_side({"fit": partial(_fit, pair)}, repeats)["fit"]
            steps = side_by_side({"step": partial(_objective_steps, pair, live, student, _FEW_STEPS)}, repeats)["step"]
            seconds["closed-form maps"][number], seconds["objective and its gradient"][number] = (
                min(fits),
                min(steps) / _FEW_STEPS,
            )
        found += [Growth(measure, size, of_measure) for measure, of_measure in seconds.items()]
    return found


def _widened(work: Workload, width: int) -> Workload:
    shape = work.shape
    return replace(work, shape=replace(shape, width=width, mlp=width * shape.mlp // shape.width))


def _doublings(first: int) -> Iterator[int]:
    return (first << power for power in range(4))


def _of(seconds: Mapping[str, list[float]], *names: str) -> dict[str, list[float]]:
    return {name: seconds[name] for name in names}


def _make_pair(work: Workload, seed: int) -> _Pair:
    shape = work.shape
    sizes: dict[str, Any] = {
        "hidden_size": shape.width, "intermediate_size": shape.mlp, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.heads, "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        source = LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False).to(best_device())
        target = MistralForCausalLM(MistralConfig(**sizes)).eval().requires_grad_(False).to(best_device())
        slots = linear_slots(source, source.config)
        teacher = attach_lora(source, slots, work.rank).requires_grad_(False)
        for name in slots:
            nn.init.normal_(lora_maps(teacher, name)[1].weight, std=0.01)
        rows = torch.randint(shape.vocabulary, (work.passages, work.tokens)).tolist()
    pairing = pair_modules(slots, linear_slots(target, target.config), slots)
    places = list(range(work.tokens))
    weights = [float(place >= work.tokens - work.answer_tokens) for place in places]
    everything = torch.arange(shape.vocabulary)
    shared = SharedVocabulary(everything, everything, everything, everything, is_whole=True)
    passages = [AlignedPassage(row, row, places, places, weights) for row in rows]
    return _Pair(work, teacher, source, target, pairing, student_factors(teacher, slots), shared, passages)


def _fit(pair: _Pair) -> Maps:
    return ridge_maps(collect_moments(pair.source, pair.target, pair.pairing, pair.passages), pair.pairing, _RIDGE)


@torch.no_grad()
def _read(pair: _Pair) -> None:
    for batch in batches(pair.passages, _FIT_BATCH, best_device()):
        pair.source(input_ids=batch["source_ids"], attention_mask=batch["source_mask"], use_cache=False)
        pair.target(input_ids=batch["target_ids"], attention_mask=batch["target_mask"], use_cache=False)


def _recipe(work: Workload) -> Recipe:
    return resolve_recipe("default", "fresh", _STEPS, work.batch_size, Tuning())


def _train(pair: _Pair, teacher: Teacher, student: Student) -> None:
    with tempfile.TemporaryDirectory() as state:
        read = pair.passages[: _STEPS * pair.work.batch_size]
        train_student(teacher, student, pair.shared, read, _recipe(pair.work), 0, Path(state), quiet=True)


def _objective_steps(pair: _Pair, teacher: Teacher, student: Student, steps: int) -> None:
    """What a training computes, without an optimizer and the Trainer around it."""
    recipe = _recipe(pair.work)
    read: Sequence[Batch] = list(batches(pair.passages[: steps * recipe.batch_size], recipe.batch_size, best_device()))
    for step in range(steps):
        batch = read[step % len(read)]
        losses = distillation_losses(*read_batch(teacher, student, batch), batch, None, pair.shared, recipe)
        total_loss(losses, recipe).backward()
        student.zero_grad()


def _bare_steps(pair: _Pair, student: PeftModel, teacher: PeftModel | None) -> None:
    """As many passes as a training makes, without an objective that compares, and without an optimizer."""
    used, kept = pair.passages[: _STEPS * pair.work.batch_size], pair.work.answer_tokens
    for batch in batches(used, pair.work.batch_size, best_device()):
        if teacher is not None:
            with torch.no_grad():
                teacher(input_ids=batch["source_ids"], attention_mask=batch["source_mask"], logits_to_keep=kept)
        output = student(input_ids=batch["target_ids"], attention_mask=batch["target_mask"], logits_to_keep=kept)
        output.logits.float().log_softmax(-1).mean().backward()
        student.zero_grad()
