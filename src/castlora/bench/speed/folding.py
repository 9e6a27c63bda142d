"""How long it takes to fold the maps of one adapter into a plain LoRA, and in how much memory."""

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from multiprocessing import get_context
from typing import Any

import torch

from castlora.bench.speed.measures import SpeedSettings
from castlora.bench.speed.models import SHAPES, random_adapter, random_maps
from castlora.config import ShapeName
from castlora.maps.starts import fold_maps
from castlora.models.modules import module_type
from castlora.models.pairing import Pairing
from castlora.publishing.manifest import peak_memory_bytes

FOLD_TARGETS: dict[ShapeName, float] = {"zoo": 0.2, "7b": 30.0}
"""Seconds for all modules."""


@dataclass(frozen=True)
class Folding:
    """The folds of all modules of one target, on a processor."""

    shape: ShapeName
    modules: int
    rank: int
    threads: int
    seconds: list[float]
    """Elapsed, for all modules, once per repetition."""
    peak_bytes: int
    """Resident memory at its highest, the source adapter and the maps of one module included."""
    idle_bytes: int
    """Resident memory at its highest before any of them was made."""
    target: float

    def describe(self) -> dict[str, Any]:
        """What the record keeps."""
        return {**asdict(self), "is_met": sorted(self.seconds)[len(self.seconds) // 2] <= self.target}


def measure_folding(settings: SpeedSettings) -> list[Folding]:
    """Folds at the size of the zoo and at that of 7B models, each in a process of its own."""
    foldings: dict[ShapeName, tuple[int, int]] = {"zoo": (settings.rank, settings.repeats), "7b": (16, 3)}
    with ProcessPoolExecutor(max_workers=1, max_tasks_per_child=1, mp_context=get_context("spawn")) as processes:
        return [
            processes.submit(fold_all, shape, rank, settings.seed, repeats, settings.threads).result()
            for shape, (rank, repeats) in foldings.items()
        ]


def fold_all(shape: ShapeName, rank: int, seed: int, repeats: int, threads: int) -> Folding:
    """Folds module by module.

    The modules of one kind have the same maps, since drawing new ones would take longer than all else.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    idle = peak_memory_bytes()
    factors, pairing = random_adapter(SHAPES[shape], rank)
    by_kind = sorted(pairing.mapped, key=lambda pair: module_type(pair.target.name))
    seconds = [0.0] * repeats
    for _, of_kind in groupby(by_kind, key=lambda pair: module_type(pair.target.name)):
        pairs = list(of_kind)
        (drawn,) = random_maps(pairs[0], factors).values()
        for repetition in range(repeats):
            started = time.perf_counter()
            for pair in pairs:
                fold_maps(Pairing((pair,), pairing.layer_map, ()), factors, {(pair.target.name, 0): drawn})
            seconds[repetition] += time.perf_counter() - started
    modules = len(pairing.mapped)
    return Folding(shape, modules, rank, threads, seconds, peak_memory_bytes(), idle, FOLD_TARGETS[shape])
