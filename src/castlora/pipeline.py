"""The transfer, from an adapter for one base model to an adapter for another."""

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from castlora import __version__
from castlora.adapters.factors import LowRank, write_portable
from castlora.adapters.live import adapted_modules, student_factors
from castlora.alignment.positions import AlignedPassage, collate
from castlora.config import Bits, Recipe, RecipeName, Start, Tracker, Tuning, check_seed, resolve_recipe
from castlora.distillation.distill import HeldOut, Student, check_objective, measure_held_out, shared_mass
from castlora.distillation.rehearsal import measure_drift
from castlora.distillation.tracking import check_tracker, tracking
from castlora.distillation.training import check_batch, train_student
from castlora.evaluation.changes import measure_changes
from castlora.evaluation.imitation import compare_answers
from castlora.evaluation.scored_task import ScoredTask
from castlora.evaluation.similarity import measure_similarity
from castlora.evaluation.verification import check_written, live_logits, rounding_difference
from castlora.execution.launcher import process_count
from castlora.execution.processes import from_main, this_process
from castlora.execution.run_directory import RunDirectory, check_output, open_run, write_whole
from castlora.maps.copied_start import StartChoice, copied_start, gentle_recipe, keep_better_start, start_with_prompts
from castlora.maps.last_layer import LastLayer, Solution
from castlora.maps.scaling import SOLVED_SCALES, TRAINED_SCALES, ScaleChoice, keep_best_scale
from castlora.model_pair import Loading, Models, load_models
from castlora.models.pairing import Pairing, describe
from castlora.plan import Plan, describe_beyond, plan_transfer
from castlora.publishing.licences import read_licences
from castlora.publishing.manifest import (
    command_line,
    describe_imitation,
    describe_inputs,
    describe_pairing,
    describe_recipe,
    peak_accelerator_bytes,
    peak_memory_bytes,
    text_sha256,
    versions,
)
from castlora.publishing.record import write_record
from castlora.publishing.runs import TASKS
from castlora.reading import Reading, read_aligned
from castlora.stages import hold_bare_target, hold_teacher, last_layer_to_solve, start_last_layer, start_student
from castlora.teaching.curriculum import TextSource
from castlora.teaching.taught import check_teacher, holds_messages
from castlora.text.chat import TEMPLATE_FILE, target_template

logger = logging.getLogger("castlora")

_CHECKED_PASSAGES = 4
_SHOWN_PASSAGES = 4


@dataclass(frozen=True)
class TransferResult:
    """What a transfer left behind."""

    folder: Path
    manifest: dict[str, Any]
    log: list[dict[str, float]]
    pairing: Pairing


def transfer(
    adapter: str,
    target: str,
    out: str,
    source: str | None = None,
    text: str | None = None,
    prompt_format: str | None = None,
    prompts: str | None = None,
    chat: bool = False,
    taught: str | None = None,
    recipe: RecipeName = "default",
    start: Start | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    rank: int | None = None,
    tuning: Tuning | None = None,
    task: str | None = None,
    report_to: Tracker | None = None,
    low_memory: bool = False,
    source_bits: Bits | None = None,
    target_bits: Bits | None = None,
    sharded: bool = False,
) -> TransferResult:
    """Moves an adapter to another base model and writes a standard PEFT LoRA.

    By CAST (arXiv 2510.17902, eq. 1-3): an update B·A of the source becomes map_from_source·B·A·map_to_source, trained
    until target + CAST predicts what source + LoRA predicts, and folded.

    Called again with the same arguments after an interruption, it continues where it was. Where a launcher such as
    torchrun has started several processes, each calls it with the same arguments, and they share the work.

    Args:
        adapter: folder or hub id of a PEFT LoRA
        target: folder or hub id of the new base model
        out: folder to write; it must not hold anything else
        source: base model of the adapter, if not the one that its configuration names
        text: general text, a .txt or .jsonl file (may be gzipped) or a hub data set; by default allenai/c4
        prompt_format: the adapter's prompt format with a `{text}` slot, filled from the general text
        prompts: file of unlabelled prompts of the task, instead of general text
        chat: whether prompts are messages of a user, which each model reads in its own chat template; a target without
            one reads them in the source's, which is then written beside the adapter
        taught: file of `castlora.teach`, instead of all other text: prompts with answers, in which source + LoRA has
            no more to write
        recipe: `default`, or `paper`, the paper as far as it is stated
        start: `paper`, `ridge`, `readout` or `fresh`, instead of the recipe's: by default `fresh` with prompts and 400
            steps or more, unless the target has the source's shapes; else `ridge`, and without a step `readout`
        steps: optimizer steps, instead of the recipe's; 0 writes the start as it is solved, by default `readout`
        batch_size: passages per step, instead of the recipe's
        seed: of everything random; the same seed gives the same bytes on the same machine
        rank: rank of the adapter to write; by default the smallest that holds the update
        tuning: departures from the recipe's other numbers
        task: task file that both models are scored on before the training, and the target up to ten times along it; it
            takes time and does not change the result
        report_to: tracker that shows the losses while the training runs; it does not change the result
        low_memory: whether an accelerator holds one of the two models at a time, while the other waits in the
            machine's memory, and activations are computed again instead of kept; takes longer. Of sharded models it
            holds parts of both
        source_bits: 4 (NF4) or 8, for a source whose layers are quantized by bitsandbytes, as one that QLoRA trained on
        target_bits: the same for the target; the adapter then belongs to a target that is quantized alike
        sharded: whether each of several processes keeps only its part of both models' layers (FSDP2), for models that
            no accelerator holds

    Returns:
        the folder, the manifest and the training log

    Raises:
        UserError: bad input; nothing has been written.
        RuntimeError: the written adapter does not compute what was trained.
    """
    tuning = tuning or Tuning()
    request = {
        "adapter": adapter, "target": target, "source": source, "text": text, "prompt_format": prompt_format,
        "prompts": prompts, "chat": chat, "taught": taught, "recipe": recipe, "start": start, "steps": steps,
        "batch_size": batch_size, "seed": seed, "rank": rank, "tuning": asdict(tuning), "task": task,
        "low_memory": low_memory, "source_bits": source_bits, "target_bits": target_bits, "sharded": sharded,
    }  # fmt: skip
    text_source = TextSource(text, prompt_format, prompts, chat, taught)
    resolved = resolve_recipe(recipe, start, steps, batch_size, tuning)
    check_seed(seed)
    check_tracker(report_to)
    check_batch(resolved, sharded)
    settings = {**request, "resolved_recipe": asdict(resolved), "castlora_version": __version__}
    resumed = check_output(out, settings)
    started = time.monotonic()
    set_seed(seed)
    plan = plan_transfer(adapter, target, source)
    if start is None and recipe == "default" and (prompts or (taught and from_main(text_source.has_prompts))):
        resolved = start_with_prompts(resolved, plan)
    output_rank = plan.rank(resolved, rank)
    plan.check_length(resolved)
    loading = Loading(low_memory, source_bits, target_bits, sharded)
    loading.check(plan.adapter.is_plain, process_count())
    logger.info(describe(plan.pairing))
    if plan.beyond:
        logger.info(describe_beyond(plan.beyond))
    from_main(text_source.check)
    if taught is not None:
        from_main(partial(check_teacher, taught, plan.adapter.weights_sha256))
    in_template = chat or (taught is not None and from_main(partial(holds_messages, taught)))
    scored = from_main(partial(ScoredTask.read, task, in_template)) if task else None
    licences = from_main(partial(read_licences, plan, text_source.general))
    models = load_models(plan, loading)
    check_objective(models.shared, resolved)
    last_layer = last_layer_to_solve(models, plan, resolved)

    with ExitStack() as held:
        # The main process holds the folder, until all are done.
        run = from_main(lambda: held.enter_context(open_run(out, settings, plan.state_bytes(resolved))))
        read = partial(read_aligned, run, models, plan.adapter, text_source, scored, resolved, seed)
        reading, training, held_out = from_main(read)
        vocabulary = from_main(partial(_describe_vocabulary, models, held_out))
        student, start_loss = start_student(models, plan, resolved, training, output_rank, seed, last_layer)
        passages = training, held_out, reading.rehearsed
        copied = copied_start(plan, resolved, output_rank, training)
        trained = _train(run, models, student, last_layer, copied, *passages, scored, resolved, seed, report_to)

        known = {
            **describe_inputs(plan, models, text_source, reading.formats),
            "licences": licences,
            "castlora_version": __version__,
            "rank": output_rank,
            "source_bits": source_bits,
            "target_bits": target_bits,
            "sharded": sharded,
            "pairing": describe_pairing(plan.pairing),
            "layer_map": list(plan.pairing.layer_map),
            "recipe": describe_recipe(resolved, recipe),
            "seed": seed,
            "versions": versions(),
            "processes": this_process().count,
            "resumed": resumed,
            "passages": {
                "training": len(training),
                "held_out": len(held_out),
                "variants": sum(passage.is_variant for passage in reading.passages),
            },
            "held_out_sha256": text_sha256(held_out),
            "shared_vocabulary": vocabulary,
            "start_loss": asdict(start_loss),
            "command": command_line({**request, "out": out}, processes=this_process().count),
        }
        manifest = from_main(
            partial(_finish, run, plan, models, student, reading, held_out, scored, resolved, trained, known, started)
        )
    logger.info("Wrote %s", out)
    if prompts is None and taught is None:
        logger.info("More of a skill arrives with --prompts, a file of the task's prompts without answers.")
    return TransferResult(Path(out), manifest, trained.log, plan.pairing)


@dataclass(frozen=True)
class _Trained:
    """How a training went."""

    losses: dict[str, float]
    scale: ScaleChoice
    log: list[dict[str, float]]
    choice: StartChoice | None
    last_layer: Solution | None


def _train(
    run: RunDirectory,
    models: Models,
    student: Student,
    last_layer: LastLayer | None,
    copied: Mapping[str, LowRank],
    training: list[AlignedPassage],
    held_out: list[AlignedPassage],
    rehearsed: list[list[int]],
    scored: ScoredTask | None,
    recipe: Recipe,
    seed: int,
    report_to: Tracker | None,
) -> _Trained:
    """Trains the student from where the run was, chooses its scale, and measures it on held-out text.

    Only the main process scales its student.
    """
    teacher, held_out_teacher = hold_teacher(models, training, held_out, recipe)
    measure = partial(measure_held_out, held_out_teacher, examples=held_out, shared=models.shared, recipe=recipe)
    rehearsal = hold_bare_target(student.model, models.target, rehearsed, recipe)
    # The other processes get what the main one starts from when the training begins.
    choice = from_main(partial(keep_better_start, student, copied, measure))
    text = teacher, training, measure, rehearsal, recipe
    solution = from_main(partial(start_last_layer, student, last_layer, models, *text))
    before = from_main(partial(measure, student))
    with student.model.disable_adapter():
        bare = from_main(partial(measure, student))
    drift = partial(measure_drift, rehearsal.held_out_bare, student.model, rehearsal.held_out)

    def describe_along(now: HeldOut) -> dict[str, float]:
        along = {"held_out_kl": now.kl, "agreement": now.agreement, "drift": drift()}
        return {**along, "task_score": scored.evaluate_target(models).score} if scored else along

    at_start = {"step": 0, **from_main(partial(describe_along, before))}
    paced = gentle_recipe(recipe, choice)
    name = run.out.resolve().name
    checkpoint = from_main(run.last_checkpoint)
    if checkpoint:
        logger.info("Training goes on from step %s", Path(checkpoint).name.removeprefix("checkpoint-"))
    log = train_student(
        teacher, student, models.shared, training, paced, seed, run.checkpoints, checkpoint,
        callbacks=tracking(report_to, name) if this_process().is_main else (), run_name=name,
        rehearsal=rehearsal, measure=lambda: describe_along(measure(student)),
    )  # fmt: skip
    scales = TRAINED_SCALES if recipe.steps > 0 else SOLVED_SCALES
    scale = from_main(partial(keep_best_scale, student, measure, scales))
    after = from_main(partial(measure, student))
    logger.info(
        "Held-out KL to source + LoRA: %.4f bare, %.4f at the start, %.4f at the end (nats per position)",
        bare.kl, before.kl, after.kl,
    )  # fmt: skip
    losses = {**_losses({"bare": bare, "before": before, "after": after}), "drift_after": from_main(drift)}
    logger.info("Drift from the bare target on its own text: %.4f nats per position", losses["drift_after"])
    return _Trained(losses, scale, [at_start, *log], choice, solution)


def _finish(
    run: RunDirectory,
    plan: Plan,
    models: Models,
    student: Student,
    reading: Reading,
    held_out: list[AlignedPassage],
    scored: ScoredTask | None,
    recipe: Recipe,
    trained: _Trained,
    known: Mapping[str, Any],
    started: float,
) -> dict[str, Any]:
    """Looks at what the models do now, and writes the adapter and the record of the run.

    Args:
        run: the folder, in which all of it appears at once
        plan: of the transfer
        models: both; the source carries the adapter
        student: the target, trained
        reading: what the run has read
        held_out: what it was not trained on
        scored: the task, if the run has one
        recipe: its numbers
        trained: how the training went
        known: what the manifest says besides
        started: when, by the monotonic clock

    Returns:
        the manifest
    """
    # Some of these may have been dropped for their length, so that they were not trained on either.
    shown = reading.passages[-len(held_out) :]
    imitation = compare_answers(models, student.model, shown, recipe.answer_tokens)
    changes = measure_changes(models, student.model, shown, recipe.max_length, _SHOWN_PASSAGES)
    similarity = measure_similarity(models, student.model, plan.pairing, shown, recipe.max_length)
    tasks = [scored.record(models, reading.scores)] if scored else []
    manifest = {
        **known,
        "losses": trained.losses,
        "scale": asdict(trained.scale),
        "start_choice": asdict(trained.choice) if trained.choice else None,
        "last_layer": asdict(trained.last_layer) if trained.last_layer else None,
        "answers": describe_imitation(imitation),
        TASKS: tasks,
        "scored_along": scored and scored.sha256,
        "logit_difference": _write_adapter(run, plan, models, student, known, held_out),
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_accelerator_bytes": peak_accelerator_bytes(),
    }
    if reading.passages[0].is_chat and models.target_tokenizer.chat_template is None:
        template = target_template(models.source_tokenizer, models.target_tokenizer)
        write_whole(run.finished / TEMPLATE_FILE, template)
    write_record(run.finished, manifest, trained.log, imitation, changes, similarity)
    run.publish()
    return manifest


def _describe_vocabulary(models: Models, held_out: list[AlignedPassage]) -> dict[str, Any]:
    """How much of both models' probability lies on tokens that both vocabularies spell alike, and what ends texts."""
    models.use("source")
    with models.teacher.disable_adapter():
        source_mass = shared_mass(models.teacher, held_out, "source", models.shared.source_ids)
    models.use("target")
    target_mass = shared_mass(models.target, held_out, "target", models.shared.target_ids)
    tokens = len(models.shared.source_ids)
    logger.info(
        "Shared vocabulary: %d of %d source and %d target tokens, carrying %.1f %% of the source's and %.1f %% of the "
        "target's probability", tokens, len(models.source_bytes.spellings), len(models.target_bytes.spellings),
        100 * source_mass, 100 * target_mass,
    )  # fmt: skip
    ends = {"source_ends": len(models.shared.source_ends), "target_ends": list(models.shared.target_ends)}
    return {"tokens": tokens, "source_mass": source_mass, "target_mass": target_mass, **ends}


def _write_adapter(
    run: RunDirectory,
    plan: Plan,
    models: Models,
    student: Student,
    known: Mapping[str, Any],
    held_out: list[AlignedPassage],
) -> float:
    factors = student_factors(student.model, adapted_modules(student.model))
    write_portable(run.finished, factors, plan.target_slots, known["rank"], plan.target, None)
    batch = collate(held_out[:_CHECKED_PASSAGES])
    ids, mask = batch["target_ids"], batch["target_mask"]
    device = next(student.model.parameters()).device
    on_device = ids.to(device), mask.to(device)
    live = live_logits(student.model, *on_device)
    roundings = rounding_difference(student.model, *on_device, live)
    # The process that loads it needs the room.
    models.put_away()
    held = known["target_bits"], known["sharded"]
    difference = check_written(run.finished, plan.target, None, ids, mask, live.cpu(), roundings, *held)
    logger.debug("Loaded again, the adapter's logits differ by %.1e of the largest", difference)
    return difference


def _losses(measured: Mapping[str, HeldOut]) -> dict[str, float]:
    return {
        f"{name}_{when}": value
        for when, held_out in measured.items()
        for name, value in (("held_out", held_out.loss), ("kl", held_out.kl), ("agreement", held_out.agreement))
    }
