"""The adapter as it is, for a target of the source's shapes.

Where the target was trained on from the source, its activations still mean much of what they did, and the unchanged
adapter does much of its work there. Maps that are solved for do less of it: what they cannot predict they leave out.
Such a start has little to learn, and general text, which does not ask for all of it, would make it forget the rest.
Prompts of the task ask for all of it, and bring the maps as far and further.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from castlora.adapters.factors import LowRank
from castlora.adapters.live import start_from_factors, student_factors
from castlora.alignment.positions import AlignedPassage
from castlora.config import Recipe
from castlora.distillation.distill import HeldOut, Student
from castlora.maps.cast_layer import balance, merge_branches
from castlora.models.modules import row_numbers
from castlora.models.pairing import Pairing
from castlora.plan import Plan

logger = logging.getLogger("castlora")

STEPS_OF_PLAIN_START = 400
_SHARE_LEFT = 0.5
"""Of the bare target's loss: an adapter that leaves more of it is no start to be gentle with."""
_SHARE_OF_RATE = 0.1


@dataclass(frozen=True)
class StartChoice:
    """Which of two starts was kept, and by what."""

    is_copied: bool
    loss_of_bare: float
    """Objective on held-out text of the bare target."""
    loss_of_maps: float
    """The same from the start that was solved for."""
    loss_of_copy: float
    """The same with the adapter as it is."""


def copied_start(plan: Plan, recipe: Recipe, rank: int, training: Sequence[AlignedPassage]) -> dict[str, LowRank]:
    """The adapter as it is, where the recipe's start is solved for and may be the worse one; else nothing.

    Args:
        plan: of the transfer
        recipe: its numbers
        rank: of the student's LoRA, to which the adapter is cut
        training: the text
    """
    is_solved = recipe.start in ("ridge", "readout") and recipe.trained == "factors"
    teaches_all = recipe.steps > 0 and not any(passage.is_general for passage in training)
    if not is_solved or teaches_all or not plan.adapter.is_plain:
        return {}
    copied = copied_factors(plan.pairing, plan.factors)
    return {name: LowRank(lora.a[:rank], lora.b[:, :rank]) for name, lora in copied.items()}


def start_with_prompts(recipe: Recipe, plan: Plan) -> Recipe:
    """The default recipe where the task's prompts are read: with steps enough, its start is a plain LoRA.

    Trained that long on such text, it ends where one from maps does, or ahead of it. Not so where the target may have
    been trained on from the source: there the maps are ahead. docs/results.md and results-successor.md have both.

    Args:
        recipe: the default, with a start that nobody has asked for
        plan: of the transfer
    """
    is_long = recipe.start == "ridge" and recipe.trained == "factors" and recipe.steps >= STEPS_OF_PLAIN_START
    may_be_related = has_shapes_of_source(plan.pairing, plan.factors)
    return replace(recipe, start="fresh") if is_long and not may_be_related else recipe


def has_shapes_of_source(pairing: Pairing, factors: Mapping[str, LowRank]) -> bool:
    """Whether the update of every mapped target module would fit it unchanged."""
    return all(
        factors[branch.source_module].a.shape[1] == pair.target.d_in
        and len(row_numbers(branch.source_rows)) == len(row_numbers(branch.target_rows))
        for pair, _, branch in pairing.branches()
    )


def copied_factors(pairing: Pairing, factors: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The unchanged update of every mapped target module, balanced; nothing where one has another shape.

    Args:
        pairing: which modules belong together
        factors: the source adapter, by module: A (r, d_in), B (d_out, r)
    """
    if not has_shapes_of_source(pairing, factors):
        return {}
    copied = {}
    for pair in pairing.mapped:
        adapters = [(factors[branch.source_module], branch.source_rows) for branch in pair.branches]
        parts = [LowRank(lora.a, lora.b[rows]) for lora, rows in adapters]
        target_rows = [branch.target_rows for branch in pair.branches]
        copied[pair.target.name] = balance(merge_branches(parts, target_rows, pair.target.d_out))
    return copied


def keep_better_start(
    student: Student, copied: Mapping[str, LowRank], measure: Callable[[Student], HeldOut]
) -> StartChoice | None:
    """Starts the student from the adapter as it is, if that does most of what it did and more than the maps do.

    Args:
        student: as its start was solved, changed in place
        copied: as `copied_start` gives it
        measure: compares the student as it stands with its teacher on held-out text

    Returns:
        the choice; None where there was none
    """
    if not copied:
        return None
    with student.model.disable_adapter():
        of_bare = measure(student).loss
    of_maps = measure(student).loss
    solved = student_factors(student.model, copied)
    start_from_factors(student.model, copied)
    of_copy = measure(student).loss
    is_copied = of_copy < min(of_maps, _SHARE_LEFT * of_bare)
    if not is_copied:
        start_from_factors(student.model, solved)
    logger.info(
        "Source and target have the same shapes. Held-out objective: %.4f bare, %.4f from the maps, %.4f from the "
        "adapter as it is; the start is %s.", of_bare, of_maps, of_copy, "the adapter" if is_copied else "the maps",
    )  # fmt: skip
    return StartChoice(is_copied, of_bare, of_maps, of_copy)


def gentle_recipe(recipe: Recipe, choice: StartChoice | None) -> Recipe:
    """The recipe, with a tenth of its learning rate where the student starts from the adapter as it is."""
    if choice is None or not choice.is_copied:
        return recipe
    return replace(recipe, learning_rate_scale=_SHARE_OF_RATE * recipe.learning_rate_scale)
