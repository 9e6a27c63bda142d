"""Joining sketches: the bridge between two models from what each of them computed alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from castlora import __version__
from castlora.bridge.files import BridgePlan, plan_bridge
from castlora.bridge.results import SiteStatistics, write_bridge
from castlora.bridge.sketch_files import MODEL_FOLDER, Sketch, model_site
from castlora.config import check_zero_or_more
from castlora.errors import UserError
from castlora.execution.run_directory import check_output
from castlora.maps.fitting import InputSite, SiteMoments, add_batch
from castlora.maps.shared_maps import site_statistics
from castlora.models.capture import Activations
from castlora.models.modules import Role
from castlora.models.pairing import ModulePair, Pairing

_SAME_GRID = ("text_sha256", "places", "seed", "passages", "parts")
_HELD_OUT_EVERY = 16
"""One passage of so many is held out."""


@dataclass(frozen=True)
class SharedPlaces:
    """Places of a part that both sketches have."""

    in_source: Tensor
    """Their numbers in the sketch of the source, shape (shared,)."""
    in_target: Tensor
    """Their numbers in that of the target."""
    is_held_out: Tensor


def join(source: str, target: str, out: str, ridge: float = 0.1) -> Path:
    """Fits maps between two models from their sketches; neither model is loaded.

    The maps are those of `castlora.fit`, solved from the places that both sketches have.

    Args:
        source: folder that `castlora.sketch` wrote of the model that adapters were trained on
        target: the same of the model that they are to serve
        out: folder of the bridge to write; it must not hold anything else
        ridge: penalty of the regression relative to the mean square of the activations

    Returns:
        the folder

    Raises:
        UserError: a sketch is missing, damaged or over another grid, or they have too little in common; no bridge has
            been written.
    """
    check_zero_or_more(ridge=ridge)
    sketches = Sketch.open(source), Sketch.open(target)
    of_source, of_target = sketches
    for field in _SAME_GRID:
        if of_source.description[field] != of_target.description[field]:
            raise UserError(
                f"{source!r} and {target!r} are sketches over different grids ({field}); make both with the same "
                "--text, --passages, --passage-bytes, --places and --seed."
            )
    roles = _common_roles(*(one.description["roles"] for one in sketches))
    request: dict[str, Any] = {"source": source, "target": target, "ridge": ridge, "castlora_version": __version__}
    check_output(out, request)
    plan = plan_bridge(str(of_source.folder / MODEL_FOLDER), str(of_target.folder / MODEL_FOLDER), roles)
    parts = range(of_source.description["parts"])
    shared = [_shared(of_source.places(part), of_target.places(part)) for part in parts]
    is_held_out = torch.cat([places.is_held_out for places in shared])
    if not is_held_out.any() or is_held_out.all():
        raise UserError(f"{source!r} and {target!r} share too few places; sketch both models at more --places.")
    described = {
        "source": of_source.description["model"], "target": of_target.description["model"],
        "text": of_source.description.get("text"), "roles": roles, "ridge": ridge,
        "seed": of_source.description["seed"], "shard": None,
        "positions": int((~is_held_out).sum()), "castlora_version": __version__,
    }  # fmt: skip
    inputs = {"--source": of_source.fingerprint(), "--target": of_target.fingerprint()}
    return write_bridge(out, request, plan, described, inputs, partial(_statistics, sketches, plan, shared))


def _common_roles(of_source: list[Role] | None, of_target: list[Role] | None) -> list[Role] | None:
    """Roles of the modules that both sketches have; None for all."""
    if of_source is None or of_target is None:
        return of_source or of_target
    common = [role for role in of_source if role in of_target]
    if not common:
        raise UserError(
            f"The sketches have {', '.join(of_source)} and {', '.join(of_target)}, none in common; make both with the "
            "same --roles."
        )
    return common


def _shared(of_source: Tensor, of_target: Tensor) -> SharedPlaces:
    """The places that both sketches of a part have.

    Args:
        of_source: number of the passage, and bytes of it that have been read, shape (places, 2)
        of_target: the same of the target
    """
    source_keys, target_keys = ((places[:, 0] << 32 | places[:, 1]).numpy() for places in (of_source, of_target))
    _, *rows = np.intersect1d(source_keys, target_keys, assume_unique=True, return_indices=True)
    in_source, in_target = map(torch.from_numpy, rows)
    return SharedPlaces(in_source, in_target, of_source[in_source, 0] % _HELD_OUT_EVERY == 0)


def _statistics(
    sketches: tuple[Sketch, Sketch],
    plan: BridgePlan,
    shared: Sequence[SharedPlaces],
    site: InputSite,
    pairs: Sequence[ModulePair],
) -> SiteStatistics:
    """Statistics of a site over the places of all parts to solve from, and over the held-out ones."""
    fitted, held_out = SiteMoments({}, {}), SiteMoments({}, {})
    of_site = Pairing(tuple(pairs), plan.pairing.layer_map, ())
    of_source, of_target = sketches
    source_modules = [branch.source_module for _, _, branch in of_site.branches()]
    target_modules = [pair.target.name for pair in pairs]
    for part, places in enumerate(shared):
        source = _activations(of_source, source_modules, part, places.in_source)
        target = _activations(of_target, target_modules, part, places.in_target)
        for moments, counted in ((fitted, ~places.is_held_out), (held_out, places.is_held_out)):
            add_batch(moments, of_site, _only(source, counted), _only(target, counted), torch.device("cpu"))
    return site_statistics(fitted, site, pairs), site_statistics(held_out, site, pairs)


def _activations(sketch: Sketch, modules: Iterable[str], part: int, rows: Tensor) -> dict[str, Activations]:
    """What went into and came out of modules at some places of a part."""
    sites = dict.fromkeys(model_site(sketch.plan.slots[name]) for name in modules)
    return {name: one for site in sites for name, one in sketch.activations(part, site, rows).items()}


def _only(activations: Mapping[str, Activations], counted: Tensor) -> dict[str, Activations]:
    return {name: Activations(one.inputs[counted], one.outputs[counted]) for name, one in activations.items()}
