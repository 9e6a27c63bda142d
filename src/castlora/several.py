"""One adapter onto several targets: source + LoRA is asked once, and each target learns from what it said."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from castlora import __version__
from castlora.config import Recipe, TextTuning, Tuning, resolve_recipe
from castlora.distillation.tracking import check_tracker
from castlora.distillation.training import check_batch
from castlora.errors import UserError
from castlora.evaluation.scored_task import ScoredTask
from castlora.execution.launcher import process_count
from castlora.execution.processes import from_main
from castlora.execution.run_directory import RunDirectory, file_state, folder_names, is_finished, open_run, write_whole
from castlora.maps.copied_start import start_with_prompts
from castlora.model_pair import Loading
from castlora.pipeline import transfer
from castlora.plan import plan_transfer
from castlora.publishing.runs import MANIFEST_FILE, runs_page
from castlora.teaching.curriculum import TextSource
from castlora.teaching.teach import teach

logger = logging.getLogger("castlora")

TAUGHT_FILE = "taught.jsonl"
COMPARISON_FILE = "comparison.html"
_TEACHING = ("text", "prompt_format", "prompts", "chat", "source", "seed", "source_bits", "sharded")


def transfer_to_each(adapter: str, targets: Sequence[str], out: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """Moves an adapter to several base models; source + LoRA answers the prompts once, for all of them.

    Each adapter is, byte for byte, the one that `castlora.transfer` with the same settings writes for its target alone.
    Called again with the same arguments after an interruption, it continues where it was.

    Args:
        adapter: folder or hub id of a PEFT LoRA
        targets: folders or hub ids of the new base models; their last components name the folders inside `out`
        out: folder to write; it must not hold anything else. Beside the adapters it gets the prompts with the answers
            of source + LoRA, where the recipe has them written, and a page that compares the transfers
        settings: of every transfer, as `castlora.transfer` takes them

    Returns:
        target → manifest of its adapter

    Raises:
        UserError: bad input. What would end one of the transfers before its work begins is found before anything is
            written; what ends one later leaves the finished ones as they are.
        RuntimeError: a written adapter does not compute what was trained.
    """
    names = folder_names("--target", targets)
    given = signature(transfer).bind(adapter, targets[0], out, **settings)
    given.apply_defaults()
    chosen = {name: value for name, value in given.arguments.items() if name not in ("adapter", "target", "out")}
    tuning = chosen["tuning"] or Tuning()
    recipe = resolve_recipe(chosen["recipe"], chosen["start"], chosen["steps"], chosen["batch_size"], tuning)
    check_batch(recipe, chosen["sharded"])
    from_main(partial(_check, adapter, targets, recipe, chosen))
    request = {"adapter": adapter, "targets": list(targets), **chosen, "tuning": asdict(tuning)}
    with ExitStack() as held:
        # The main process holds the folder, until all are done.
        run = from_main(lambda: held.enter_context(open_run(out, {**request, "castlora_version": __version__}, 0)))
        try:
            from_text = _teach(run, adapter, recipe, chosen)
            for number, (target, name) in enumerate(names.items(), 1):
                logger.info("Target %d of %d: %s", number, len(names), target)
                if not from_main(partial(is_finished, run.out / name)):
                    transfer(adapter, target, str(run.out / name), **{**chosen, **from_text})
        except UserError:
            from_main(partial(_take_back, run))
            raise
        from_main(partial(_finish, run, list(names.values())))
    manifests = (json.loads((Path(out) / name / MANIFEST_FILE).read_text("utf-8")) for name in names.values())
    return dict(zip(names, manifests, strict=True))


def _check(adapter: str, targets: Sequence[str], recipe: Recipe, chosen: Mapping[str, Any]) -> None:
    """Raises a UserError for what would end one of the transfers before its work begins."""
    loading = Loading(chosen["low_memory"], chosen["source_bits"], chosen["target_bits"], chosen["sharded"])
    text = TextSource(prompts=chosen["prompts"], taught=chosen["taught"])
    may_be_plain = chosen["start"] is None and chosen["recipe"] == "default" and text.has_prompts()
    for target in targets:
        plan = plan_transfer(adapter, target, chosen["source"])
        settled = start_with_prompts(recipe, plan) if may_be_plain else recipe
        plan.rank(settled, chosen["rank"])
        plan.check_length(recipe)
        loading.check(plan.adapter.is_plain, process_count())
    check_tracker(chosen["report_to"])
    if chosen["task"]:
        ScoredTask.read(chosen["task"], chosen["chat"])


def _teach(run: RunDirectory, adapter: str, recipe: Recipe, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Asks source + LoRA, unless it was; the settings with which each transfer reads its answers.

    Text that is read as it runs, or has answers already, leaves nothing to ask beforehand.
    """
    if chosen["taught"] is not None or not recipe.write_answers:
        return {}
    taught = run.out / TAUGHT_FILE
    if from_main(lambda: file_state(taught).exists() or not taught.exists()):
        of_text = TextTuning(**{field.name: getattr(recipe, field.name) for field in fields(TextTuning)})
        ask = partial(teach, adapter, str(taught), tuning=of_text, **{name: chosen[name] for name in _TEACHING})
        # A source in parts is read by all processes together.
        ask() if chosen["sharded"] else from_main(ask)
    return {"text": None, "prompt_format": None, "prompts": None, "chat": False, "taught": str(taught)}


def _take_back(run: RunDirectory) -> None:
    """Leaves no folder behind in which nothing was made."""
    if [path for path in run.out.iterdir() if path != run.state] == []:
        run.discard()


def _finish(run: RunDirectory, names: Sequence[str]) -> None:
    """Puts a page that compares the transfers beside them, and drops the state."""
    page, _ = runs_page([str(run.out / name) for name in names])
    run.finished.mkdir()
    write_whole(run.finished / COMPARISON_FILE, page)
    run.publish()
    logger.info("Wrote %s", run.out / COMPARISON_FILE)
