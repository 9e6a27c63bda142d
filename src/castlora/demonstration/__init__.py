"""The demo: a skill moves between two bundled models of different families and tokenizers."""

from castlora.demonstration.bundle import demo_models_path
from castlora.demonstration.story import demonstrate

__all__ = ["demo_models_path", "demonstrate"]
