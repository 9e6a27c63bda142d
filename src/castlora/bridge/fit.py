"""Fitting a bridge: both models read general text, and the maps of every site are solved from what they compute."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from castlora import __version__
from castlora.alignment.positions import AlignedPassage, share_of_passages, thinned
from castlora.bridge.files import STATISTICS_FILE, BridgePlan, plan_bridge, read_description, site_file
from castlora.bridge.results import SiteStatistics, publish_sites, solve_and_write, write_bridge
from castlora.bridge.shards import SHARDS_WANTED, Shard, added_site, check_whole, save_site
from castlora.config import Tuning, check_above_zero, check_seed, resolve_recipe
from castlora.errors import UserError
from castlora.execution.launcher import process_count
from castlora.execution.processes import from_main, this_process
from castlora.execution.run_directory import RunDirectory, check_output, fingerprint, hold_to_inputs, open_run
from castlora.maps.fitting import (
    STATISTICS_BATCH,
    InputSite,
    collect_moments,
    memory_beside,
    of_all_processes,
    parts_of,
)
from castlora.maps.shared_maps import by_site, site_shapes, site_statistics
from castlora.maps.statistics import Moments
from castlora.model_pair import BaseModels, Loading, align_text, load_base_models
from castlora.models.modules import Role
from castlora.models.pairing import ModulePair, Pairing, describe
from castlora.publishing.names import public_name
from castlora.teaching.curriculum import TextSource, draw_text
from castlora.text.passages import passages_sha256

logger = logging.getLogger("castlora")

_HELD_OUT_PLACES = 4096

Keep = Callable[[Path, dict[str, Moments], dict[str, Moments]], None]
"""Writes a site's file from the statistics of the text to solve from and of held-out text."""


def fit(
    source: str,
    target: str,
    out: str,
    text: str | None = None,
    roles: Sequence[Role] | None = None,
    passages: int = 4096,
    max_length: int | None = None,
    places: int = 100_000,
    ridge: float = 0.1,
    seed: int = 0,
    shard: str | None = None,
    low_memory: bool = False,
    sharded: bool = False,
) -> Path:
    """Fits maps between two models that carry any adapter, or sums up the statistics that they are solved from.

    The maps are those of CAST (arXiv 2510.17902) in closed form, for every site and whatever an adapter changes there.
    They serve a target that was trained on from the source, or the other way round. Between unrelated models they carry
    next to nothing, and `castlora.transfer` is what moves an adapter.

    Called again with the same arguments after an interruption, it continues where it was. Where a launcher such as
    torchrun has started several processes, each calls it with the same arguments, and they share the text.

    Args:
        source: folder or hub id of the model that adapters were trained on
        target: folder or hub id of the model that they are to serve
        out: folder to write; it must not hold anything else
        text: general text, a .txt or .jsonl file (may be gzipped) or a hub data set; by default allenai/c4
        roles: of the modules that get maps, as ("q", "v"); by default all. Maps grow with the square of the width
        passages: how much text is read
        max_length: tokens per passage; by default as many as both models read, up to 256
        places: of the text where both models end a token, how many the maps are solved from, about; several times the
            width of the widest module
        ridge: penalty of the regression relative to the mean square of the activations
        seed: of the draw of the text
        shard: "3/8" reads the third of eight shares of the text and writes its statistics for `merge_statistics`
        low_memory: whether an accelerator holds one of the models at a time
        sharded: whether each of several processes keeps only its part of both models' layers (FSDP2)

    Returns:
        the folder

    Raises:
        UserError: bad input; nothing has been written.
    """
    share = Shard.parse(shard) if shard is not None else None
    check_seed(seed)
    check_above_zero(places=places)
    if low_memory and sharded:
        raise UserError("--sharded leaves --low-memory nothing to do in a fit; leave out one of them.")
    loading = Loading(low_memory, sharded=sharded)
    loading.check(is_plain=True, processes=process_count())
    request: dict[str, Any] = {
        "source": source, "target": target, "text": text, "roles": list(roles) if roles else None,
        "passages": passages, "max_length": max_length, "places": places, "ridge": ridge, "seed": seed,
        "shard": shard, "castlora_version": __version__,
    }  # fmt: skip
    check_output(out, request)
    started = time.monotonic()
    plan = plan_bridge(source, target, roles)
    tuning = Tuning(passages=passages, max_length=plan.length(max_length), ridge=ridge)
    recipe = resolve_recipe("default", "ridge", None, None, tuning)
    logger.info(describe(plan.pairing))
    text_source = TextSource(text)
    from_main(text_source.check)
    models = load_base_models(source, target, loading)
    drawn = from_main(partial(draw_text, models, text_source, (), recipe, seed))
    training, held_out = align_text(models, drawn, recipe)
    training = thinned(training, places, seed)
    held_out = thinned(held_out, _HELD_OUT_PLACES, seed)
    if share:
        training, held_out = share.of(training), share.of(held_out)

    with ExitStack() as held:
        # The main process holds the folder, until all are done.
        needed = plan.statistics_bytes if share else plan.maps_bytes
        run = from_main(lambda: held.enter_context(open_run(out, request, needed)))
        from_main(partial(hold_to_inputs, run.state, {"--text": passages_sha256(drawn)}))
        keep = save_site if share else partial(solve_and_write, ridge=ridge)
        _read_and_keep(run, models, plan, training, held_out, keep)
        positions = sum(weight > 0 for passage in training for weight in passage.weights)
        described = {**request, "text": text and public_name(text), "positions": positions}
        from_main(partial(publish_sites, run, plan, described))
    logger.info("Wrote %s after %.0f s", out, time.monotonic() - started)
    return Path(out)


def merge_statistics(shards: Sequence[str], out: str) -> Path:
    """Adds the statistics of all shares of a text, and solves the maps from the sums; no model is loaded.

    Args:
        shards: folders that `fit` wrote with `shard`, all of them, in any order
        out: folder of the bridge to write; it must not hold anything else

    Returns:
        the folder

    Raises:
        UserError: a shard is missing, damaged, given twice or of another fit; no bridge has been written.
    """
    if not shards:
        raise UserError(f"No shard is named; {SHARDS_WANTED}.")
    read = [read_description(Path(shard), STATISTICS_FILE, SHARDS_WANTED) for shard in shards]
    check_whole(shards, [description for description, _ in read])
    by_number = dict(zip([Shard.parse(description["shard"]).number for description, _ in read], shards, strict=True))
    folders = [Path(by_number[number]) for number in sorted(by_number)]
    description, plan = read[0]
    description = {**description, "shard": None, "positions": sum(one["positions"] for one, _ in read)}

    def added(site: InputSite, pairs: Sequence[ModulePair]) -> SiteStatistics:
        shapes = site_shapes(pairs, plan.source_widths)
        return added_site([folder / site_file(site) for folder in folders], shapes)

    of_first = site_file(next(iter(plan.sites)))
    inputs = {
        f"shard {number}": fingerprint(folder / STATISTICS_FILE, folder / of_first)
        for number, folder in enumerate(folders, 1)
    }
    return write_bridge(out, description, plan, description, inputs, added)


def _read_and_keep(
    run: RunDirectory,
    models: BaseModels,
    plan: BridgePlan,
    training: Sequence[AlignedPassage],
    held_out: Sequence[AlignedPassage],
    keep: Keep,
) -> None:
    """Collects statistics of as many sites at a time as memory holds, and keeps what comes of each.

    An interrupted run has kept some; only the others' are collected.
    """
    pairing = from_main(partial(_unfinished, run, plan))
    use = models.use if models.takes_turns else None
    shares = [share_of_passages(passages, STATISTICS_BATCH) for passages in (training, held_out)]
    # Statistics of text to solve from and of held-out text are there together.
    memory = memory_beside(models.source, models.target, use) // 2
    sites = len(list(by_site(pairing)))

    def keep_part(part: Pairing) -> None:
        fitted, held = (
            of_all_processes(collect_moments(models.source, models.target, part, share, use=use)) for share in shares
        )
        for site, pairs in by_site(part):
            if this_process().is_main:
                statistics = (site_statistics(moments, site, pairs) for moments in (fitted, held))
                keep(run.parts / site_file(site), *statistics)
            progress.update()

    with tqdm(total=sites, desc="sites", unit="site") as progress:
        for part in parts_of(pairing, plan.source_widths, memory) if sites else ():
            keep_part(part)


def _unfinished(run: RunDirectory, plan: BridgePlan) -> Pairing:
    """The pairing without the sites that an interrupted run has kept."""
    run.parts.mkdir(exist_ok=True)
    left = {
        pair.target.name
        for site, pairs in plan.sites.items()
        for pair in pairs
        if not (run.parts / site_file(site)).exists()
    }
    return plan.pairing.only(left)
