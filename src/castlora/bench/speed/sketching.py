"""What a bridge between two models costs that were sketched before, beside one that is fitted with both of them."""

import random
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from castlora.bench.speed.measures import SpeedSettings
from castlora.bench.speed.timing import Clock, Ratio, Side, interleaved
from castlora.bridge.fit import fit
from castlora.bridge.join import join
from castlora.bridge.sketch import sketch
from castlora.demonstration.bundle import SKILL, SOURCE, TARGET, demo_models_path, demo_tasks_path
from castlora.text.passages import read_prompts

_BYTES_PER_TOKEN = 4
"""Of the text that is made up, so that both ways read passages of about one length."""
_TOKENS_PER_PLACE, _TOKENS_PER_FITTED_PLACE = 32, 10
"""As by default: of 4096 passages of some 256 tokens a sketch keeps 32,768 places, and a fit counts 100,000."""
_FEWEST = 64
"""Passages; a sketch of less text has too few places."""


def measure_sketching(settings: SpeedSettings, device: torch.device) -> list[Ratio]:
    """Seconds of joining two sketches, and of sketching both and joining, over those of a fit on the same text.

    The models are those of the package, whatever the shape of the settings: a sketch needs a tokenizer.
    """
    source, target = (str(demo_models_path() / name) for name in (SOURCE, TARGET))
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        passages, length = max(_FEWEST, settings.passages // 2), settings.length * _BYTES_PER_TOKEN
        places = passages * settings.length // _TOKENS_PER_PLACE
        text = folder / "text.txt"
        text.write_text(_made_up(passages, length, settings.seed), encoding="utf-8")

        def fitted() -> Path:
            out = _new(folder / "fitted")
            counted = passages * settings.length // _TOKENS_PER_FITTED_PLACE
            return fit(source, target, out, str(text), None, passages, settings.length, counted, seed=settings.seed)

        def sketched(model: str) -> str:
            out = _new(folder / f"sketch of {Path(model).name}")
            return str(sketch(model, out, str(text), None, passages, length, places, settings.seed))

        sketches = sketched(source), sketched(target)
        works = {
            "a fit": fitted,
            "joining": lambda: join(*sketches, _new(folder / "joined")),
            "two sketches": lambda: (sketched(source), sketched(target)),
        }
        seconds = interleaved(Clock(device), works, settings.repeats)
    tokens = 2 * passages * settings.length
    beside = Side("a fit", tokens, seconds["a fit"])
    together = [sum(both) for both in zip(seconds["two sketches"], seconds["joining"], strict=True)]
    return [
        Ratio(
            "joining sketches", "models that are sketched", Side("joining", tokens, seconds["joining"]), beside, False
        ),
        Ratio("joining sketches", "from the start", Side("two sketches and joining", tokens, together), beside, False),
    ]


def _made_up(passages: int, length: int, seed: int) -> str:
    """Lines of the words of the bundled prompts, in no order: how long it takes to read them does not depend on that.

    Args:
        passages: lines
        length: bytes of a line
        seed: of the words
    """
    words = " ".join(read_prompts(str(demo_tasks_path() / SKILL / "prompts.jsonl"), passages, seed)).split()
    chance = random.Random(seed)
    letters = sum(map(len, words)) / len(words)
    count = round(length / (letters + 1))
    return "\n\n".join(" ".join(chance.choices(words, k=count)) for _ in range(passages)) + "\n"


def _new(folder: Path) -> str:
    """A place for a result, where one of the repetition before may lie."""
    shutil.rmtree(folder, ignore_errors=True)
    return str(folder)
