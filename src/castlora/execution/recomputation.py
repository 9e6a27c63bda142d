"""Activations that are computed again for the backward pass instead of being kept for it."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint


def recompute_activations(model: nn.Module, layers: Iterable[str]) -> None:
    """Has decoder layers keep nothing but their input for the backward pass, in which each runs forward once more.

    transformers has a switch for the same, which works in training mode alone and would turn dropout on.

    Args:
        model: whose layers are changed
        layers: module paths inside it
    """
    for name in layers:
        layer = model.get_submodule(name)
        layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **options)
        return checkpoint(
            forward, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts, **options
        )

    return run


def _contexts() -> tuple[Any, Any]:
    """Of the two runs; both must find weights that are folded from maps in the same state."""
    return nullcontext(), parametrize.cached()
