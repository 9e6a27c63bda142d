"""What the package carries for the demo: two base models, three adapters, text and a test.

The models and adapters were trained by `benchmarks/zoo`; the text was written by the bundled source
model and the test items by `benchmarks/zoo/demo_items.py`, so that none of it is anybody's corpus.
"""

import json
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent
SOURCE = "llama-s"
TARGET = "mistral-s"
SKILL = "question-type"


@dataclass(frozen=True)
class DemoSkill:
    """A skill of the demo."""

    name: str
    title: str
    prompt_format: str

    @property
    def task(self) -> Path:
        """Task file of labelled test items."""
        return demo_tasks_path() / self.name / "test.jsonl"

    @property
    def prompts(self) -> Path:
        """Unlabelled prompts, disjoint from the test items."""
        return demo_tasks_path() / self.name / "prompts.jsonl"

    def adapter(self, base: str) -> Path:
        """The adapter that was trained for this skill on one of the bundled models."""
        return demo_adapters_path() / base / self.name


def demo_models_path() -> Path:
    """Folder that holds the bundled base models, one folder each."""
    return _FOLDER / "models"


def demo_adapters_path() -> Path:
    """Folder that holds the bundled adapters, by base model and skill."""
    return _FOLDER / "adapters"


def demo_tasks_path() -> Path:
    """Folder that holds the bundled test items and prompts, one folder per skill."""
    return _FOLDER / "tasks"


def demo_skill() -> DemoSkill:
    """The skill that the demo moves."""
    return DemoSkill(**json.loads((demo_tasks_path() / SKILL / "skill.json").read_text(encoding="utf-8")))
