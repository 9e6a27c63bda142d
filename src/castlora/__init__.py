"""castlora moves a LoRA adapter from one language model to another, without the task's data.

CAST: arXiv 2510.17902.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from castlora.adapters.conversion import convert
    from castlora.adapters.portable import check_portable
    from castlora.bridge.cast_maps import CastMaps, translate
    from castlora.bridge.fit import fit, merge_statistics
    from castlora.bridge.join import join
    from castlora.bridge.sketch import sketch
    from castlora.errors import UserError
    from castlora.inspection import inspect
    from castlora.maps.cast_layer import CastLayer
    from castlora.pipeline import transfer
    from castlora.publishing.hub import push
    from castlora.publishing.runs import report_runs
    from castlora.scoring import evaluate
    from castlora.several import transfer_to_each
    from castlora.steering import steer
    from castlora.teaching.teach import teach

__all__ = [
    "CastLayer", "CastMaps", "UserError", "__version__", "check_portable", "convert", "evaluate", "fit", "inspect",
    "join", "merge_statistics", "push", "report_runs", "sketch", "steer", "teach", "transfer", "transfer_to_each",
    "translate",
]  # fmt: skip

_HOMES = {
    "CastLayer": "castlora.maps.cast_layer",
    "CastMaps": "castlora.bridge.cast_maps",
    "UserError": "castlora.errors",
    "check_portable": "castlora.adapters.portable",
    "convert": "castlora.adapters.conversion",
    "evaluate": "castlora.scoring",
    "fit": "castlora.bridge.fit",
    "inspect": "castlora.inspection",
    "join": "castlora.bridge.join",
    "merge_statistics": "castlora.bridge.fit",
    "push": "castlora.publishing.hub",
    "report_runs": "castlora.publishing.runs",
    "sketch": "castlora.bridge.sketch",
    "steer": "castlora.steering",
    "teach": "castlora.teaching.teach",
    "transfer": "castlora.pipeline",
    "transfer_to_each": "castlora.several",
    "translate": "castlora.bridge.cast_maps",
}


def __getattr__(name: str) -> Any:
    """Imports the public names on first use: torch takes seconds to load."""
    if name not in _HOMES:
        raise AttributeError(f"module 'castlora' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
