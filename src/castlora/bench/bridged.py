"""Bridges in the quality benchmark: fitted once for a pair, they carry the adapters of all skills."""

import time
from dataclasses import dataclass
from functools import lru_cache
from tempfile import TemporaryDirectory
from typing import Any

from castlora.adapters.files import open_adapter
from castlora.bench.grid import Cell, Settings, score
from castlora.bench.untrained import attach_update
from castlora.bridge.card import mean_explained
from castlora.bridge.cast_maps import CastMaps
from castlora.bridge.fit import fit
from castlora.config import Regime
from castlora.models.loading import best_device, load_model


@dataclass(frozen=True)
class Bridged:
    """`castlora fit` and `castlora translate` as they are by default."""

    regimes: tuple[Regime, ...] = ("general",)

    def run(self, settings: Settings, cell: Cell) -> dict[str, Any]:
        """Fits a bridge unless the pair and the seed have one, carries the cell's adapter, and scores."""
        spec = settings.spec
        bridge, fit_seconds = _fitted(spec.base(cell.source), spec.base(cell.target), spec.text, cell.seed)
        started = time.monotonic()
        translated = CastMaps.load(bridge.name).translate(open_adapter(spec.adapter(cell.source, cell.skill)))
        translate_seconds = time.monotonic() - started
        target, tokenizer = load_model(spec.base(cell.target), device=best_device())
        there, back = mean_explained(translated.fits)
        return {
            "explained_to_source": there,
            "explained_from_source": back,
            "scale": translated.scale,
            "fit_seconds": round(fit_seconds, 1),
            "translate_seconds": round(translate_seconds, 3),
            **score(spec, attach_update(target, translated.factors).causal_lm(), tokenizer, cell.skill),
        }


@lru_cache(maxsize=4)
def _fitted(source: str, target: str, text: str | None, seed: int) -> tuple[TemporaryDirectory[str], float]:
    """A bridge, which is there as long as this is remembered, and the seconds that it took."""
    started = time.monotonic()
    folder = TemporaryDirectory()
    fit(source, target, folder.name, text, seed=seed)
    return folder, time.monotonic() - started
