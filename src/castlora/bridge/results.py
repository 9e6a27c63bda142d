"""What a fit leaves behind: the maps of each site, and the folder that holds them with what describes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from castlora.bridge.card import write_bridge_card
from castlora.bridge.files import (
    BRIDGE_FILE,
    STATISTICS_FILE,
    BridgePlan,
    read_all_fits,
    site_file,
    write_description,
)
from castlora.bridge.maps_file import write_maps
from castlora.execution.run_directory import RunDirectory
from castlora.maps.shared_maps import solve_maps
from castlora.maps.statistics import Moments


def solve_and_write(path: Path, fitted: Mapping[str, Moments], held_out: Mapping[str, Moments], ridge: float) -> None:
    """Solves the maps of a site from its statistics, and writes its file."""
    write_maps(path, *solve_maps(fitted, held_out, ridge))


def publish_sites(run: RunDirectory, plan: BridgePlan, description: dict[str, Any]) -> None:
    """Puts all sites' files, what describes them and, for a bridge, the card into the folder of a run.

    Args:
        run: which holds the files among its parts
        plan: what they are between
        description: what was done; with a `shard` the files are statistics, otherwise maps
    """
    run.finished.mkdir()
    for site in plan.sites:
        (run.parts / site_file(site)).replace(run.finished / site_file(site))
    is_bridge = description["shard"] is None
    write_description(run.finished, BRIDGE_FILE if is_bridge else STATISTICS_FILE, plan, description)
    if is_bridge:
        write_bridge_card(run.finished, description, read_all_fits(run.finished, plan))
    run.publish()
