"""Licences of what goes into a transfer, as far as the cards beside it name them."""

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from castlora.plan import Plan

logger = logging.getLogger("castlora")

CARD_FILE = "README.md"
Licences = Mapping[str, str | None]
"""The identifier of each part's licence by the part; None where no card names one."""
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,95}")


def read_licences(plan: Plan, text: str | None = None) -> dict[str, str | None]:
    """The licences of what goes into a transfer, from cards in folders or on the hub; a warning names unlike ones.

    Args:
        plan: names the source adapter and both base models
        text: file or hub data set that is read, if any
    """
    licences = {
        "source adapter": licence_of(plan.adapter.name),
        "source base model": licence_of(plan.source, plan.source_revision),
        "target base model": licence_of(plan.target),
    }
    if text is not None:
        licences["text"] = licence_of(text, repo_type="dataset")
    if licences_differ(licences):
        logger.warning("%s Whether they go together is for you to judge.", describe_licences(licences))
    return licences


def licence_of(name: str, revision: str | None = None, repo_type: str = "model") -> str | None:
    """The licence that a card names in its metadata.

    Args:
        name: folder, file or hub id
        revision: on the hub
        repo_type: `model` or `dataset`, on the hub

    Returns:
        an identifier as the hub has them; None where there is no card, or none that names a licence
    """
    try:
        if Path(name).exists():
            card = Path(name) / CARD_FILE
        else:
            card = Path(hf_hub_download(name, CARD_FILE, revision=revision, repo_type=repo_type))
        metadata: Any = metadata_load(card) or {}
    except (OSError, ValueError, RecursionError, HfHubHTTPError, HFValidationError, yaml.YAMLError):
        return None
    # Licences without an identifier of the hub's are called "other" there, and have a name.
    named = metadata.get("license_name") if metadata.get("license") == "other" else metadata.get("license")
    licence = named or metadata.get("license")
    return licence if isinstance(licence, str) and _IDENTIFIER.fullmatch(licence) else None


def licences_differ(licences: Licences) -> bool:
    """Whether the known licences are more than one."""
    return len(set(licences.values()) - {None}) > 1


def describe_licences(licences: Licences, quote: Callable[[str], str] = str) -> str:
    """One sentence that names the licences and what is not known; it judges nothing.

    Args:
        licences: by part
        quote: writes an identifier

    Example:
        >>> describe_licences({"source adapter": "mit", "target base model": "gemma", "text": None})
        'Licences differ: source adapter mit, target base model gemma; not known: that of the text.'
    """
    known = [f"{part} {quote(licence)}" for part, licence in licences.items() if licence]
    unknown = [f"that of the {part}" for part, licence in licences.items() if licence is None]
    if not known:
        return f"Licences are not known: {', '.join(unknown)}."
    said = f"{'Licences differ' if licences_differ(licences) else 'Licences'}: {', '.join(known)}"
    return f"{said}; not known: {', '.join(unknown)}." if unknown else f"{said}."
