"""What lies in the folder of a bridge, and in that of the statistics that one is solved from."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from castlora.bridge.maps_file import BYTES_PER_NUMBER, read_fits
from castlora.errors import UserError
from castlora.execution.run_directory import write_whole
from castlora.maps.fitting import InputSite, map_shapes, statistics_bytes
from castlora.maps.shared_maps import Fit, by_site, pair_all
from castlora.models.loading import context_length, load_config, skeleton
from castlora.models.modules import MODULE_ROLES, LinearSlot, Role, linear_slots
from castlora.models.pairing import ModulePair, Pairing

BRIDGE_FILE = "bridge.json"
STATISTICS_FILE = "statistics.json"
_SIDES = ("source", "target")
Fields = Mapping[str, type | tuple[type, ...]]
"""Names of fields, and their types."""
_NEEDED: Mapping[str, Fields] = {
    BRIDGE_FILE: {"source": str, "target": str},
    STATISTICS_FILE: {
        "source": str,
        "target": str,
        "shard": str,
        "positions": int,
        "ridge": (int, float),
        "seed": int,
    },
}
"""Fields that are read again, and their types."""
_DEFAULT_LENGTH = 256
_LARGEST_RIDGE = 1e6


@dataclass(frozen=True)
class BridgePlan:
    """Two models as far as their configurations tell, and the sites between which there are maps."""

    source_config: PreTrainedConfig
    target_config: PreTrainedConfig
    source_slots: dict[str, LinearSlot]
    target_slots: dict[str, LinearSlot]
    pairing: Pairing

    @property
    def sites(self) -> dict[InputSite, tuple[ModulePair, ...]]:
        """The modules that read at each site."""
        return dict(by_site(self.pairing))

    @property
    def source_widths(self) -> dict[str, int]:
        """How long the inputs of each source module are."""
        return {name: slot.d_in for name, slot in self.source_slots.items()}

    @property
    def maps_bytes(self) -> int:
        """Size of all maps in files."""
        return BYTES_PER_NUMBER * sum(x * y for x, y in map_shapes(self.pairing.mapped, self.source_widths))

    @property
    def statistics_bytes(self) -> int:
        """Size of the statistics of all sites, of the text to solve from and of held-out text."""
        return 2 * statistics_bytes(self.pairing.mapped, self.source_widths)

    def length(self, wanted: int | None) -> int:
        """Tokens per passage, by default as many as both models read, up to 256.

        Raises:
            UserError: it is out of range.
        """
        longest = min(context_length(self.source_config), context_length(self.target_config))
        length = min(longest, _DEFAULT_LENGTH) if wanted is None else wanted
        if not 1 < length <= longest:
            raise UserError(f"max_length is {length}; give a number from 2 to {longest}, which both models read.")
        return length


def plan_bridge(source: str, target: str, roles: Iterable[Role] | None) -> BridgePlan:
    """Reads both configurations and pairs the modules.

    Args:
        source: folder or hub id
        target: folder or hub id
        roles: of the modules between which there are to be maps; by default all

    Raises:
        UserError: a configuration or a role is none, or no module has a partner.
    """
    check_roles(roles or ())
    source_config, source_slots = adaptable_modules(source)
    target_config, target_slots = adaptable_modules(target)
    pairing = pair_all(source_slots, target_slots, roles)
    return BridgePlan(source_config, target_config, source_slots, target_slots, pairing)


def check_roles(roles: Iterable[Role]) -> None:
    """Raises a UserError if one of them is none that castlora knows."""
    known = {role for of_module in MODULE_ROLES.values() for role in of_module}
    for role in roles:
        if role not in known:
            raise UserError(f"roles has {role!r}; choose from {', '.join(sorted(known))}.")


def adaptable_modules(model: str) -> tuple[PreTrainedConfig, dict[str, LinearSlot]]:
    """The configuration of a model, and the modules that it says there are.

    Args:
        model: folder or hub id

    Raises:
        UserError: it is none, or no module has a name that castlora knows.
    """
    config = load_config(model)
    slots = linear_slots(skeleton(config), config)
    if not slots:
        raise UserError(
            f"Model {model!r}: no linear module has a name that castlora knows; add its names to "
            "castlora.models.modules.MODULE_ROLES."
        )
    return config, slots


def site_file(site: InputSite) -> str:
    """Name of the file of a site."""
    target_layer, _, kind = site
    return f"layer-{target_layer:03}-{kind}.safetensors"


def read_all_fits(folder: Path, plan: BridgePlan) -> dict[str, dict[str, Fit]]:
    """Site → name of a map → how well it does on held-out text."""
    return {Path(name).stem: read_fits(folder / name) for name in map(site_file, plan.sites)}


def write_description(folder: Path, name: str, plan: BridgePlan, description: dict[str, Any]) -> None:
    """Writes what the site files of a folder are, and the configurations of both models."""
    for side, config in zip(_SIDES, (plan.source_config, plan.target_config), strict=True):
        config.save_pretrained(folder / side)
    write_whole(folder / name, json.dumps(description, indent=1))


def read_description(folder: Path, name: str, remedy: str) -> tuple[dict[str, Any], BridgePlan]:
    """Reads what `write_description` wrote.

    Raises:
        UserError: the folder is none of that kind, or damaged.
    """
    description = read_fields(folder, name, _NEEDED[name], remedy)
    if name == STATISTICS_FILE and not 0 <= description["ridge"] <= _LARGEST_RIDGE:
        raise _damaged(folder, name, remedy)
    source, target = (str(folder / side) for side in _SIDES)
    return description, plan_bridge(source, target, description["roles"])


def read_fields(folder: Path, name: str, needed: Fields, remedy: str) -> dict[str, Any]:
    """Reads a JSON file that says what else lies in its folder.

    Args:
        folder: where it lies
        name: of the file
        needed: fields that it must have beside `roles`
        remedy: what to do if it cannot be read

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"{str(folder)!r} has no {name}; {remedy}.")
    try:
        description = dict(json.loads(path.read_text(encoding="utf-8")))
        roles = description["roles"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(folder, name, remedy) from error
    has_all = all(isinstance(description.get(field), kind) for field, kind in needed.items())
    if not has_all or not (roles is None or (isinstance(roles, list) and all(isinstance(role, str) for role in roles))):
        raise _damaged(folder, name, remedy)
    return description


def _damaged(folder: Path, name: str, remedy: str) -> UserError:
    """Says that a file is not what castlora wrote."""
    return UserError(f"{name} of {str(folder)!r} is damaged; {remedy}.")
