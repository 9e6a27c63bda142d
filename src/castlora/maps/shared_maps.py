"""Maps that know no adapter: between all modules of two models, solved once for whatever an adapter changes.

A site is an input of a target layer with the modules that read it. Its maps have names: one takes the input to that of
the source, and one for each part of each module brings its update back.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from castlora.adapters.factors import LowRank
from castlora.maps.cast_layer import merge_branches
from castlora.maps.fitting import InputSite, SiteMoments, input_site, reading_the_same
from castlora.maps.solvers import ridge_map
from castlora.maps.statistics import Moments
from castlora.models.modules import LinearSlot, Role, row_numbers
from castlora.models.pairing import Branch, ModulePair, Pairing, pair_modules, with_stand_ins

TO_SOURCE = "to_source"
"""Name of a site's map from the target's input to the source's."""
_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Fit:
    """How a map was found, and how well it does."""

    explained: float
    """Share of the mean square of held-out activations that it predicts."""
    is_anchored: bool
    """Whether it was drawn towards the identity, not towards zero."""


def pair_all(
    source_slots: Mapping[str, LinearSlot], target_slots: Mapping[str, LinearSlot], roles: Iterable[Role] | None = None
) -> Pairing:
    """Pairs all linear modules of two models that have one of the roles, by default any.

    Raises:
        UserError: none has a partner.
    """
    if roles is None:
        return pair_modules(source_slots, target_slots, source_slots)
    wanted = with_stand_ins(roles)
    adapted = [name for name, slot in source_slots.items() if wanted & set(slot.roles)]
    whole = pair_modules(source_slots, target_slots, adapted)
    pairs = tuple(
        ModulePair(pair.target, tuple(branch for branch in pair.branches if wanted & set(branch.roles)))
        for pair in whole.pairs
    )
    return Pairing(pairs, whole.layer_map, whole.dropped)


def by_site(pairing: Pairing) -> Iterator[tuple[InputSite, tuple[ModulePair, ...]]]:
    """The sites of a pairing, layer by layer, each with the modules that read there."""
    for pairs in reading_the_same(pairing):
        yield input_site(pairs[0], pairs[0].branches[0]), pairs


def branch_name(pair: ModulePair, branch: Branch) -> str:
    """Name of the map that brings the update of a branch to the target."""
    return f"from_source.{pair.target.name}.{'+'.join(branch.roles)}"


def site_shapes(pairs: Sequence[ModulePair], source_widths: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Numbers that each map of a site makes, and numbers that it takes, by the names of the maps.

    Args:
        pairs: modules that read there
        source_widths: how long the inputs of each source module are
    """
    outputs = {
        branch_name(pair, branch): (len(row_numbers(branch.target_rows)), len(row_numbers(branch.source_rows)))
        for pair in pairs
        for branch in pair.branches
    }
    return {TO_SOURCE: (source_widths[pairs[0].branches[0].source_module], pairs[0].target.d_in), **outputs}


def site_statistics(moments: SiteMoments, site: InputSite, pairs: Sequence[ModulePair]) -> dict[str, Moments]:
    """The moments of which the maps of a site are solved, by the names of the maps."""
    outputs = {
        branch_name(pair, branch): moments.outputs[pair.target.name, index]
        for pair in pairs
        for index, branch in enumerate(pair.branches)
    }
    return {TO_SOURCE: moments.inputs[site], **outputs}


def solve_maps(
    statistics: Mapping[str, Moments], held_out: Mapping[str, Moments], ridge: float
) -> tuple[dict[str, Tensor], dict[str, Fit]]:
    """The maps of a site in closed form.

    Ridge regression, uncentred towards the source, because a fold cannot hold an offset, and centred from it, because
    updates are differences. Where both sides of a map are as wide, and x itself is nearer to y than zero is, the target
    was trained on from the source or the other way round. The map is then drawn towards the identity: it leaves alone
    what the text says nothing about, where one drawn towards zero would drop it.

    Args:
        statistics: moments of the text that the maps are solved from, by the names of the maps
        held_out: the same of other text, which they are judged by
        ridge: strength of the penalty relative to the mean square of x

    Returns:
        the maps, shape (d_y, d_x) each, in double precision on the device of the moments; and how well they do
    """
    maps, fits = {}, {}
    for name, moments in statistics.items():
        is_centred = name != TO_SOURCE
        xx, yx = moments.covariances() if is_centred else moments.raw()
        is_anchored = xx.shape == yx.shape and bool(xx.trace() < 2 * yx.trace())
        if is_anchored:
            identity = torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
            maps[name] = identity + ridge_map(xx, yx - xx, ridge)
        else:
            maps[name] = ridge_map(xx, yx, ridge)
        fits[name] = Fit(held_out[name].explained_by(maps[name], is_centred), is_anchored)
    return maps, fits


def fold_site(
    maps: Mapping[str, Tensor],
    pairs: Iterable[ModulePair],
    pairing: Pairing,
    factors: Mapping[str, LowRank],
    anchored: Container[str],
) -> dict[str, LowRank]:
    """The updates of target modules that read at a site, folded as those of CAST (arXiv 2510.17902, eq. 1-3).

    A part of the source that speaks for several target modules has its update divided among them, unless they are that
    part over again: a model that was grown by repeating layers (arXiv 2312.15166) does in each of them what the source
    does in one.

    Args:
        maps: of the site, by name
        pairs: modules that read there and that the adapter reaches
        pairing: all that the adapter reaches
        factors: the adapter, by source module
        anchored: names of the maps that were drawn towards the identity
    """
    folded = {}
    for pair in pairs:
        layers = []
        for branch in pair.branches:
            lora = factors[branch.source_module]
            name = branch_name(pair, branch)
            b = _times(maps[name], lora.b[branch.source_rows])
            a = _times(maps[TO_SOURCE].T, lora.a.T).T
            layers.append(LowRank(a, b / (1 if name in anchored else pairing.multiplicity(branch))))
        folded[pair.target.name] = merge_branches(layers, [one.target_rows for one in pair.branches], pair.target.d_out)
    return folded


def _times(matrix: Tensor, factor: Tensor) -> Tensor:
    """Matrix · factor in the factor's precision, block by block: a map is large, and in files has fewer bits.

    Blocks are small, since what is kept of each module would otherwise pin the memory of large ones.
    """
    product = factor.new_empty(len(matrix), factor.shape[1])
    for rows, part in zip(matrix.split(_ROWS_AT_ONCE), product.split(_ROWS_AT_ONCE), strict=True):
        torch.mm(rows.to(factor), factor, out=part)
    return product
