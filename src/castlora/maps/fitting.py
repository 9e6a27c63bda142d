"""Maps in closed form: the statistics of both models' activations, and the regressions that they solve."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TypeVar

import torch
from accelerate.utils import get_max_memory
from torch import Tensor, nn

from castlora.adapters.factors import LowRank
from castlora.alignment.positions import AlignedPassage, Batch, Side, batches, counted_places, share_of_passages
from castlora.execution.launcher import local_process_count
from castlora.execution.processes import add_up, from_all
from castlora.maps.cast_layer import merge_branches
from castlora.maps.solvers import ridge_inverse, ridge_map
from castlora.maps.starts import BranchMaps, Maps
from castlora.maps.statistics import Moments
from castlora.models.capture import Activations, capture
from castlora.models.modules import Role, layer_index, row_numbers
from castlora.models.pairing import Branch, ModulePair, Pairing

STATISTICS_BATCH = 16
_BYTES_PER_SUM = 8
_SHARE_FOR_SUMS = 0.5
"""Of the memory that is free; the rest is for activations, and for solving, which copies what it solves."""
_BYTES_PER_TURN = 4 << 30
"""Of activations of one model that wait for those of the other."""
Use = Callable[[Side], None]
"""Has the model of a side ready to run."""
_Key = TypeVar("_Key", bound=Hashable)
_Solution = TypeVar("_Solution")

InputSite = tuple[int, int, str]
"""Target layer, source layer, and which of the layer's inputs it is."""

INPUT_OF_ROLE: Mapping[Role, str] = {
    "q": "attention", "k": "attention", "v": "attention", "o": "heads",
    "gate": "mlp", "up": "mlp", "fc": "mlp", "down": "neurons",
}  # fmt: skip
"""Which of a layer's inputs a module reads."""


def input_site(pair: ModulePair, branch: Branch) -> InputSite:
    """Names the pair of inputs that a branch reads: q, k and v of a layer read the same one."""
    source_layer = layer_index(branch.source_module)
    assert source_layer is not None
    return pair.target.layer, source_layer, INPUT_OF_ROLE[branch.roles[0]]


@dataclass
class SiteMoments:
    """Moments of the inputs and the outputs of every branch."""

    inputs: dict[InputSite, Moments]
    """x: target module input, y: source module input; shared by the modules that read the same input."""
    outputs: dict[tuple[str, int], Moments]
    """x: source module output rows, y: target module output rows."""


def solve_in_parts(
    source: nn.Module,
    target: nn.Module,
    pairing: Pairing,
    factors: Mapping[str, LowRank],
    passages: Sequence[AlignedPassage],
    solve: Callable[[SiteMoments], dict[_Key, _Solution]],
    memory_bytes: int | None = None,
    use: Use | None = None,
) -> dict[_Key, _Solution]:
    """Solves from the statistics of all branches, of which those of some target modules are there at a time.

    They grow with the square of the width: for a pair of 7B models those of all modules fill 278 GiB. Where they do not
    fit into memory together, the text is read once per part. What is solved does not depend on the parts.
    Where several processes run, each reads its share of the text, and all solve from the sums.

    Args:
        source: the bare source model
        target: the bare target model
        pairing: which modules belong together
        factors: the source adapter, by module
        passages: the text, aligned
        solve: statistics of some modules → solutions of their branches or modules
        memory_bytes: what the statistics may take, at least those of modules with one input; by default half of what
            is free
        use: called before a model runs, where only one of them can be on the accelerator

    Returns:
        the solutions of all
    """
    if memory_bytes is None:
        memory_bytes = memory_beside(source, target, use)
    share = share_of_passages(passages, STATISTICS_BATCH)
    solved: dict[_Key, _Solution] = {}
    for part in parts_of(pairing, input_widths(factors), memory_bytes):
        # No name is bound to the statistics, so that they are gone before those of the next part are summed.
        solved |= solve(of_all_processes(collect_moments(source, target, part, share, use=use)))
    return solved


def parts_of(pairing: Pairing, source_widths: Mapping[str, int], memory_bytes: int) -> Iterator[Pairing]:
    """Parts of a pairing, layer by layer, as many modules as have statistics of that size together.

    Modules that read the same inputs stay together.

    Args:
        pairing: which modules belong together
        source_widths: how long the inputs of each source module are
        memory_bytes: what the statistics of a part may take, unless those of one input take more
    """
    part: list[ModulePair] = []
    taken = 0
    for pairs in reading_the_same(pairing):
        needed = statistics_bytes(pairs, source_widths)
        if part and taken + needed > memory_bytes:
            yield Pairing(tuple(part), pairing.layer_map, ())
            part, taken = [], 0
        part.extend(pairs)
        taken += needed
    yield Pairing(tuple(part), pairing.layer_map, ())


def reading_the_same(pairing: Pairing) -> Iterator[tuple[ModulePair, ...]]:
    """The mapped modules, layer by layer, those together that read the same inputs."""
    by_layer = sorted(pairing.mapped, key=lambda pair: pair.target.layer)
    for _, pairs in groupby(by_layer, key=_inputs):
        yield tuple(pairs)


def statistics_bytes(pairs: Iterable[ModulePair], source_widths: Mapping[str, int]) -> int:
    """Size of the second moments of some target modules' inputs and outputs."""
    return _BYTES_PER_SUM * sum(x * (x + y) for x, y in map_shapes(pairs, source_widths))


def map_shapes(pairs: Iterable[ModulePair], source_widths: Mapping[str, int]) -> list[tuple[int, int]]:
    """How many numbers each map of some target modules takes, and how many it makes of them."""
    widths: list[tuple[int, int]] = []
    inputs: dict[InputSite, tuple[int, int]] = {}
    for pair in pairs:
        for branch in pair.branches:
            inputs[input_site(pair, branch)] = pair.target.d_in, source_widths[branch.source_module]
            widths.append((len(row_numbers(branch.source_rows)), len(row_numbers(branch.target_rows))))
    return [*inputs.values(), *widths]


def input_widths(factors: Mapping[str, LowRank]) -> dict[str, int]:
    """How long the inputs of each adapted module are."""
    return {name: lora.a.shape[1] for name, lora in factors.items()}


def ridge_maps(moments: SiteMoments, pairing: Pairing, ridge: float) -> Maps:
    """The closed form: ridge regression of activations over aligned positions.

    `map_to_source` predicts the source module's input from the target module's input, uncentred,
    because a fold cannot hold an offset; `map_from_source` predicts the target module's output from
    the source module's output, centred, because updates are differences. A part of the source that
    speaks for several target modules has its update divided among them.

    Args:
        moments: of all branches or of those of some target modules
        pairing: all that belongs together
        ridge: strength of the penalty relative to the mean square of the regressor

    Returns:
        maps, on the processor, of the branches that the moments are of
    """
    maps = {}
    to_source: dict[InputSite, Tensor] = {}
    for pair, index, branch in pairing.branches():
        if (pair.target.name, index) not in moments.outputs:
            continue
        site = input_site(pair, branch)
        if site not in to_source:
            to_source[site] = ridge_map(*moments.inputs[site].raw(), ridge).float().cpu()
        from_source = ridge_map(*moments.outputs[pair.target.name, index].covariances(), ridge)
        share = 1 / pairing.multiplicity(branch)
        maps[pair.target.name, index] = BranchMaps(to_source[site], (share * from_source).float().cpu())
    return maps


def ridge_factors(
    moments: SiteMoments, pairing: Pairing, factors: Mapping[str, LowRank], ridge: float
) -> dict[str, LowRank]:
    """The source adapter folded with the maps of `ridge_maps`, which are never formed.

    A regression is linear in what it predicts, so the r rows that A makes of the source's input are predicted instead
    of the input: A' = A·E[y xᵀ]·(E[x xᵀ] + λI)⁻¹, and B' likewise. A solution then has r columns, not d.

    Args:
        moments: of all branches or of those of some target modules
        pairing: all that belongs together
        factors: the source adapter, by module
        ridge: strength of the penalty relative to the mean square of the regressor

    Returns:
        updates, on the processor, of the target modules that the moments are of
    """
    folded = {}
    inputs: dict[InputSite, tuple[Tensor, Callable[[Tensor], Tensor]]] = {}
    for pair in pairing.mapped:
        if (pair.target.name, 0) not in moments.outputs:
            continue
        layers = []
        for index, branch in enumerate(pair.branches):
            site = input_site(pair, branch)
            if site not in inputs:
                # Modules that read the same input follow each other, and the factors of a wide one are large.
                inputs.clear()
                xx, yx = moments.inputs[site].raw()
                inputs[site] = yx, ridge_inverse(xx, ridge)
            yx, solve = inputs[site]
            lora = factors[branch.source_module]
            a = solve(yx.T @ lora.a.to(yx).T).T
            xx, yx = moments.outputs[pair.target.name, index].covariances()
            b = yx @ ridge_inverse(xx, ridge)(lora.b[branch.source_rows].to(yx))
            layers.append(LowRank(a.float().cpu(), (b / pairing.multiplicity(branch)).float().cpu()))
        folded[pair.target.name] = merge_branches(layers, [one.target_rows for one in pair.branches], pair.target.d_out)
    return folded


@torch.no_grad()
def collect_moments(
    source: nn.Module,
    target: nn.Module,
    pairing: Pairing,
    passages: Sequence[AlignedPassage],
    permutation: torch.Generator | None = None,
    use: Use | None = None,
) -> SiteMoments:
    """Runs both base models over aligned passages and sums the moments of every branch.

    Args:
        source: the bare source model
        target: the bare target model
        pairing: which modules belong together
        passages: the text, aligned
        permutation: pairs the positions of a batch at random, for a control that must carry nothing
        use: called before a model runs, where only one of them can be on the accelerator; then one reads many batches
            before the other does, and what it computed waits in the machine's memory
    """
    moments = SiteMoments({}, {})
    models: Mapping[Side, nn.Module] = {"source": source, "target": target}
    names: Mapping[Side, list[str]] = {
        "source": sorted({branch.source_module for _, _, branch in pairing.branches()}),
        "target": sorted({pair.target.name for pair in pairing.mapped}),
    }
    for first, turn in _turns(models, names, passages, permutation, use):
        second: Side = "target" if first == "source" else "source"
        if use:
            use(second)
        device = _device(models[second])
        for batch, of_first in turn:
            of_second = activations_of(models[second], names[second], batch, second, permutation)
            captured = {first: _moved(of_first, device), second: of_second}
            add_batch(moments, pairing, captured["source"], captured["target"], _statistics_device(device))
    return moments


def _turns(
    models: Mapping[Side, nn.Module],
    names: Mapping[Side, Sequence[str]],
    passages: Sequence[AlignedPassage],
    permutation: torch.Generator | None,
    use: Use | None,
) -> Iterator[tuple[Side, list[tuple[Batch, dict[str, Activations]]]]]:
    """Batches with the activations of the model that reads them first.

    As many at once as memory holds where the other model cannot run meanwhile; the one that is on the accelerator
    already begins then, since each change of places takes time.
    """
    first: Side = "source"
    turn: list[tuple[Batch, dict[str, Activations]]] = []
    taken = 0
    for batch in batches(passages, STATISTICS_BATCH, torch.device("cpu")):
        if use and not turn:
            first = "target" if _waits(models["source"]) and not _waits(models["target"]) else "source"
            use(first)
        activations = activations_of(models[first], names[first], batch, first, permutation)
        if use:
            activations = _moved(activations, torch.device("cpu"))
        turn.append((batch, activations))
        taken += sum(one.inputs.nbytes + one.outputs.nbytes for one in activations.values())
        if use is None or taken >= _BYTES_PER_TURN:
            yield first, turn
            turn, taken = [], 0
    if turn:
        yield first, turn


def activations_of(
    model: nn.Module, names: Sequence[str], batch: Batch, side: Side, permutation: torch.Generator | None
) -> dict[str, Activations]:
    """What goes into and comes out of modules at the places of a batch that count, shape (places, width) each."""
    device = _device(model)
    # A first token without content attracts extreme activations that would rule the regression.
    counts = (batch["weights"] > 0) & (batch["source_positions"] > 0) & (batch["target_positions"] > 0)
    places = counted_places(batch[f"{side}_positions"], counts)
    if permutation is not None and side == "source":
        order = torch.randperm(int(counts.sum()), generator=permutation)
        places = places[0][order], places[1][order]
    here = places[0].to(device), places[1].to(device)
    with capture(model, names, partial(rows_at, batch_size=len(counts), places=here)) as captured:
        # No prediction is looked at, and the head of a large vocabulary takes long.
        model(
            input_ids=batch[f"{side}_ids"].to(device),
            attention_mask=batch[f"{side}_mask"].to(device),
            use_cache=False,
            logits_to_keep=1,
        )
    return captured


def _moved(activations: Mapping[str, Activations], device: torch.device) -> dict[str, Activations]:
    return {name: Activations(one.inputs.to(device), one.outputs.to(device)) for name, one in activations.items()}


def add_batch(
    moments: SiteMoments,
    pairing: Pairing,
    in_source: Mapping[str, Activations],
    in_target: Mapping[str, Activations],
    kept_on: torch.device,
) -> None:
    """Adds the activations of both models at the same places, shape (places, width) each, by module."""
    counted_inputs = set()
    for pair, index, branch in pairing.branches():
        source_rows, target_rows = in_source[branch.source_module], in_target[pair.target.name]
        site = input_site(pair, branch)
        if site not in counted_inputs:
            counted_inputs.add(site)
            _add(moments.inputs, site, target_rows.inputs, source_rows.inputs, kept_on)
        outputs = source_rows.outputs[:, branch.source_rows], target_rows.outputs[:, branch.target_rows]
        _add(moments.outputs, (pair.target.name, index), *outputs, kept_on)


def rows_at(activations: Tensor, batch_size: int, places: tuple[Tensor, Tensor]) -> Tensor:
    """The activations at places of a batch, shape (places, width)."""
    # OPT's MLP reads the tokens of all passages as one long row.
    return activations.reshape(batch_size, -1, activations.shape[-1])[places]


def memory_for_statistics(model: nn.Module) -> int:
    """Bytes: most of what is free where the statistics of a model are kept."""
    device = _statistics_device(_device(model))
    free = get_max_memory()
    if device.type == "cuda":
        return int(_SHARE_FOR_SUMS * free[device.index])
    # What the machine has comes last, under a name that depends on the machine.
    *_, of_machine = free.values()
    return int(_SHARE_FOR_SUMS * of_machine / local_process_count())


def memory_beside(source: nn.Module, target: nn.Module, use: Use | None) -> int:
    """Bytes for statistics, beside the larger model where only one can be on the accelerator; in any process."""
    if use is None:
        return min(from_all(memory_for_statistics(target)))
    free = []
    sides: tuple[tuple[Side, nn.Module], ...] = (("source", source), ("target", target))
    for side, model in sides:
        use(side)
        free.append(memory_for_statistics(model))
    return min(from_all(min(free)))


def of_all_processes(moments: SiteMoments) -> SiteMoments:
    """The sums of the processes, added up in place: there is no room for a second set."""
    for of_site in (*moments.inputs.values(), *moments.outputs.values()):
        for tensor in vars(of_site).values():
            add_up(tensor)
    return moments


def _inputs(pair: ModulePair) -> set[InputSite]:
    return {input_site(pair, branch) for branch in pair.branches}


def _add(moments: dict[_Key, Moments], key: _Key, x: Tensor, y: Tensor, device: torch.device) -> None:
    if key not in moments:
        moments[key] = Moments.zeros(x.shape[-1], y.shape[-1], device)
    moments[key].update(x, y)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _waits(model: nn.Module) -> bool:
    return _device(model).type == "cpu"


def _statistics_device(device: torch.device) -> torch.device:
    """Where the sums are kept: beside the model, where double precision is."""
    return device if device.type == "cuda" else torch.device("cpu")
