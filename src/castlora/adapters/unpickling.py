"""The one place that opens a pickle: weights that PEFT saved before it knew safetensors."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castlora.errors import UserError, first_line
from castlora.models.loading import LIBRARY_ERRORS

PICKLED_FILE = "adapter_model.bin"


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file, by name. Nothing in it is run: PyTorch builds tensors and plain containers alone.

    Raises:
        UserError: it is damaged, or holds anything but named tensors.
    """
    try:
        tensors: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (*LIBRARY_ERRORS, pickle.UnpicklingError, EOFError) as error:
        raise UserError(
            f"{str(path)!r} holds more than tensors or is damaged ({first_line(error)}); ask for a safetensors file."
        ) from error
    is_named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not is_named or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{str(path)!r} holds more than named tensors; ask for a safetensors file.")
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
