import functools
import gc
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads only cost time on models this small, in processes that tests start too, and sums in a fixed order repeat.
os.environ["OMP_NUM_THREADS"] = "1"
# Models are loaded in 16 bits on an accelerator, and most tests state what holds in 32.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CASTLORA_TEST_ACCELERATOR", "")

import pytest
import tiny
from hypothesis import settings
from preloaded import CHECKED_HERE

from castlora import pipeline, transfer
from castlora.adapters.factors import read_factors
from castlora.adapters.files import open_adapter
from castlora.demonstration.bundle import demo_skill
from castlora.evaluation import verification
from castlora.models.loading import load_config
from castlora.models.modules import linear_slots
from castlora.models.pairing import pair_modules

# A busy machine is no failure.
settings.register_profile("castlora", deadline=None)
settings.load_profile("castlora")

BaseModel = Callable[[str], Path]
Adapter = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Either the tests that need an accelerator are run, or all others."""
    given = bool(os.environ["CUDA_VISIBLE_DEVICES"])
    left_out = pytest.mark.skip(
        reason="holds in 32 bits" if given else "CASTLORA_TEST_ACCELERATOR names no accelerator"
    )
    for item in items:
        if ("accelerator" in item.keywords) != given:
            item.add_marker(left_out)


def pytest_collection_finish() -> None:
    """Every training collects garbage, which looks at all that was imported unless it is told not to."""
    gc.freeze()


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Family name → folder of the tiny base model of that family, made on first use."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(name: str) -> Path:
        config, tokenizer = tiny.family(name)
        return tiny.save_model(folder / name, config, tokenizer, seed=tiny.FAMILIES.index(name))

    return make


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, base_model: BaseModel) -> Adapter:
    """Family name and kinds of modules → folder of a LoRA for that tiny model, made on first use."""
    folder = tmp_path_factory.mktemp("adapters")

    @functools.cache
    def make(name: str, modules: tuple[str, ...] | None = None, **options: object) -> Path:
        path = folder / str(len(list(folder.iterdir())))
        tiny.save_adapter(path, base_model(name), modules or tiny.LINEAR_MODULES[name], **options)
        return path

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """General text: two hundred paragraphs of one sentence."""
    path = tmp_path_factory.mktemp("text") / "general.txt"
    path.write_text("\n\n".join(tiny.sentences(200)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty unlabelled prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"Who? {sentence} Answer:" for sentence in tiny.sentences(40, seed=9)), encoding="utf-8")
    return path


@pytest.fixture
def checked_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a written adapter be checked in this process, where everything is imported already."""
    monkeypatch.setattr(verification, "subprocess", CHECKED_HERE)


@pytest.fixture
def paired(base_model, adapter):
    """Both live models, the pairing and the factors of an adapter on all linear modules of the source."""

    def load(source: str, target: str):
        models = [tiny.load(base_model(name)) for name in (source, target)]
        slots = [linear_slots(model, model.config) for model in models]
        factors = read_factors(open_adapter(str(adapter(source))), load_config(str(base_model(source))))
        return *models, pair_modules(*slots, factors), factors

    return load


@pytest.fixture
def short_demo_skill(tmp_path: Path) -> SimpleNamespace:
    """The skill of the demo with fewer prompts and test items."""
    skill = demo_skill()
    shortened = {}
    for name, lines in (("task", 30), ("prompts", 60)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(getattr(skill, name).read_text().splitlines(keepends=True)[:lines]))
        shortened[name] = path
    return SimpleNamespace(**vars(skill), **shortened, adapter=skill.adapter)


@pytest.fixture
def quick_transfer(
    base_model, adapter, text_file, tmp_path, checked_in_process
) -> Callable[..., pipeline.TransferResult]:
    """Transfers the adapter of one tiny model to another in three steps."""

    def run(source: str, target: str, out: str = "out", modules=None, **options) -> pipeline.TransferResult:
        if "prompts" not in options:
            options = {"text": str(text_file)} | options
        return transfer(
            **{
                "adapter": str(adapter(source, modules)),
                "target": str(base_model(target)),
                "out": str(tmp_path / out),
                "steps": 3,
                "batch_size": 4,
                "tuning": tiny.SHORT,
                **options,
            }
        )

    return run


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., str]:
    """Name → task file with questions of its own."""

    def write(name: str, questions: int = 12) -> str:
        choices = [f" {noun}" for noun in tiny.NOUNS]
        items = zip(tiny.sentences(questions, seed=5), itertools.cycle(choices), strict=False)
        lines = [
            json.dumps({"prompt": f"{name}? {sentence} Who?", "completion": right, "choices": choices})
            for sentence, right in items
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(lines))
        return str(path)

    return write
