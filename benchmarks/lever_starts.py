"""Other ways to begin a transfer, each of which departs from the default's start in one thing.

Each takes what a cell reads, its recipe and its seed, and returns the target with the LoRA that training starts from.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from castlora.adapters.factors import LowRank
from castlora.adapters.live import attach_lora, lora_maps, start_from_factors
from castlora.alignment.positions import AlignedPassage, Batch, Side, batches, counted_places
from castlora.bench.reading import Reading
from castlora.config import Recipe
from castlora.distillation.distill import Student
from castlora.distillation.teacher import predict
from castlora.evaluation.similarity import measure_similarity
from castlora.maps.cast_layer import balance, fold_from_source, merge_branches
from castlora.maps.fitting import SiteMoments, collect_moments, input_site, ridge_factors, rows_at, solve_in_parts
from castlora.maps.solvers import ridge_map
from castlora.maps.statistics import Moments
from castlora.models.pairing import Branch, ModulePair, Pairing
from castlora.stages import STATISTICS_PASSAGES
from castlora.text.passages import Passage

Begin = Callable[[Reading, Recipe, int], Student]
_GRADIENT_BATCH = 16
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def closed_form(reading: Reading, recipe: Recipe) -> dict[str, LowRank]:
    """The default's start before its factors are balanced."""
    models, plan = reading.models, reading.plan

    def solve(moments: SiteMoments) -> dict[str, LowRank]:
        return ridge_factors(moments, plan.pairing, plan.factors, recipe.ridge)

    with models.teacher.disable_adapter():
        return solve_in_parts(
            models.source, models.target, plan.pairing, plan.factors, reading.training[:STATISTICS_PASSAGES], solve
        )


def student_with(
    reading: Reading, recipe: Recipe, seed: int, factors: Mapping[str, LowRank], rank: int | None = None
) -> Student:
    """The target with a LoRA of given factors.

    Args:
        reading: models and text
        recipe: of the transfer
        seed: of the ranks that the factors leave free
        factors: by target module; none for a fresh LoRA
        rank: of the LoRA, by default the one that a transfer takes
    """
    torch.manual_seed(seed)
    models, plan = reading.models, reading.plan
    model = attach_lora(models.target, plan.target_modules, rank or plan.rank(recipe, None))
    start_from_factors(model, factors)
    return Student(model, models.target.config.hidden_size, models.source.config.hidden_size, with_head=False)


def balanced(factors: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The same updates, each with factors that share its singular values."""
    return {name: balance(lora) for name, lora in factors.items()}


def of_rank(rank: int) -> Begin:
    """The default's start in a LoRA of another rank: cut to its largest singular values, or with free ranks."""

    def begin(reading: Reading, recipe: Recipe, seed: int) -> Student:
        cut = {
            name: LowRank(lora.a[:rank], lora.b[:, :rank])
            for name, lora in balanced(closed_form(reading, recipe)).items()
        }
        return student_with(reading, recipe, seed, cut, rank)

    return begin


def unbalanced(reading: Reading, recipe: Recipe, seed: int) -> Student:
    """Factors as the maps fold into them."""
    return student_with(reading, recipe, seed, closed_form(reading, recipe))


def one_side(side: Literal["a", "b"]) -> Begin:
    """One factor of the closed form; the other is zero, so that training starts at the bare target."""

    def begin(reading: Reading, recipe: Recipe, seed: int) -> Student:
        solved = balanced(closed_form(reading, recipe))
        alone = {name: LowRank(lora.a * (side == "a"), lora.b * (side == "b")) for name, lora in solved.items()}
        return student_with(reading, recipe, seed, alone)

    return begin


def earlier_modules_adapted(reading: Reading, recipe: Recipe, seed: int) -> Student:
    """Each module is solved from what it reads in source + LoRA, and in the target with all earlier modules adapted."""
    models, plan = reading.models, reading.plan
    student = student_with(reading, recipe, seed, {})
    by_layer = sorted(plan.pairing.mapped, key=lambda pair: pair.target.layer)
    for _, reading_the_same in groupby(by_layer, key=lambda pair: input_site(pair, pair.branches[0])):
        part = Pairing(tuple(map(_beneath_adapter, reading_the_same)), plan.pairing.layer_map, ())
        moments = collect_moments(models.source, models.target, part, reading.training[:STATISTICS_PASSAGES])
        start_from_factors(student.model, balanced(ridge_factors(moments, plan.pairing, plan.factors, recipe.ridge)))
    return student


def _beneath_adapter(pair: ModulePair) -> ModulePair:
    """The source's modules without the adapter's update of their own, in a model whose other modules have theirs."""
    branches = (replace(branch, source_module=f"{branch.source_module}.base_layer") for branch in pair.branches)
    return replace(pair, branches=tuple(branches))


def outputs_by_gradients(reading: Reading, recipe: Recipe, seed: int) -> Student:
    """`map_from_source` from gradients instead of activations.

    An update δ of a source module's output changes the log-probability of the text by g·δ to first order, where g is
    its gradient. Where the source's gradients are a linear map N of the target's, Nᵀδ in the target changes it as much.
    """
    models, plan = reading.models, reading.plan
    inputs = closed_form(reading, recipe)
    with models.teacher.disable_adapter():
        moments = gradient_moments(models.source, models.target, plan.pairing, reading.training[:STATISTICS_PASSAGES])
    folded = {}
    for pair in plan.pairing.mapped:
        layers, first = [], 0
        for index, branch in enumerate(pair.branches):
            lora = plan.factors[branch.source_module]
            gradient_map = ridge_map(*moments[pair.target.name, index].raw(), recipe.ridge).float()
            b = fold_from_source(gradient_map.T, lora.b[branch.source_rows]) / plan.pairing.multiplicity(branch)
            layers.append(LowRank(inputs[pair.target.name].a[first : first + lora.rank], b))
            first += lora.rank
        folded[pair.target.name] = merge_branches(layers, [one.target_rows for one in pair.branches], pair.target.d_out)
    return student_with(reading, recipe, seed, balanced(folded))


def gradient_moments(
    source: nn.Module, target: nn.Module, pairing: Pairing, passages: Sequence[AlignedPassage]
) -> dict[tuple[str, int], Moments]:
    """Moments of the gradients of both models' log-probability of a text, at the places that count.

    Returns:
        (target module, index of the branch) → x: by the target's output rows, y: by the source's
    """
    moments: dict[tuple[str, int], Moments] = {}
    source_names = sorted({branch.source_module for _, _, branch in pairing.branches()})
    for batch in batches(passages, _GRADIENT_BATCH, next(target.parameters()).device):
        of_source = output_gradients(source, source_names, batch, "source")
        of_target = output_gradients(target, [pair.target.name for pair in pairing.mapped], batch, "target")
        for pair, index, branch in pairing.branches():
            x = of_target[pair.target.name][:, branch.target_rows]
            y = of_source[branch.source_module][:, branch.source_rows]
            moments.setdefault((pair.target.name, index), Moments.zeros(x.shape[1], y.shape[1])).update(x, y)
    return moments


def output_gradients(model: nn.Module, names: Sequence[str], batch: Batch, side: Side) -> dict[str, Tensor]:
    """Gradients of the summed log-probability of the tokens that follow the places that count.

    Returns:
        module → gradient by its output at these places, shape (places, width)
    """
    counts = batch["weights"] > 0
    with probes(model, names) as added:
        learned = predict(model, batch, side)
        rows, places = counted_places(learned.positions, counts)
        following = learned.ids.roll(-1, dims=1)[rows, places]
        log_probability = learned.logits[rows, places].log_softmax(-1).gather(1, following[:, None]).sum()
        gradients = torch.autograd.grad(log_probability, list(added.values()))
    here = counted_places(batch[f"{side}_positions"], counts)
    rows_here = partial(rows_at, batch_size=len(counts), places=here)
    return {name: rows_here(gradient) for name, gradient in zip(added, gradients, strict=True)}


@contextmanager
def probes(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Adds a zero to the output of each module, by which one can differentiate; they are there after a forward pass."""
    added: dict[str, Tensor] = {}

    def probe(name: str, _module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        added[name] = torch.zeros_like(output, requires_grad=True)
        return output + added[name]

    handles = [model.get_submodule(name).register_forward_hook(partial(probe, name)) for name in names]
    try:
        yield added
    finally:
        for handle in handles:
            handle.remove()


def whitened(directions: int | None = None, is_fresh: bool = False) -> Begin:
    """The default's start or a fresh LoRA, whose A is trained as A·C^½ beside a frozen C^-½.

    Args:
        directions: in which inputs vary most, and whose variance is made equal; by default all
        is_fresh: whether it is a fresh LoRA
    """

    def begin(reading: Reading, recipe: Recipe, seed: int) -> Student:
        models, pairing = reading.models, reading.plan.pairing
        factors = {} if is_fresh else balanced(closed_form(reading, recipe))
        student = student_with(reading, recipe, seed, factors)
        with models.teacher.disable_adapter(), student.model.disable_adapter():
            moments = collect_moments(models.source, models.target, pairing, reading.training[:STATISTICS_PASSAGES])
        for pair in pairing.mapped:
            second_moments, _ = moments.inputs[input_site(pair, pair.branches[0])].raw()
            whitening = Whitening(second_moments, recipe.ridge, directions)
            parametrize.register_parametrization(lora_maps(student.model, pair.target.name)[0], "weight", whitening)
        return student

    return begin


class Whitening(nn.Module):
    """Parametrization of A by its product with C^½, the root of the inputs' second moments scaled to mean 1."""

    def __init__(self, second_moments: Tensor, ridge: float, directions: int | None = None) -> None:
        """Solves for the root.

        Args:
            second_moments: C, shape (d_in, d_in)
            ridge: added to the diagonal, relative to its mean
            directions: that are told apart; all others have the mean variance of them. By default all are
        """
        super().__init__()
        scaled = second_moments / second_moments.diagonal().mean()
        scaled.diagonal().add_(ridge)
        values, vectors = torch.linalg.eigh(scaled)
        if directions is not None:
            values[:-directions] = values[:-directions].mean()
        self.register_buffer("root", (vectors * values.sqrt() @ vectors.T).float(), persistent=False)
        self.register_buffer("inverse_root", (vectors * values.rsqrt() @ vectors.T).float(), persistent=False)

    def forward(self, trained: Tensor) -> Tensor:
        """Shape (rank, d_in) each."""
        return trained @ self.get_buffer("inverse_root")

    def right_inverse(self, a: Tensor) -> Tensor:
        """What stands for a given A, shape (rank, d_in)."""
        return a @ self.get_buffer("root")


def b_apart(reading: Reading, recipe: Recipe, seed: int) -> Student:
    """The default's start, whose B learns at the rate of maps; `map_learning_rate_ratio` says how fast that is."""
    student = student_with(reading, recipe, seed, balanced(closed_form(reading, recipe)))
    for name in reading.plan.target_modules:
        parametrize.register_parametrization(lora_maps(student.model, name)[1], "weight", nn.Identity())
    return student


def layers_reversed(reading: Reading, recipe: Recipe, seed: int) -> Student:
    """The last layer of the source speaks for the first of the target: what a pairing that is wrong costs."""
    return _with_layers(reading, recipe, seed, reading.plan.pairing.layer_map[::-1])


def layers_most_alike(reading: Reading, recipe: Recipe, seed: int) -> Student:
    """For each layer of the target that of the source whose hidden states are most like it by debiased CKA."""
    models, plan = reading.models, reading.plan
    student = student_with(reading, recipe, seed, {})
    decode = partial(models.target_tokenizer.decode, skip_special_tokens=True)
    texts = [Passage(decode(passage.target_ids)) for passage in reading.held_out]
    similarity = measure_similarity(models, student.model, plan.pairing, texts, recipe.max_length)
    student.model.unload()
    return _with_layers(reading, recipe, seed, [row.index(max(row)) for row in map(list, similarity.layers)])


def _with_layers(reading: Reading, recipe: Recipe, seed: int, layer_map: Sequence[int]) -> Student:
    pairs = tuple(_from_layer(pair, layer_map[pair.target.layer]) for pair in reading.plan.pairing.pairs)
    pairing = replace(reading.plan.pairing, pairs=pairs, layer_map=tuple(layer_map))
    changed = replace(reading, plan=replace(reading.plan, pairing=pairing))
    return student_with(changed, recipe, seed, balanced(closed_form(changed, recipe)))


def _from_layer(pair: ModulePair, layer: int) -> ModulePair:
    """The same modules of another source layer, which the zoo's adapters adapt alike."""

    def moved(branch: Branch) -> Branch:
        return replace(branch, source_module=_LAYER.sub(str(layer), branch.source_module, count=1))

    return replace(pair, branches=tuple(map(moved, pair.branches)))
