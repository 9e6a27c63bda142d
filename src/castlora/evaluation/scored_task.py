"""A task that a run is scored on along the way; nothing is trained on it and nothing is chosen by it."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.nn.utils import parametrize

from castlora.evaluation.accuracy import Evaluation, evaluate_model, scoring_versions
from castlora.evaluation.measured_tasks import describe_task
from castlora.evaluation.tasks import TaskItem, load_task
from castlora.model_pair import Models
from castlora.report import BARE_TARGET, SOURCE_LORA, TRANSFERRED, Score, Skill
from castlora.text.chat import chat_template, target_template

logger = logging.getLogger("castlora")


@dataclass(frozen=True)
class ScoredTask:
    """The items of a task file, and how models are asked."""

    name: str
    sha256: str
    items: list[TaskItem]
    chat: bool
    """Whether prompts are messages of a user, which each model reads in the chat template of a transfer."""

    @classmethod
    def read(cls, path: str, chat: bool) -> "ScoredTask":
        """Reads a task file.

        Raises:
            UserError: it is missing, empty or malformed.
        """
        items = load_task(path)
        return cls(Path(path).stem, hashlib.sha256(Path(path).read_bytes()).hexdigest(), items, chat)

    def score_untrained(self, models: Models) -> dict[str, Score]:
        """Scores the target that is still bare, and source + LoRA.

        Raises:
            UserError: a completion does not fit into a model, or a chat template refuses a message.
        """
        bare = self.evaluate_target(models).summary
        models.use("source")
        template = chat_template(models.source_tokenizer) if self.chat else None
        teacher = evaluate_model(models.source, models.source_tokenizer, self.items, template=template).summary
        scores = {BARE_TARGET: bare, SOURCE_LORA: teacher}
        logger.info("On %s: %s", self.name, ", ".join(f"{model} {score.value:.3f}" for model, score in scores.items()))
        return scores

    def evaluate_target(self, models: Models) -> Evaluation:
        """Scores the target as it stands, with the update that it has learned so far."""
        models.use("target")
        template = target_template(models.source_tokenizer, models.target_tokenizer) if self.chat else None
        with parametrize.cached():
            return evaluate_model(models.target, models.target_tokenizer, self.items, template=template)

    def record(self, models: Models, before: Mapping[str, Score]) -> dict[str, Any]:
        """Scores the target, which is trained now, and describes the task for the manifest.

        Args:
            models: both
            before: as `score_untrained` gave them
        """
        found = self.evaluate_target(models)
        logger.info("On %s: %s %.3f", self.name, TRANSFERRED, found.score)
        scores = {**before, TRANSFERRED: found.summary}
        skill = Skill(self.name, scores, metric=found.metric, examples=found.n, sha256=self.sha256)
        return describe_task(skill, self.chat, scoring_versions())
