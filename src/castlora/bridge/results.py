"""What a fit leaves behind: the maps of each site, and the folder that holds them with what describes them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

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
from castlora.errors import UserError
from castlora.execution.run_directory import RunDirectory, hold_to_inputs, open_run
from castlora.maps.fitting import InputSite
from castlora.maps.shared_maps import solve_maps
from castlora.maps.statistics import Moments
from castlora.models.pairing import ModulePair

logger = logging.getLogger("castlora")

SiteStatistics = tuple[dict[str, Moments], dict[str, Moments]]
"""Moments of the text to solve the maps of a site from, and of held-out text, by the names of the maps."""


def solve_and_write(path: Path, fitted: Mapping[str, Moments], held_out: Mapping[str, Moments], ridge: float) -> None:
    """Solves the maps of a site from its statistics, and writes its file."""
    write_maps(path, *solve_maps(fitted, held_out, ridge))


def write_bridge(
    out: str,
    request: dict[str, Any],
    plan: BridgePlan,
    description: dict[str, Any],
    inputs: Mapping[str, str],
    statistics: Callable[[InputSite, Sequence[ModulePair]], SiteStatistics],
) -> Path:
    """Solves the maps of all sites and writes the bridge; no model is run.

    Called again after an interruption, it solves those that are not there.

    Args:
        out: folder of the bridge
        request: settings by which an interrupted run is known
        plan: what the maps are between
        description: what was done
        inputs: digests of what is read, by the option that names it
        statistics: site and the modules that read there → what its maps are solved from

    Raises:
        UserError: the folder cannot be used, or `statistics` raises it; no bridge has been written then.
    """
    with open_run(out, request, plan.maps_bytes) as run:
        hold_to_inputs(run.state, inputs)
        run.parts.mkdir(exist_ok=True)
        try:
            for site, pairs in tqdm(plan.sites.items(), desc="maps", unit="site"):
                path = run.parts / site_file(site)
                if not path.exists():
                    solve_and_write(path, *statistics(site, pairs), description["ridge"])
        except UserError:
            run.discard()
            raise
        publish_sites(run, plan, description)
    logger.info("Wrote %s", out)
    return Path(out)


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
