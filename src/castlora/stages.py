"""The stages of a transfer, each from plain inputs to plain results; `pipeline` strings them together."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from castlora.adapters.effective import effective_update
from castlora.adapters.factors import LowRank
from castlora.adapters.live import adapted_modules, attach_lora, start_from_factors
from castlora.alignment.positions import AlignedPassage
from castlora.config import Recipe
from castlora.distillation.distill import HeldOut, Student
from castlora.distillation.rehearsal import PASSAGES_PER_REHEARSED, BareTarget, Rehearsal, rehearsed, write_passages
from castlora.distillation.teacher import LiveTeacher, RecordedTeacher, Teacher, record_bytes, record_limit
from castlora.distillation.training import reading_order
from castlora.errors import UserError
from castlora.execution.processes import share_of_batch
from castlora.execution.recomputation import recompute_activations
from castlora.maps.cast_layer import cut_to_rank
from castlora.maps.fitting import STATISTICS_BATCH, SiteMoments, ridge_factors, ridge_maps, solve_in_parts
from castlora.maps.last_layer import LastLayer, Solution, find_last_layer, solve_last_layer
from castlora.maps.starts import Maps, fold_maps, paper_maps, parametrize_by_maps
from castlora.model_pair import Models
from castlora.models.loading import best_device
from castlora.models.modules import layer_path, number_of_layers
from castlora.plan import Plan

logger = logging.getLogger("castlora")

HELD_OUT_REHEARSED = 64
STATISTICS_PASSAGES = 1024


@dataclass(frozen=True)
class StartLoss:
    """What a start leaves out, as shares of a norm (Frobenius, all modules)."""

    low_rank: float = 0.0
    """Of the source's update, where the adapter is no plain LoRA and is cut to low rank."""
    cut: float = 0.0
    """Of the start itself, where it has more ranks than the student."""


def last_layer_to_solve(models: Models, plan: Plan, recipe: Recipe) -> LastLayer | None:
    """Where the recipe's start has the target's last layer solved; None where it has not, or the target cannot be.

    Raises:
        UserError: the target cannot be solved for, and nothing would be trained either.
    """
    if recipe.start != "readout":
        return None
    models.use("target")
    site = find_last_layer(models.target, plan.target_slots)
    if site is None:
        reason = f"The last layer of {plan.target!r} cannot be solved for: it adds or reads it in a way of its own"
        if recipe.steps == 0:
            raise UserError(f"{reason}. Leave out --steps 0, so that the target is trained.")
        logger.warning("%s; the start is that of the maps.", reason)
    return site


def text_of_start(training: Sequence[AlignedPassage]) -> list[AlignedPassage]:
    """The part of the training text that a start is solved for, passages of like length together."""
    read = training[:STATISTICS_PASSAGES]
    return reading_order(read, len(read), STATISTICS_BATCH, seed=0)


def start_student(
    models: Models,
    plan: Plan,
    recipe: Recipe,
    training: Sequence[AlignedPassage],
    rank: int,
    seed: int,
    last_layer: LastLayer | None = None,
) -> tuple[Student, StartLoss]:
    """The target with the LoRA that training starts from, and what this start leaves out.

    The paired modules are adapted, by maps around the frozen source factors or by factors of their own. So is the
    module of a last layer that is to be solved for, even where it is paired with nothing.
    """
    torch.manual_seed(seed)
    models.use("source")
    low_rank_loss = cut_loss = 0.0
    if recipe.start != "fresh" and not plan.adapter.is_plain:
        update = effective_update(models.teacher, plan.source_slots, plan.factors)
        low_rank_loss = update.lost
        logger.info(
            "The maps start from the %s adapter cut to low rank: %.1f %% of its norm is lost.",
            plan.adapter.kind,
            100 * update.lost,
        )
        plan = replace(plan, factors=update.factors)
    folded, maps = _solved_start(models, plan, recipe, text_of_start(training), seed)
    models.use("target")
    solved = {last_layer.module} if last_layer else set()
    peft_model = attach_lora(models.target, {*plan.target_modules, *solved}, rank)
    if folded:
        factors, cut_loss = cut_to_rank(folded, rank)
        start_from_factors(peft_model, factors)
    elif maps:
        parametrize_by_maps(peft_model, plan.pairing, plan.factors, maps)
    if models.recomputes:
        layers = range(number_of_layers(plan.target_slots))
        recompute_activations(models.target, [layer_path(plan.target_slots, layer) for layer in layers])
    with_head = recipe.mse_weight > 0
    logger.debug("Start %s: %d modules of the target learn", recipe.start, len(adapted_modules(peft_model)))
    widths = models.target.config.get_text_config().hidden_size, models.source.config.get_text_config().hidden_size
    student = Student(peft_model, *widths, with_head=with_head).to(best_device())
    return student, StartLoss(low_rank_loss, cut_loss)


def _solved_start(
    models: Models, plan: Plan, recipe: Recipe, passages: Sequence[AlignedPassage], seed: int
) -> tuple[dict[str, LowRank], Maps]:
    """What the recipe starts from: factors or maps, whichever it trains; for a fresh LoRA neither."""
    trains_factors = recipe.trained == "factors"
    if recipe.start == "paper":
        maps = paper_maps(plan.pairing, plan.factors, seed)
        return (fold_maps(plan.pairing, plan.factors, maps), {}) if trains_factors else ({}, maps)
    if recipe.start == "fresh":
        return {}, {}

    def factors(moments: SiteMoments) -> dict[str, LowRank]:
        return ridge_factors(moments, plan.pairing, plan.factors, recipe.ridge)

    def maps_of(moments: SiteMoments) -> Maps:
        return ridge_maps(moments, plan.pairing, recipe.ridge)

    read = models.source, models.target, plan.pairing, plan.factors, passages
    use = models.use if models.takes_turns else None
    with models.teacher.disable_adapter():
        if trains_factors:
            return solve_in_parts(*read, factors, use=use), {}
        return {}, solve_in_parts(*read, maps_of, use=use)


def start_last_layer(
    student: Student,
    last_layer: LastLayer | None,
    models: Models,
    teacher: Teacher,
    training: Sequence[AlignedPassage],
    measure: Callable[[Student], HeldOut],
    rehearsal: Rehearsal,
    recipe: Recipe,
) -> Solution | None:
    """Solves the target's last layer, if there is one to solve; tells how it did.

    Args:
        student: as `start_student` gives it for that layer, changed in place
        last_layer: as `last_layer_to_solve` gives it
        models: both
        teacher: source + LoRA, as `hold_teacher` gives it
        training: the text
        measure: compares the student as it stands with its teacher on held-out text
        rehearsal: as `hold_bare_target` gives it
        recipe: says how much that weighs
    """
    if last_layer is None:
        return None
    read = teacher, text_of_start(training), models.shared
    return solve_last_layer(student, last_layer, *read, measure, rehearsal, recipe.rehearsal_weight)


def check_memory_for_record(models: Models, passages: Sequence[AlignedPassage], recipe: Recipe) -> None:
    """Looks whether what source + LoRA predicts can be kept, where it cannot run beside the target.

    Raises:
        UserError: it would take too much memory.
    """
    needed = record_bytes(models.source, passages, recipe.mse_weight > 0)
    limit = record_limit(models.source)
    if models.takes_turns and needed > limit:
        raise UserError(
            f"With --low-memory, what source + LoRA predicts is kept in memory, and that would be "
            f"{needed / 2**30:.1f} GiB, more than {limit / 2**30:.1f}; give --prompts, or lower "
            f"--tuning.passages {recipe.passages} or --tuning.max-length {recipe.max_length}."
        )


def hold_teacher(
    models: Models, training: Sequence[AlignedPassage], held_out: Sequence[AlignedPassage], recipe: Recipe
) -> tuple[Teacher, Teacher]:
    """The teacher of a run: its predictions are kept where a process reads passages again and memory allows.

    Where models take turns they are always kept, and the target is the one that can run afterwards.

    Returns:
        the teacher of the training text, and that of held-out text, which is always read again
    """
    passages = [*training, *held_out]
    with_hidden = recipe.mse_weight > 0
    is_read_again = recipe.steps * share_of_batch(recipe.batch_size) > len(training)
    needed = record_bytes(models.source, passages, with_hidden)
    if models.takes_turns or (is_read_again and needed <= record_limit(models.source)):
        logger.debug("What source + LoRA predicts is kept in memory: %d MiB at most", needed >> 20)
        models.use("source")
        recorded = RecordedTeacher(models.teacher, passages, with_hidden)
        models.use("target")
        return recorded, recorded
    logger.debug("source + LoRA reads each passage when it is trained on")
    live = LiveTeacher(models.teacher, with_hidden)
    if record_bytes(models.source, held_out, with_hidden) <= record_limit(models.source):
        return live, RecordedTeacher(models.teacher, held_out, with_hidden)
    return live, live


def passages_to_rehearse(recipe: Recipe) -> int:
    """Passages that the bare target writes, no more than are read."""
    if recipe.rehearsal_weight == 0:
        return 0
    in_steps = recipe.steps * recipe.batch_size
    in_start = STATISTICS_PASSAGES if recipe.start == "readout" else 0
    return min(recipe.rehearsal_passages, math.ceil(max(in_steps, in_start) / PASSAGES_PER_REHEARSED))


def write_rehearsed(models: Models, recipe: Recipe, seed: int) -> list[list[int]]:
    """Text of the bare target as token ids, as much as the recipe rehearses; the last passages are for measuring."""
    count = passages_to_rehearse(recipe) + HELD_OUT_REHEARSED
    models.use("target")
    return write_passages(models.target, models.target_tokenizer, count, recipe.rehearsal_tokens, seed)


def hold_bare_target(
    student: PeftModel, target: PreTrainedModel, written: Sequence[Sequence[int]], recipe: Recipe
) -> Rehearsal:
    """The bare target as the teacher of what it wrote itself; its predictions are kept as `hold_teacher` keeps them.

    Args:
        student: the PEFT model around the target
        target: the target, for its sizes
        written: as `write_rehearsed` gives it
        recipe: says how much is read again
    """
    passages = list(map(rehearsed, written))
    training, held_out = passages[:-HELD_OUT_REHEARSED], passages[-HELD_OUT_REHEARSED:]
    reads = recipe.steps * share_of_batch(recipe.batch_size) // PASSAGES_PER_REHEARSED
    limit = record_limit(target)
    with student.disable_adapter():
        if reads > len(training) and record_bytes(target, passages, with_hidden=False) <= limit:
            recorded = RecordedTeacher(student, passages, with_hidden=False)
            return Rehearsal(recorded, training, recorded, held_out)
        live = BareTarget(student)
        if record_bytes(target, held_out, with_hidden=False) <= limit:
            return Rehearsal(live, training, RecordedTeacher(student, held_out, with_hidden=False), held_out)
    return Rehearsal(live, training, live, held_out)
