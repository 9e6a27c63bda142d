"""Adapters over a bridge: the maps of each site are read, and the adapter's factors folded with them."""

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor
from tqdm.auto import tqdm

from castlora import __version__
from castlora.adapters.factors import PORTABLE_RANKS, LowRank, Update, portable_rank, read_update, write_portable
from castlora.adapters.files import TRANSLATION_FILE, AdapterFiles, open_adapter
from castlora.bridge.card import Fits, mean_explained, write_translation_card
from castlora.bridge.files import BRIDGE_FILE, read_all_fits, read_description, site_file
from castlora.bridge.maps_file import read_fits, read_maps
from castlora.errors import UserError
from castlora.execution.run_directory import folder_names, is_finished, open_run, write_whole
from castlora.maps.cast_layer import cut_to_rank
from castlora.maps.shared_maps import TO_SOURCE, branch_name, by_site, fold_site, site_shapes
from castlora.models.pairing import ModulePair, Pairing, pair_modules
from castlora.publishing.hub import upload
from castlora.publishing.licences import CARD_FILE
from castlora.publishing.names import public_name

logger = logging.getLogger("castlora")

_FILES = (BRIDGE_FILE, CARD_FILE, "source/config.json", "target/config.json", "layer-*.safetensors")
SCALE_BETWEEN_RELATED = 1.3
"""Regression predicts less of noisy activations than there is, on the way to the source and on the way back. Chosen on
three skills between two models, docs/translate.md."""
_HINT = "give a folder that castlora fit wrote, or its hub id"


@dataclass(frozen=True)
class Translated:
    """What an adapter becomes for the target."""

    factors: dict[str, LowRank]
    """By target module, with the scale in B."""
    source_rank: int
    """Largest rank of the adapter."""
    rank: int
    """Rank to write it with, one that engines accept."""
    cut: float
    """What that rank leaves out, as a share of the norm."""
    scale: float
    """What the update was multiplied by."""
    total_scale: float
    """That times what it had been multiplied by on bridges before."""
    pairing: Pairing
    fits: Fits
    """Site → how well the maps that were used do."""


class CastMaps:
    """Maps between two models for any adapter, as `castlora.fit` has them in a folder.

    They are read site by site when an adapter is folded; what is in memory is the maps of one site.

    Attributes:
        folder: where the files are
        description: what `bridge.json` says
        plan: both models as far as their configurations tell
    """

    def __init__(self, folder: Path) -> None:
        """Opens a bridge.

        Raises:
            UserError: the folder is none, or damaged.
        """
        self.folder = folder
        self.description, self.plan = read_description(folder, BRIDGE_FILE, _HINT)

    @classmethod
    def load(cls, name_or_path: str, revision: str | None = None) -> "CastMaps":
        """Opens a bridge in a folder or on the hub.

        Raises:
            UserError: there is none, or it is damaged.
        """
        if Path(name_or_path).is_dir():
            return cls(Path(name_or_path))
        if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
            raise UserError(f"Bridge {name_or_path!r} is not a folder; {_HINT}.")
        try:
            return cls(Path(snapshot_download(name_or_path, revision=revision, allow_patterns=list(_FILES))))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise UserError(f"Bridge {name_or_path!r} is neither a folder here nor reachable on the hub.") from error

    def save(self, folder: Path) -> None:
        """Copies the bridge to a new folder.

        Raises:
            UserError: the folder exists.
        """
        if folder.exists():
            raise UserError(f"{str(folder)!r} exists; give a new folder, nothing is ever overwritten.")
        for pattern in _FILES:
            for path in self.folder.glob(pattern):
                place = folder / path.relative_to(self.folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)

    def push(self, repo: str, private: bool = False) -> str:
        """Uploads the bridge to the hub, as whoever `hf auth login` has logged in.

        Args:
            repo: OWNER/NAME; made if there is none, and added to if there is
            private: whether a new repository is private

        Returns:
            the address of the commit

        Raises:
            UserError: others could not use it, or the hub does not take it.
        """
        for side in ("source", "target"):
            if Path(self.description[side]).exists():
                raise UserError(
                    f"{BRIDGE_FILE} names the {side} by the folder {self.description[side]!r}, which others do not "
                    "have; fit it with --source and --target by their hub ids."
                )
        return upload(self.folder, repo, private, list(_FILES), "Upload bridge fitted by castlora")

    @cached_property
    def fits(self) -> Fits:
        """Site → name of a map → how well it does on held-out text."""
        return read_all_fits(self.folder, self.plan)

    def translate(self, adapter: AdapterFiles, scale: float | None = None) -> Translated:
        """Folds an adapter with the maps, as CAST does (arXiv 2510.17902, eq. 1-3).

        Args:
            adapter: a plain LoRA for the source, as `open_adapter` gives it
            scale: of the update; by default 1.3 where most maps were drawn towards the identity and no bridge has
                scaled it before, else 1

        Raises:
            UserError: it is none, does not fit the source, changes modules that the bridge has no maps for, or a file
                of the bridge is damaged.
        """
        pairing, update = self.pair(adapter)
        factors = update.factors
        if update.beyond:
            logger.warning("%r also trains %s, which no map carries.", adapter.name, ", ".join(update.beyond))
        folded: dict[str, LowRank] = {}
        fits = {}
        for site, pairs in by_site(pairing):
            path = self.folder / site_file(site)
            # No name is bound to the maps, so that they are gone before those of the next site are read.
            folded |= fold_site(self._checked_maps(path, pairs), pairs, pairing, factors, _anchored(path))
            used = {TO_SOURCE, *(branch_name(pair, branch) for pair in pairs for branch in pair.branches)}
            fits[path.stem] = {name: fit for name, fit in read_fits(path).items() if name in used}
        largest = max(lora.rank for lora in folded.values())
        rank = portable_rank(min(largest, PORTABLE_RANKS[-1]))
        before = _scaled_before(adapter)
        if scale is None:
            scale = SCALE_BETWEEN_RELATED if are_related(fits) and before == 1 else 1.0
        for lora in folded.values():
            lora.b.mul_(scale)
        written, cut = cut_to_rank(folded, rank) if largest > rank else (folded, 0.0)
        source_rank = max(lora.rank for lora in factors.values())
        return Translated(written, source_rank, rank, cut, scale, before * scale, pairing, fits)

    def pair(self, adapter: AdapterFiles) -> tuple[Pairing, Update]:
        """What an adapter reaches in the target, and what it changes in the source, without modules left as they are.

        Raises:
            UserError: it is no plain LoRA, does not fit the source, or changes modules that the bridge has no maps for.
        """
        if not adapter.is_plain:
            raise UserError(
                f"Adapter {adapter.name!r} is of kind {adapter.kind}, whose update depends on the weights of its base "
                "model; give a plain LoRA, or move it with castlora transfer."
            )
        update = read_update(adapter, self.plan.source_config)
        # Portable adapters hold zeros in modules that engines want beside those that are changed.
        factors = {name: lora for name, lora in update.factors.items() if lora.a.any() and lora.b.any()}
        pairing = pair_modules(self.plan.source_slots, self.plan.target_slots, factors)
        known = {branch_name(pair, branch) for pair, _, branch in self.plan.pairing.branches()}
        for pair, _, branch in pairing.branches():
            if branch_name(pair, branch) not in known:
                raise UserError(
                    f"Adapter {adapter.name!r} changes {branch.source_module!r}, for which the bridge has no maps; fit "
                    "one with these --roles, or with all."
                )
        return pairing, Update(factors, update.beyond)

    def _checked_maps(self, path: Path, pairs: Sequence[ModulePair]) -> dict[str, Tensor]:
        maps = read_maps(path)
        for name, shape in site_shapes(pairs, self.plan.source_widths).items():
            if name not in maps or maps[name].shape != shape:
                raise UserError(
                    f"{path.name} of the bridge {str(self.folder)!r} has no map {name!r} of shape {shape}; "
                    "copy it again."
                )
        return maps


def translate(bridge: str, adapters: Sequence[str], out: str, scale: float | None = None) -> list[Path]:
    """Carries adapters over a bridge; no model is loaded, and nothing is trained.

    Called again with the same arguments after an interruption, it continues where it was.

    Args:
        bridge: folder or hub id of what `castlora.fit` wrote
        adapters: folders or hub ids of plain LoRAs for its source
        out: folder to write, which must not hold anything else; for several adapters it gets a folder for each, named
            by the last component of its name
        scale: of the update; by default 1.3 between related models, whose maps predict less than there is, else 1, as
            where a bridge before has scaled it

    Returns:
        the folder of each adapter

    Raises:
        UserError: the bridge or an adapter cannot be used; nothing has been written then.
    """
    if scale is not None and not 0 < scale < math.inf:
        raise UserError(f"scale is {scale}; give a number above 0.")
    maps = CastMaps.load(bridge)
    opened = {name: open_adapter(adapter) for adapter, name in folder_names("--adapter", adapters).items()}
    if len(opened) == 1:
        (files,) = opened.values()
        return [_write(maps, files, out, scale)]
    for files in opened.values():
        maps.pair(files)
        _scaled_before(files)
    request = {"bridge": bridge, "adapters": list(adapters), "scale": scale, "castlora_version": __version__}
    with open_run(out, request, 0) as run:
        folders = {run.out / name: files for name, files in opened.items()}
        for folder, files in tqdm(folders.items(), desc="adapters", unit="adapter"):
            if not is_finished(folder):
                _write(maps, files, str(folder), scale)
        run.finished.mkdir()
        run.publish()
    return list(folders)


def _anchored(path: Path) -> set[str]:
    """Names of the maps of a site that were drawn towards the identity."""
    return {name for name, fit in read_fits(path).items() if fit.is_anchored}


def are_related(fits: Fits) -> bool:
    """Whether most maps were drawn towards the identity, so that one model was trained on from the other."""
    anchored = [fit.is_anchored for of_site in fits.values() for fit in of_site.values()]
    return 2 * sum(anchored) > len(anchored)


def _scaled_before(adapter: AdapterFiles) -> float:
    """What bridges that an adapter went over have multiplied its update by.

    Raises:
        UserError: its record is damaged.
    """
    path = adapter.folder / TRANSLATION_FILE
    if not path.is_file():
        return 1.0
    try:
        scale = float(json.loads(path.read_text(encoding="utf-8"))["total_scale"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise UserError(
            f"{TRANSLATION_FILE} of {adapter.name!r} has no total_scale; copy the adapter again."
        ) from error
    if not 0 < scale < math.inf:
        raise UserError(f"total_scale in {TRANSLATION_FILE} of {adapter.name!r} is {scale}; copy the adapter again.")
    return scale


def _write(maps: CastMaps, adapter: AdapterFiles, out: str, scale: float | None) -> Path:
    """Writes what an adapter becomes, with its card and what was done."""
    request = {
        "bridge": str(maps.folder), "adapter": adapter.name, "scale": scale, "castlora_version": __version__,
    }  # fmt: skip
    with open_run(out, request, 0) as run:
        try:
            translated = maps.translate(adapter, scale)
        except UserError:
            run.discard()
            raise
        there, back = mean_explained(translated.fits)
        target = maps.description["target"]
        record = {
            "adapter": public_name(adapter.name),
            "adapter_sha256": adapter.weights_sha256,
            "adapter_rank": translated.source_rank,
            "source": public_name(maps.description["source"]),
            "target": public_name(target),
            "rank": translated.rank,
            "cut": translated.cut,
            "scale": translated.scale,
            "total_scale": translated.total_scale,
            "dropped": list(translated.pairing.dropped),
            "explained_to_source": there,
            "explained_from_source": back,
            "castlora_version": __version__,
        }
        run.finished.mkdir()
        write_portable(run.finished, translated.factors, maps.plan.target_slots, translated.rank, target, None)
        write_whole(run.finished / TRANSLATION_FILE, json.dumps(record, indent=1))
        write_translation_card(run.finished, record)
        run.publish()
    logger.info("Wrote %s; the maps explain %.0f %% of held-out activations to the source and %.0f %% from it", out,
                100 * there, 100 * back)  # fmt: skip
    return Path(out)
