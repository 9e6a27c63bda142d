"""What a method of the benchmark starts from: the recipe of its cell, the models and the text."""

from dataclasses import dataclass, replace

from castlora.alignment.positions import AlignedPassage
from castlora.bench.grid import Cell, Settings, taught_passages
from castlora.config import Recipe, RecipeName, Start, Tuning, resolve_recipe
from castlora.maps.copied_start import start_with_prompts
from castlora.model_pair import Models, align_text, load_models
from castlora.plan import Plan
from castlora.stages import write_rehearsed


@dataclass(frozen=True)
class Reading:
    """What a cell trains with."""

    plan: Plan
    models: Models
    training: list[AlignedPassage]
    held_out: list[AlignedPassage]
    rehearsed: list[list[int]]
    """Text that the bare target wrote, as token ids; the last passages are for measuring alone."""


def cell_recipe(settings: Settings, cell: Cell, name: RecipeName, start: Start | None, tuning: Tuning) -> Recipe:
    """A recipe for as many steps and as much text as the benchmark gives every method."""
    passages = settings.passages
    tuning = replace(tuning, passages=passages, filled_passages=passages, max_length=settings.max_length)
    recipe = resolve_recipe(name, start, settings.steps, settings.batch_size, tuning)
    if start is None and cell.regime == "prompts":
        recipe = start_with_prompts(recipe, cell.plan(settings.spec))
    return replace(recipe, max_length=settings.running_length) if _reads_running_text(cell, recipe) else recipe


def read_text(settings: Settings, cell: Cell, recipe: Recipe) -> Reading:
    """The cell's models, and its training and held-out passages."""
    # Only the length of running text depends on the target; prompts serve all targets of a source.
    read_for = cell if _reads_running_text(cell, recipe) else replace(cell, pair=f"{cell.source}:{cell.source}")
    any_training = replace(recipe, start="fresh", trained="maps", rehearsal_weight=0.0, steps=1, batch_size=1)
    passages = taught_passages(settings.spec, read_for, any_training)
    plan = cell.plan(settings.spec)
    models = load_models(plan)
    return Reading(plan, models, *align_text(models, passages, recipe), write_rehearsed(models, recipe, cell.seed))


def _reads_running_text(cell: Cell, recipe: Recipe) -> bool:
    return cell.regime == "general" and not recipe.write_answers
