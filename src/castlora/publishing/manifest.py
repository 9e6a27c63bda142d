"""The manifest of a transfer: everything needed to judge it and to run it again."""

import hashlib
import json
import re
import resource
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from castlora import __version__
from castlora.alignment.positions import AlignedPassage
from castlora.config import Recipe, RecipeName, recipe_differences
from castlora.evaluation.imitation import Imitation
from castlora.model_pair import Models
from castlora.models.loading import best_device, public_name, reads_images
from castlora.models.pairing import Pairing
from castlora.plan import Plan
from castlora.publishing.runs import MANIFEST_FILE as MANIFEST_FILE
from castlora.teaching.curriculum import TextSource

_LOCATIONS = ("adapter", "target", "source", "text", "prompts", "taught", "task", "out")
_STATUS = Path("/proc/self/status")
_REPORTED_PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "tokenizers")


def describe_inputs(plan: Plan, models: Models, text: TextSource, formats: Sequence[str]) -> dict[str, Any]:
    """Both bases, the adapter and the text, without any path of this machine."""
    source_rank = max(factors.rank for factors in plan.factors.values())
    return {
        "source": {
            "name": public_name(plan.source),
            "revision": plan.source_revision,
            "tokenizer_sha256": models.source_bytes.fingerprint,
        },
        "target": {
            "name": public_name(plan.target),
            "revision": None,
            "reads_images": reads_images(plan.target_config),
            "tokenizer_sha256": models.target_bytes.fingerprint,
        },
        "adapter": {
            "name": public_name(plan.adapter.name),
            "kind": plan.adapter.kind,
            "rank": source_rank,
            "beyond_maps": list(plan.beyond),
        },
        "text": {
            "regime": text.regime,
            "text": public_name(text.general) if text.general else None,
            "prompt_format": text.prompt_format,
            "prompts": public_name(text.prompts) if text.prompts else None,
            "chat": text.chat,
            "taught": public_name(text.taught) if text.taught else None,
            "formats": list(formats),
        },
    }


def describe_recipe(recipe: Recipe, name: RecipeName) -> dict[str, Any]:
    """The resolved recipe, its name, and where it departs from the named one."""
    return {"name": name, **asdict(recipe), "departures": recipe_differences(recipe, name)}


def describe_imitation(imitation: Imitation | None) -> dict[str, Any] | None:
    """How often the target writes what source + LoRA writes after held-out prompts; None where there are none."""
    if imitation is None:
        return None
    shares = {"same_before": imitation.same_before, "same_after": imitation.same_after, "ci95": list(imitation.ci95)}
    return {"prompts": len(imitation.prompts), **shares, "same_by_chance": imitation.same_by_chance}


def describe_pairing(pairing: Pairing) -> list[dict[str, Any]]:
    """One entry per target module: its sources, none if it stays unchanged."""
    return [
        {
            "target": pair.target.name,
            "sources": [{"module": branch.source_module, "roles": list(branch.roles)} for branch in pair.branches],
        }
        for pair in pairing.pairs
    ]


def text_sha256(passages: Sequence[AlignedPassage]) -> str:
    """Digest of passages as the source reads them: runs on the same source that share it have read the same text."""
    return hashlib.sha256(json.dumps([passage.source_ids for passage in passages]).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of castlora and of the libraries that decide its results."""
    return {"castlora": __version__, **{package: version(package) for package in _REPORTED_PACKAGES}}


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far."""
    # On Linux `ru_maxrss` begins with what the process had that started this one.
    highest = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(errors="replace"), re.M) if _STATUS.exists() else None
    if highest:
        return int(highest[1]) << 10
    # macOS counts bytes here, other systems kibibytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_accelerator_bytes() -> int | None:
    """The most memory of a CUDA accelerator that this process has reserved at once; None where it runs on another.

    What the driver keeps for every process, some hundred MiB, is not in it.
    """
    device = best_device()
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def command_line(request: Mapping[str, Any], place: Callable[[str], str] = public_name, processes: int = 1) -> str:
    """The command that repeats a run.

    Args:
        request: values of the options
        place: how folders, files and hub ids are written; by default local ones by their last component
        processes: how many of them shared the run
    """
    # Without the dashes torchrun takes --start for an abbreviation of an option of its own.
    launcher = ["torchrun", "--nproc-per-node", str(processes), "-m", "--"] if processes > 1 else []
    words = [*launcher, "castlora", "transfer"]
    for field, value in request.items():
        if value is None or value is False or isinstance(value, dict):
            continue
        words += [f"--{field.replace('_', '-')}", place(value) if field in _LOCATIONS else _word(value)]
    for field, value in request["tuning"].items():
        if value is not None:
            words += [f"--tuning.{field.replace('_', '-')}", _word(value)]
    return shlex.join(words)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
