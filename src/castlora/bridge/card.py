"""The cards of a bridge and of an adapter that went over one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from castlora.maps.shared_maps import TO_SOURCE, Fit
from castlora.publishing.licences import CARD_FILE
from castlora.publishing.markdown import fenced, table
from castlora.publishing.names import is_hub_id, quoted_name
from castlora.report.formatting import percent

Fits = Mapping[str, Mapping[str, Fit]]
"""Site → name of a map → how well it does."""

_LIMITS = """\
- The maps know no adapter. Where the target was trained on from the source, they carry much of what an adapter does;
  between unrelated models next to nothing. Score an adapter that they carried before you use it.
- They belong to these two models, as they were when the maps were fitted.
- The licences and terms of both models and of the text apply.
"""


def mean_explained(fits: Fits) -> tuple[float, float]:
    """What the maps explain of held-out activations, to the source and from it, as means over the maps."""
    both = [(name == TO_SOURCE, fit.explained) for of_site in fits.values() for name, fit in of_site.items()]
    there, back = ([explained for goes, explained in both if goes is way] for way in (True, False))
    return fmean(there), fmean(back)


def write_bridge_card(folder: Path, description: Mapping[str, Any], fits: Fits) -> None:
    """Writes README.md, the card of a bridge.

    Args:
        folder: of the bridge
        description: what `castlora.fit` did
        fits: how well the maps do
    """
    source, target = (quoted_name(description[side]) for side in ("source", "target"))
    there, back = mean_explained(fits)
    anchored = [fit.is_anchored for of_site in fits.values() for fit in of_site.values()]
    facts = [
        ("source base model", source),
        ("target base model", target),
        ("modules", ", ".join(description["roles"]) if description["roles"] else "all"),
        ("text", f"{description['positions']:,} places, seed {description['seed']}"),
        ("ridge", f"{description['ridge']:g}"),
        ("drawn towards the identity", f"{sum(anchored)} of {len(anchored)} maps"),
        ("held-out activations explained", f"{percent(there)} to the source, {percent(back)} from it (means)"),
    ]
    sections = [
        f"# Bridge from {source} to {target}",
        f"Maps that carry LoRA adapters of {source} to {target}, each in seconds and without loading a model.",
        table(("", ""), facts),
        "## Use",
        fenced("shell", "castlora translate --bridge path/to/this/folder --adapter my-lora --out moved"),
        "## How well the maps predict held-out activations",
        table(("site", "to the source", "from the source"), [_row(site, of_site) for site, of_site in fits.items()]),
        "## Limits",
        _LIMITS,
    ]
    _save(folder, [description["target"]], sections)


def write_translation_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes README.md, the card of an adapter that went over a bridge.

    Args:
        folder: of the adapter
        record: what was done, as `translation.json` has it
    """
    adapter, source, target = (quoted_name(record[part]) for part in ("adapter", "source", "target"))
    facts = [
        ("source adapter", f"{adapter}, rank {record['adapter_rank']}"),
        ("source base model", source),
        ("rank", str(record["rank"])),
        ("scale of the update", f"{record['scale']:g}; {record['total_scale']:g} with bridges before"
         if record["total_scale"] != record["scale"] else f"{record['scale']:g}"),
        ("no partner in the target", ", ".join(record["dropped"]) or "nothing"),
        ("held-out activations explained", f"{percent(record['explained_to_source'])} to the source, "
         f"{percent(record['explained_from_source'])} from it (means)"),
    ]  # fmt: skip
    sections = [
        f"# {adapter} for {target}",
        f"A LoRA adapter for {target}, made of {adapter}, an adapter for {source}, by maps that castlora had fitted "
        "before and that know no adapter. Nothing was trained, and nothing is known of how much of the skill arrived.",
        table(("", ""), facts),
        "## Limits",
        _LIMITS,
    ]
    _save(folder, [record["target"]], sections)


def _row(site: str, fits: Mapping[str, Fit]) -> tuple[str, str, str]:
    back = (f"{name.split('.')[-1]} {percent(fit.explained)}" for name, fit in fits.items() if name != TO_SOURCE)
    return site, percent(fits[TO_SOURCE].explained), ", ".join(back)


def _save(folder: Path, bases: Sequence[str], sections: Sequence[str]) -> None:
    data = ModelCardData(library_name="castlora", tags=["castlora", "lora"])
    named = [base for base in bases if is_hub_id(base)]
    if named:
        data["base_model"] = named
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n").save(folder / CARD_FILE)
