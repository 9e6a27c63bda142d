"""How long it takes to carry one adapter over a bridge, files included, and in how much memory."""

import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from castlora.adapters.factors import write_portable
from castlora.bench.speed.folding import FOLD_TARGETS
from castlora.bench.speed.measures import SpeedSettings
from castlora.bench.speed.models import SHAPES, random_adapter
from castlora.bridge.cast_maps import translate
from castlora.bridge.files import BRIDGE_FILE, plan_bridge, site_file, write_description
from castlora.bridge.maps_file import write_maps
from castlora.config import Role, ShapeName
from castlora.maps.shared_maps import Fit, site_shapes
from castlora.publishing.manifest import peak_memory_bytes

_ROLES: dict[ShapeName, tuple[Role, ...] | None] = {"zoo": None, "7b": ("q", "v")}
"""Of the modules that the adapter changes; those of a 7B model with all of them would have maps of 35 GiB."""
_BRIDGE, _ADAPTER, _MOVED = "bridge", "adapter", "moved"


@dataclass(frozen=True)
class Translation:
    """One adapter carried over a bridge, several times."""

    shape: ShapeName
    roles: tuple[Role, ...] | None
    rank: int
    threads: int
    maps_bytes: int
    seconds: list[float]
    """Elapsed, from opening the bridge to the written adapter."""
    peak_bytes: int
    """Resident memory at its highest when one adapter has been carried; files that are read count in it."""
    idle_bytes: int
    """The same before."""
    allowed_bytes: int
    """Twice the written adapter, and the maps of the layer that has the largest."""
    target: float

    def describe(self) -> dict[str, Any]:
        """What the record keeps."""
        is_in_time = sorted(self.seconds)[len(self.seconds) // 2] <= self.target
        is_in_memory = self.peak_bytes - self.idle_bytes <= self.allowed_bytes
        return {**asdict(self), "is_in_time": is_in_time, "is_in_memory": is_in_memory}


def measure_translating(settings: SpeedSettings) -> list[Translation]:
    """Carries an adapter at the size of the zoo and at that of 7B models, each in a process of its own."""
    sizes: dict[ShapeName, tuple[int, int]] = {"zoo": (settings.rank, settings.repeats), "7b": (16, 3)}
    found = []
    with ProcessPoolExecutor(max_workers=1, max_tasks_per_child=1, mp_context=get_context("spawn")) as processes:
        for shape, (rank, repeats) in sizes.items():
            with TemporaryDirectory() as folder:
                prepare(Path(folder), shape, rank, settings.seed)
                work = processes.submit(translate_repeatedly, folder, shape, rank, repeats, settings.threads)
                found.append(work.result())
    return found


def prepare(folder: Path, shape: ShapeName, rank: int, seed: int) -> None:
    """Writes a bridge of random maps, and an adapter for its source."""
    generator = torch.Generator().manual_seed(seed)
    for side, one in (("source", SHAPES[shape].source), ("target", SHAPES[shape].target)):
        one.config().save_pretrained(folder / side)
    source, target = str(folder / "source"), str(folder / "target")
    plan = plan_bridge(source, target, _ROLES[shape])
    bridge = folder / _BRIDGE
    bridge.mkdir()
    for site, pairs in plan.sites.items():
        maps = {
            name: torch.randn(size, generator=generator, dtype=torch.bfloat16) / size[1] ** 0.5
            for name, size in site_shapes(pairs, plan.source_widths).items()
        }
        write_maps(bridge / site_file(site), maps, dict.fromkeys(maps, Fit(0.0, False)))
    roles = _ROLES[shape]
    description = {"source": source, "target": target, "roles": list(roles) if roles else None, "seed": seed}
    write_description(bridge, BRIDGE_FILE, plan, description)
    torch.manual_seed(seed)
    factors, _ = random_adapter(SHAPES[shape], rank)
    changed = {branch.source_module for _, _, branch in plan.pairing.branches()}
    adapted = {name: lora for name, lora in factors.items() if name in changed}
    write_portable(folder / _ADAPTER, adapted, plan.source_slots, rank, source, None)


def translate_repeatedly(folder: str, shape: ShapeName, rank: int, repeats: int, threads: int) -> Translation:
    """Carries the adapter in a folder that `prepare` has filled."""
    torch.set_num_threads(threads)
    place = Path(folder)
    idle = peak_memory_bytes()
    seconds: list[float] = []
    peak = 0
    for _ in range(repeats):
        shutil.rmtree(place / _MOVED, ignore_errors=True)
        started = time.perf_counter()
        translate(str(place / _BRIDGE), [str(place / _ADAPTER)], str(place / _MOVED))
        seconds.append(time.perf_counter() - started)
        peak = peak or peak_memory_bytes()
    layers: dict[str, int] = {}
    for path in (place / _BRIDGE).glob("layer-*"):
        layer = path.name.rsplit("-", 1)[0]
        layers[layer] = layers.get(layer, 0) + path.stat().st_size
    adapter = sum(path.stat().st_size for path in (place / _MOVED).iterdir())
    allowed = 2 * adapter + max(layers.values())
    whole = sum(layers.values())
    return Translation(shape, _ROLES[shape], rank, threads, whole, seconds, peak, idle, allowed, FOLD_TARGETS[shape])
