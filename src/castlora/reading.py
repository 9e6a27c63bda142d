"""What a run reads: found once, kept for when it goes on, and aligned."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from castlora.adapters.files import AdapterFiles
from castlora.alignment.positions import AlignedPassage
from castlora.config import Recipe
from castlora.errors import ResumableError, UserError
from castlora.evaluation.scored_task import ScoredTask
from castlora.execution.parts import Parts
from castlora.execution.run_directory import RunDirectory, hold_to_inputs, is_sealed, seal, write_whole
from castlora.model_pair import Models, align_text
from castlora.report import Score
from castlora.stages import check_memory_for_record, write_rehearsed
from castlora.teaching.curriculum import TextSource, prompt_formats, teach_text
from castlora.text.passages import Passage

logger = logging.getLogger("castlora")

PASSAGES_FILE = "passages.json"


@dataclass(frozen=True)
class Reading:
    """What a run reads, and what models that are not trained yet make of its task."""

    formats: Sequence[str]
    """What general text was put into."""
    passages: list[Passage]
    rehearsed: list[list[int]]
    """Text that the bare target wrote, as token ids."""
    scores: Mapping[str, Score] = field(default_factory=dict)
    """Of the bare target and of source + LoRA, where the run has a task."""

    def to_json(self) -> str:
        """The text of `PASSAGES_FILE`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Reading":
        """Reads what `to_json` wrote."""
        record = json.loads(text)
        scores = {
            model: Score(score["value"], tuple(score["interval"]), score["nll"])
            for model, score in record["scores"].items()
        }
        passages = [Passage(**passage) for passage in record["passages"]]
        return cls(record["formats"], passages, record["rehearsed"], scores)


def read_aligned(
    run: RunDirectory,
    models: Models,
    adapter: AdapterFiles,
    text: TextSource,
    task: ScoredTask | None,
    recipe: Recipe,
    seed: int,
) -> tuple[Reading, list[AlignedPassage], list[AlignedPassage]]:
    """What is read, and its passages for training and held out; where it comes to nothing, the run leaves nothing.

    Raises:
        UserError: the text or the task cannot be used.
    """
    try:
        of_task = {"--task": task.sha256} if task else {}
        hold_to_inputs(run.state, {"--adapter": adapter.fingerprint(), **text.fingerprints(), **of_task})
        reading = _read(run, models, text, task, recipe, seed)
        training, held_out = align_text(models, reading.passages, recipe)
        check_memory_for_record(models, [*training, *held_out], recipe)
        return reading, training, held_out
    except ResumableError:
        raise
    except UserError:
        run.discard()
        raise


def _read(
    run: RunDirectory, models: Models, text: TextSource, task: ScoredTask | None, recipe: Recipe, seed: int
) -> Reading:
    """Passages with answers; what is found is kept, so that a resumed run does not look for it again."""
    path = run.reading / PASSAGES_FILE
    if is_sealed(run.reading):
        logger.debug("The text of the interrupted run is read again")
        return Reading.from_json(path.read_text(encoding="utf-8"))
    parts = Parts(run.parts)
    scores = task.score_untrained(models) if task else {}
    models.use("source")
    formats = prompt_formats(models, text, recipe, seed, parts)
    passages = teach_text(models, text, formats, recipe, seed, parts)
    reading = Reading(formats, passages, write_rehearsed(models, recipe, seed), scores)
    run.reading.mkdir(exist_ok=True)
    write_whole(path, reading.to_json())
    seal(run.reading)
    shutil.rmtree(run.parts, ignore_errors=True)
    return reading
