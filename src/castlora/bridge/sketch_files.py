"""What lies in the folder of a sketch: activations of one model at places of a text, in parts."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedConfig

from castlora.bridge.files import Fields, adaptable_modules, check_roles, read_fields
from castlora.errors import UserError, first_line
from castlora.execution.run_directory import fingerprint, write_whole
from castlora.finite import is_finite
from castlora.maps.fitting import INPUT_OF_ROLE
from castlora.models.capture import Activations
from castlora.models.modules import LinearSlot, Role
from castlora.models.pairing import with_stand_ins

SKETCH_FILE = "sketch.json"
MODEL_FOLDER = "model"
_SKETCH_WANTED = "give a folder that castlora sketch wrote"
_PLACES_FILE = "places.safetensors"
_PLACES = "places"
INPUTS = "inputs"
"""Name of the tensor that all modules of a site read; what each of them makes of it has the module's name."""
DTYPE = torch.bfloat16
"""Halves the files; what it rounds away is noise that a regression over many places averages out."""
_NEEDED: Fields = {"model": str, "text_sha256": str, "seed": int, "places": int, "passages": int, "parts": int}
_MOST_PARTS = 1_000_000
ModelSite = tuple[int, str]
"""Layer, and which of its inputs it is."""
SiteTensors = Mapping[ModelSite, Mapping[str, Tensor]]
"""Site → name → tensor of shape (places, width)."""


@dataclass(frozen=True)
class SketchPlan:
    """A model as far as its configuration tells, and the modules that are read."""

    config: PreTrainedConfig
    slots: dict[str, LinearSlot]

    @property
    def sites(self) -> dict[ModelSite, list[LinearSlot]]:
        """The modules that read at each input, layer by layer."""
        sites: dict[ModelSite, list[LinearSlot]] = defaultdict(list)
        for slot in self.slots.values():
            sites[model_site(slot)].append(slot)
        return dict(sites)

    @property
    def widths(self) -> dict[ModelSite, dict[str, int]]:
        """How wide the tensors of each site are, by name."""
        return {
            site: {INPUTS: slots[0].d_in, **{slot.name: slot.d_out for slot in slots}}
            for site, slots in self.sites.items()
        }

    @property
    def bytes_per_place(self) -> int:
        """Size of the activations of all modules at one place."""
        return DTYPE.itemsize * sum(sum(widths.values()) for widths in self.widths.values())


def plan_sketch(model: str, roles: Iterable[Role] | None) -> SketchPlan:
    """Reads the configuration of a model and finds the modules to read.

    Args:
        model: folder or hub id
        roles: of the modules, to which those are added that may stand in for them; by default all

    Raises:
        UserError: the configuration or a role is none, or no module has one of the roles.
    """
    check_roles(roles or ())
    config, slots = adaptable_modules(model)
    if roles is not None:
        wanted = with_stand_ins(roles)
        slots = {name: slot for name, slot in slots.items() if wanted & set(slot.roles)}
        if not slots:
            raise UserError(f"Model {model!r} has no module of the roles {', '.join(roles)}; name others.")
    return SketchPlan(config, slots)


def model_site(slot: LinearSlot) -> ModelSite:
    """The input that a module reads."""
    return slot.layer, INPUT_OF_ROLE[slot.roles[0]]


def part_name(number: int) -> str:
    """Name of the folder of a part."""
    return f"part-{number:05}"


def write_part(folder: Path, places: Tensor, activations: SiteTensors) -> None:
    """Writes what a model computed of some passages.

    Args:
        folder: of the part, which is there
        places: number of the passage, and bytes of it that have been read, shape (places, 2)
        activations: in the precision that is kept
    """
    for site, tensors in activations.items():
        write_whole(folder / _site_file(*site), save(dict(tensors)))
    write_whole(folder / _PLACES_FILE, save({_PLACES: places}))


@dataclass(frozen=True)
class Sketch:
    """A folder that `castlora.sketch` wrote."""

    folder: Path
    description: dict[str, Any]
    plan: SketchPlan

    @classmethod
    def open(cls, folder: str) -> "Sketch":
        """Opens it.

        Raises:
            UserError: it is none, or damaged.
        """
        description = read_fields(Path(folder), SKETCH_FILE, _NEEDED, _SKETCH_WANTED)
        if not 0 < description["parts"] <= _MOST_PARTS:
            raise UserError(f"{SKETCH_FILE} of {folder!r} has {description['parts']} parts; {_SKETCH_WANTED}.")
        return cls(Path(folder), description, plan_sketch(str(Path(folder) / MODEL_FOLDER), description["roles"]))

    def fingerprint(self) -> str:
        """Tells whether another sketch has come to lie in its folder."""
        of_layer = self.folder / part_name(0) / _site_file(*next(iter(self.plan.sites)))
        return fingerprint(self.folder / SKETCH_FILE, of_layer)

    def places(self, part: int) -> Tensor:
        """Number of the passage, and bytes of it that have been read, of each place of a part, shape (places, 2).

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.folder / part_name(part) / _PLACES_FILE
        places = _read(path).get(_PLACES)
        if places is None or places.dtype != torch.long or places.ndim != 2 or places.shape[1] != 2:
            raise _damaged(path, "it has no places")
        return places

    def activations(self, part: int, site: ModelSite, rows: Tensor) -> dict[str, Activations]:
        """What went into and came out of the modules that read at an input, at some places of a part.

        Args:
            part: its number
            site: of the model
            rows: numbers of the places

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.folder / part_name(part) / _site_file(*site)
        tensors, count = _read(path), len(self.places(part))
        for name, width in self.plan.widths[site].items():
            if name not in tensors or tensors[name].shape != (count, width) or tensors[name].dtype != DTYPE:
                raise _damaged(path, f"it has no {name} of {count} places")
            if not is_finite(tensors[name]):
                raise _damaged(path, f"{name} holds NaN or infinity")
        inputs = tensors[INPUTS][rows]
        return {slot.name: Activations(inputs, tensors[slot.name][rows]) for slot in self.plan.sites[site]}


def _site_file(layer: int, kind: str) -> str:
    return f"layer-{layer:03}-{kind}.safetensors"


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, first_line(error)) from error


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path.parent.name}/{path.name} of the sketch {str(path.parent.parent)!r} is missing or damaged ({why}); "
        "copy it again."
    )
