"""Pairing: which source module speaks for each target module."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from castlora.errors import UserError
from castlora.models.modules import LinearSlot, Role, Rows, number_of_layers, row_numbers

STAND_INS: Mapping[Role, Role] = {"fc": "up", "up": "fc"}
"""Roles that take each other's place between gated and ungated MLPs.

`gate` has no counterpart in an ungated MLP: towards one its update is dropped, from one it stays zero.
"""
_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class Branch:
    """One source update that flows into a target module."""

    source_module: str
    roles: tuple[Role, ...]
    """Roles of the target module that it feeds."""
    source_rows: Rows
    """Output rows of the source module that it takes."""
    target_rows: Rows
    """Output rows of the target module that it writes."""


@dataclass(frozen=True)
class ModulePair:
    """A target module and the source updates that speak for it; none leaves it unchanged."""

    target: LinearSlot
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Pairing:
    """The correspondence of two models' sites for one adapter."""

    pairs: tuple[ModulePair, ...]
    layer_map: tuple[int, ...]
    """For each target layer the source layer that speaks for it."""
    dropped: tuple[str, ...]
    """Adapted source modules whose update reaches no target module; `module(roles)` where only a part does not."""

    @property
    def mapped(self) -> tuple[ModulePair, ...]:
        """The pairs with at least one branch."""
        return tuple(pair for pair in self.pairs if pair.branches)

    def only(self, target_modules: Collection[str]) -> "Pairing":
        """Of the mapped pairs those of some target modules."""
        return Pairing(tuple(pair for pair in self.mapped if pair.target.name in target_modules), self.layer_map, ())

    def branches(self) -> Iterator[tuple[ModulePair, int, Branch]]:
        """Every branch with the pair that it belongs to and its index there."""
        for pair in self.mapped:
            for index, branch in enumerate(pair.branches):
                yield pair, index, branch

    def multiplicity(self, branch: Branch) -> int:
        """How many target modules the same part of the source speaks for."""
        part = branch.source_module, branch.source_rows
        return sum((other.source_module, other.source_rows) == part for pair in self.pairs for other in pair.branches)


def relative_depth(source_layers: int, target_layers: int) -> tuple[int, ...]:
    """Pairs first with first, last with last, and the rest by relative depth."""
    if target_layers == 1:
        return (source_layers - 1,)
    return tuple(round(layer * (source_layers - 1) / (target_layers - 1)) for layer in range(target_layers))


def pair_modules(
    source_slots: Mapping[str, LinearSlot], target_slots: Mapping[str, LinearSlot], adapted: Iterable[str]
) -> Pairing:
    """Pairs every linear module of the target with the adapted source modules of its layer's partner.

    A fused target module whose source is fused in the same way takes the whole update in one
    branch; otherwise each of its roles is fed by a branch of its own, which adds their ranks.
    Where not every layer of the source has attention, the nearest that has it stands for one without.

    Args:
        source_slots: linear modules of the source model
        target_slots: linear modules of the target model
        adapted: names of the source modules that the adapter changes

    Raises:
        UserError: no adapted module has a partner.
    """
    adapted = sorted(adapted)
    layer_map = relative_depth(number_of_layers(source_slots), number_of_layers(target_slots))
    by_layer: dict[int, list[LinearSlot]] = {}
    for name in adapted:
        by_layer.setdefault(source_slots[name].layer, []).append(source_slots[name])
    layers_of = _layers_by_role(source_slots)
    partners = {name: _nearest_layer(slot, layer_map[slot.layer], layers_of) for name, slot in target_slots.items()}
    pairs = tuple(
        ModulePair(slot, _branches(slot, by_layer.get(partners[name], []))) for name, slot in target_slots.items()
    )
    branches = [branch for pair in pairs for branch in pair.branches]
    if not branches:
        raise UserError("No module that the adapter changes has a partner in the target; choose another target.")
    unused = {name: _unused_roles(source_slots[name], branches) for name in adapted}
    return Pairing(
        pairs, layer_map, tuple(_describe_part(source_slots[name], unused[name]) for name in adapted if unused[name])
    )


def branch_ranks(pair: ModulePair, source_ranks: Mapping[str, int]) -> int:
    """Rank of the folded update of a target module: the sum over its branches."""
    return sum(source_ranks[branch.source_module] for branch in pair.branches)


def describe(pairing: Pairing) -> str:
    """The pairing for the terminal: the layers, and the modules once for all layers that follow one another alike."""
    layers = ", ".join(f"{layer} <- {source_layer}" for layer, source_layer in enumerate(pairing.layer_map))
    lines = [f"target layer <- source layer: {layers}", "target module <- source module(roles):"]
    for modules, alike in groupby(range(len(pairing.layer_map)), lambda layer: _describe_layer(pairing, layer)):
        lines.append(f"  layers {_describe_range(list(alike))}: {modules}")
    if pairing.dropped:
        lines.append(f"dropped (no partner in the target): {_describe_dropped(pairing.dropped)}")
    return "\n".join(lines)


def _describe_layer(pairing: Pairing, layer: int) -> str:
    return ", ".join(_describe_pair(pair) for pair in pairing.pairs if pair.target.layer == layer)


def _describe_dropped(dropped: Iterable[str]) -> str:
    """Names of modules, with the layers of each written once: `model.layers.0-5.mlp.gate_proj`."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name in dropped:
        before, layer, after = _LAYER.split(name, maxsplit=1)
        layers.setdefault((before, after), []).append(int(layer))
    return ", ".join(f"{before}{_describe_range(sorted(found))}{after}" for (before, after), found in layers.items())


def _describe_range(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: `0-5`, `7`, or `1,3` where some are left out."""
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))


def _describe_pair(pair: ModulePair) -> str:
    target = pair.target.name.rsplit(".", 1)[-1]
    if not pair.branches:
        return f"{target} <- nothing"
    sources = (f"{branch.source_module.rsplit('.', 1)[-1]}({'+'.join(branch.roles)})" for branch in pair.branches)
    return f"{target} <- {' & '.join(sources)}"


def _unused_roles(slot: LinearSlot, branches: Iterable[Branch]) -> tuple[Role, ...]:
    taken = [branch.source_rows for branch in branches if branch.source_module == slot.name]
    return tuple(
        role
        for role, rows in slot.rows.items()
        if not any(set(row_numbers(rows)) <= set(row_numbers(part)) for part in taken)
    )


def _describe_part(slot: LinearSlot, roles: tuple[Role, ...]) -> str:
    return slot.name if roles == slot.roles else f"{slot.name}({'+'.join(roles)})"


def _layers_by_role(slots: Mapping[str, LinearSlot]) -> dict[Role, set[int]]:
    layers: dict[Role, set[int]] = {}
    for slot in slots.values():
        for role in slot.roles:
            layers.setdefault(role, set()).add(slot.layer)
    return layers


def _nearest_layer(target: LinearSlot, wanted: int, layers_of: Mapping[Role, set[int]]) -> int:
    """The source layer nearest to the wanted one that has a module for this one; the wanted one if none has."""
    with_module = {layer for role in with_stand_ins(target.roles) for layer in layers_of.get(role, ())}
    return min(with_module or {wanted}, key=lambda layer: (abs(layer - wanted), layer))


def _branches(target: LinearSlot, sources: list[LinearSlot]) -> tuple[Branch, ...]:
    for source in sources:
        if source.roles == target.roles:
            return (Branch(source.name, target.roles, slice(0, source.d_out), slice(0, target.d_out)),)
    branches = []
    for role, target_rows in target.rows.items():
        found = _find_role(role, sources)
        if found is not None:
            source, source_role = found
            branches.append(Branch(source.name, (role,), source.rows[source_role], target_rows))
    return tuple(branches)


def with_stand_ins(roles: Iterable[Role]) -> set[Role]:
    """Roles with those that may take their places."""
    return {name for role in roles for name in (role, STAND_INS.get(role, role))}


def _find_role(role: Role, sources: list[LinearSlot]) -> tuple[LinearSlot, Role] | None:
    for wanted in (role, STAND_INS.get(role, role)):
        for source in sources:
            if wanted in source.rows:
                return source, wanted
    return None
