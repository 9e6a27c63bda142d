"""The settings of a run in a reader's words, from its manifest."""

import json
from collections.abc import Mapping
from typing import Any

from castlora.report.formatting import MISSING

_INPUTS = {
    "source model": ("source", "name"),
    "revision of the source": ("source", "revision"),
    "target model": ("target", "name"),
    "adapter": ("adapter", "name"),
    "kind of adapter": ("adapter", "kind"),
    "rank of the adapter": ("adapter", "rank"),
    "rank written": ("rank",),
    "known of the task": ("text", "regime"),
    "general text": ("text", "text"),
    "prompt format": ("text", "prompt_format"),
    "file of prompts": ("text", "prompts"),
    "taught text": ("text", "taught"),
    "chat templates": ("text", "chat"),
    "formats filled": ("text", "formats"),
    "training passages": ("passages", "training"),
    "held-out passages": ("passages", "held_out"),
    "variants made of prompts": ("passages", "variants"),
    "seed": ("seed",),
}
RECIPE_WORDS = {
    "name": "recipe",
    "start": "start",
    "trained": "what is trained",
    "steps": "steps",
    "batch_size": "passages per step",
    "kl_weight": "weight of the KL divergence",
    "mse_weight": "weight of hidden states",
    "chunk_weight": "weight of chunks",
    "temperature": "temperature",
    "context_weight": "weight of places in prompts",
    "write_answers": "source + LoRA writes answers",
    "answer_tokens": "longest answer, in tokens",
    "learning_rate_scale": "peak learning rate × width",
    "map_learning_rate_ratio": "learning rate of maps, as a share",
    "ridge": "ridge penalty",
    "passages": "most passages drawn",
    "fewest_prompts": "prompts that variants fill up to",
    "filled_passages": "most prompts made of text",
    "candidates": "prompts tried for each kept",
    "sentences": "most sentences in a prompt",
    "format_candidates": "prompt formats tried",
    "max_length": "tokens per passage",
    "rehearsal_weight": "weight of rehearsal",
    "rehearsal_passages": "passages rehearsed",
    "rehearsal_tokens": "tokens per rehearsed passage",
}
_VALUE_WORDS = {
    ("start", "paper"): "random maps (paper)",
    ("start", "ridge"): "closed-form maps (ridge)",
    ("start", "readout"): "closed-form maps (ridge), last layer solved for the predictions",
    ("start", "fresh"): "plain LoRA (fresh)",
    ("trained", "maps"): "the maps",
    ("trained", "factors"): "the factors of the LoRA",
}
_DERIVED = "departures"
"""Of a recipe: what its other entries say already."""
_LONGEST_VALUE = 300


def settings_in_words(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Every setting of a run and what it is, versions of libraries included."""
    recipe = {name: value for name, value in manifest["recipe"].items() if name != _DERIVED}
    in_recipe = {RECIPE_WORDS.get(name, str(name)): _recipe_value(name, value) for name, value in recipe.items()}
    # Most runs have no choice, and those of versions before it do not name it.
    choice = manifest.get("start_choice")
    if choice is not None and choice["is_copied"]:
        in_recipe["start"] = f"the adapter as it is, nearer than {in_recipe['start']}"
    return {
        **{words: in_words(_at(manifest, path)) for words, path in _INPUTS.items()},
        **in_recipe,
        **{f"version of {package}": in_words(version) for package, version in manifest["versions"].items()},
    }


def identity(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What two runs must share for their measures to be comparable; a value is empty where it is not recorded."""
    return {
        "source models": json.dumps(manifest["source"], sort_keys=True),
        "adapters": json.dumps(manifest["adapter"], sort_keys=True),
        "seeds": json.dumps(manifest["seed"]),
        "held-out texts": str(manifest.get("held_out_sha256") or ""),
    }


def measured_positions(manifest: Mapping[str, Any]) -> str:
    """What decides at which places and over which tokens the divergence of a run is measured."""
    return json.dumps([manifest["target"]["tokenizer_sha256"], manifest["recipe"]["context_weight"]])


def objective(manifest: Mapping[str, Any]) -> str:
    """What decides what the loss of a run means."""
    parts = ("kl_weight", "mse_weight", "chunk_weight", "temperature", "context_weight")
    recipe = manifest["recipe"]
    # Runs of versions that rehearsed nothing do not name its weight.
    return json.dumps([*(recipe[part] for part in parts), recipe.get("rehearsal_weight", 0.0)])


def in_words(value: object) -> str:
    """A value of the manifest as text of readable length."""
    if isinstance(value, list):
        text = " · ".join(map(in_words, value)) or "none"
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = MISSING if value is None else str(value).replace("\n", "↵")
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"


def _recipe_value(name: str, value: object) -> str:
    return _VALUE_WORDS.get((name, str(value)), in_words(value))


def _at(manifest: Mapping[str, Any], path: tuple[str, ...]) -> object:
    found: Any = manifest
    for key in path:
        found = found[key]
    return found
