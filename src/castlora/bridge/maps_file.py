"""The file of a site: its maps, and how well each of them does."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from castlora.errors import UserError, first_line
from castlora.execution.run_directory import write_whole
from castlora.finite import is_finite
from castlora.maps.shared_maps import Fit

_DTYPE = torch.bfloat16
"""Halves files that are read more often than written; what it rounds away is small beside what a fit leaves open."""
BYTES_PER_NUMBER = _DTYPE.itemsize
_FITS = "fits"


def write_maps(path: Path, maps: Mapping[str, Tensor], fits: Mapping[str, Fit]) -> None:
    """Writes the maps of a site, in full or not at all.

    Args:
        path: the file
        maps: by name, shape (d_y, d_x) each
        fits: how well each of them does
    """
    tensors = {name: tensor.to(_DTYPE).contiguous().cpu() for name, tensor in maps.items()}
    noted = json.dumps({name: asdict(fit) for name, fit in fits.items()})
    # Of several metadata the order on disk would change from run to run.
    write_whole(path, save(tensors, metadata={_FITS: noted}))


def read_maps(path: Path) -> dict[str, Tensor]:
    """The maps of a site by name.

    Raises:
        UserError: the file is missing, damaged or cut short, or holds NaN.
    """
    try:
        maps = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, first_line(error)) from error
    for name, tensor in maps.items():
        if not is_finite(tensor):
            raise _damaged(path, f"{name} holds NaN or infinity")
    return maps


def read_fits(path: Path) -> dict[str, Fit]:
    """How well each map of a site does; only the head of the file is read.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            noted = json.loads((file.metadata() or {})[_FITS])
        fits = {name: Fit(float(fit["explained"]), bool(fit["is_anchored"])) for name, fit in noted.items()}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, first_line(error)) from error
    if not all(math.isfinite(fit.explained) for fit in fits.values()):
        raise _damaged(path, "its figures are no numbers")
    return fits


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path.name} of the bridge {str(path.parent)!r} is missing or damaged ({why}); copy it again.")
