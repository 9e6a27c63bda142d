"""Tries damaged and hostile inputs on what reads files, and counts what happens.

    python -m benchmarks.fuzz --count 10000 --out benchmarks/results/fuzz.json

Every input starts as an intact one: the bundled adapter, base model, tasks and prompts, and general text. One to three
mutations later a reader must take it or refuse it with one sentence (`UserError`). Anything else is a failure: another
exception, more than ten seconds, a refusal that is no line of printable text, or a file that reading has changed.
"""

import json
import logging
import random
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from jsonargparse import auto_cli
from tqdm.auto import tqdm
from transformers import AutoConfig

from benchmarks.mutations import JSON_MUTATIONS, TENSOR_MUTATIONS, TEXT_MUTATIONS, Mutation
from castlora import CastMaps, convert, fit, join, merge_statistics, sketch
from castlora.adapters.factors import LowRank, write_portable
from castlora.adapters.files import open_adapter
from castlora.adapters.portable import check_portable
from castlora.alignment.tokens import ByteTokenizer
from castlora.alignment.vocabulary import SharedVocabulary
from castlora.bench.grid import environment
from castlora.demonstration.bundle import SOURCE, TARGET, demo_adapters_path, demo_models_path, demo_skill
from castlora.errors import UserError
from castlora.evaluation.tasks import load_task
from castlora.models.loading import load_config, load_model, load_tokenizer, skeleton
from castlora.models.modules import linear_slots
from castlora.plan import plan_transfer
from castlora.teaching.taught import check_taught
from castlora.text.chat import read_conversations
from castlora.text.passages import candidate_formats, cut_passages, draw_fillings, read_documents, read_prompts

_SECONDS = 10
_TEXT = "This is a fox. Where does the river run? Topic: hens and foxes near the mill.\n\nShe said: no.\n\n"
_MUTATIONS: dict[str, Sequence[Mutation]] = {".json": JSON_MUTATIONS, ".safetensors": TENSOR_MUTATIONS}


@dataclass(frozen=True)
class Target:
    """Something that reads files."""

    files: Callable[[Path], None]
    """Puts intact files into a folder."""
    read: Callable[[Path], object]
    """Reads them."""
    mutated: Sequence[str]
    """Names of the files that are damaged."""


@dataclass
class Outcome:
    """What happened to the inputs of one target."""

    tried: int = 0
    taken: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0


def _adapter_files(folder: Path) -> None:
    shutil.copytree(demo_adapters_path() / SOURCE / demo_skill().name, folder, dirs_exist_ok=True)


@cache
def _mlx_adapter() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as temporary:
        adapter = demo_adapters_path() / SOURCE / demo_skill().name
        converted = convert(str(adapter), "mlx", str(Path(temporary) / "mlx"), base=str(demo_models_path() / SOURCE))
        return {path.name: path.read_bytes() for path in converted.iterdir()}


def _mlx_files(folder: Path) -> None:
    for name, content in _mlx_adapter().items():
        (folder / name).write_bytes(content)


def _write_text(folder: str) -> str:
    """Text to read whole models on."""
    text = Path(folder) / "text.txt"
    text.write_text("\n\n".join(f"{_TEXT.split('Topic')[0]} Day {day}." for day in range(40)), encoding="utf-8")
    return str(text)


@cache
def _fitted(shard: str | None) -> tempfile.TemporaryDirectory[str]:
    """A bridge between the bundled models, or a shard of its statistics; it is there as long as this is remembered."""
    folder = tempfile.TemporaryDirectory()
    text = _write_text(folder.name)
    source, target = (str(demo_models_path() / name) for name in (SOURCE, TARGET))
    sizes = {"roles": ("q",), "passages": 20, "max_length": 32}
    fit(source, target, str(Path(folder.name) / "fitted"), text, shard=shard, **sizes)
    return folder


def _fitted_files(shard: str | None, folder: Path) -> None:
    shutil.copytree(Path(_fitted(shard).name) / "fitted", folder, dirs_exist_ok=True)


@cache
def _sketched(model: str) -> tempfile.TemporaryDirectory[str]:
    """A sketch of a bundled model; it is there as long as this is remembered."""
    folder = tempfile.TemporaryDirectory()
    text = _write_text(folder.name)
    sizes = {"roles": ("q",), "passages": 20, "passage_bytes": 60, "places": 100}
    sketch(str(demo_models_path() / model), str(Path(folder.name) / "sketch"), text, **sizes)
    return folder


def _sketch_files(folder: Path) -> None:
    shutil.copytree(Path(_sketched(SOURCE).name) / "sketch", folder, dirs_exist_ok=True)


def _join(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        join(str(folder), str(Path(_sketched(TARGET).name) / "sketch"), str(Path(temporary) / "bridge"))


@cache
def _adapter_of_queries() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    name = str(demo_models_path() / SOURCE)
    config = load_config(name)
    slots = linear_slots(skeleton(config), config)
    lora = {slot: LowRank(torch.ones(8, one.d_in), torch.ones(one.d_out, 8))
            for slot, one in slots.items() if one.roles == ("q",)}  # fmt: skip
    write_portable(Path(folder.name), lora, slots, 8, name, None)
    return folder


def _translate(folder: Path) -> None:
    CastMaps.load(str(folder)).translate(open_adapter(_adapter_of_queries().name))


def _merge(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        merge_statistics([str(folder)], str(Path(temporary) / "bridge"))


def _model_config(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (demo_models_path() / TARGET / name).exists():
            shutil.copy(demo_models_path() / TARGET / name, folder / name)


def _image_model_config(folder: Path) -> None:
    """Of a small Gemma 3, which reads images too."""
    _model_config(folder)
    of_text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
               "vocab_size": 3072}  # fmt: skip
    of_images = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model("gemma3", text_config=of_text, vision_config=of_images)
    config.architectures = ["Gemma3ForConditionalGeneration"]
    config.save_pretrained(folder)


def _whole_model(folder: Path) -> None:
    shutil.copytree(demo_models_path() / TARGET, folder, dirs_exist_ok=True)


def _read_tokenizer(folder: Path) -> None:
    tokenizer = ByteTokenizer.from_tokenizer(load_tokenizer(str(folder)))
    SharedVocabulary.of(tokenizer, _intact_tokenizer(), len(tokenizer.spellings), len(_intact_tokenizer().spellings))
    tokenizer.encode_batch([_TEXT, "naïve 🙂 <s> \t12"])


@cache
def _intact_tokenizer() -> ByteTokenizer:
    return ByteTokenizer.from_tokenizer(load_tokenizer(str(demo_models_path() / SOURCE)))


def _task_files(folder: Path) -> None:
    for path in (demo_skill().task, demo_skill().prompts):
        lines = path.read_text(encoding="utf-8").split("\n")[:20]
        (folder / path.name).write_text("\n".join(lines), encoding="utf-8")
    conversation = {"messages": [{"role": "user", "content": "Where does the river run?"}]}
    (folder / "taught.jsonl").write_text("\n".join([json.dumps({**conversation, "answer": " North."})] * 5))
    (folder / "chat.jsonl").write_text("\n".join([json.dumps(conversation)] * 5))


def _text_files(folder: Path) -> None:
    (folder / "text.txt").write_text(_TEXT * 5)
    (folder / "text.jsonl").write_text("\n".join([json.dumps({"text": _TEXT})] * 5))


def _read_tasks(folder: Path) -> None:
    load_task(folder / "test.jsonl")
    read_prompts(str(folder / "prompts.jsonl"), 10, seed=0)
    read_conversations(str(folder / "chat.jsonl"), 10, seed=0)
    check_taught(str(folder / "taught.jsonl"))


def _read_text(folder: Path) -> None:
    for name in ("text.txt", "text.jsonl"):
        documents = list(read_documents(str(folder / name)))
        draw_fillings(documents, 5, seed=0)
        candidate_formats(documents, 20)
        cut_passages(documents, 5, 40, seed=0)


def _plan_from_adapter(folder: Path) -> None:
    plan_transfer(str(folder), str(demo_models_path() / TARGET), str(demo_models_path() / SOURCE))


def _plan_to_model(folder: Path) -> None:
    adapter = demo_adapters_path() / SOURCE / demo_skill().name
    plan_transfer(str(adapter), str(folder), str(demo_models_path() / SOURCE))


def _convert_from_mlx(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        convert(str(folder), "peft", str(Path(temporary) / "peft"), base=str(demo_models_path() / SOURCE))


_TASK_FILES = ("test.jsonl", "prompts.jsonl", "chat.jsonl", "taught.jsonl")
_SKETCH = ("sketch.json", "part-00000/places.safetensors", "part-00000/layer-000-attention.safetensors")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TARGETS: dict[str, Target] = {
    "adapter to move": Target(_adapter_files, _plan_from_adapter, _ADAPTER),
    "adapter to check": Target(_adapter_files, check_portable, _ADAPTER),
    "MLX-LM adapter": Target(_mlx_files, _convert_from_mlx, ("adapter_config.json", "adapters.safetensors")),
    "configuration of a base model": Target(_model_config, _plan_to_model, ("config.json",)),
    "configuration of a model for images": Target(_image_model_config, _plan_to_model, ("config.json",)),
    "weights of a base model": Target(
        _whole_model, lambda folder: load_model(str(folder)), ("model.safetensors", "generation_config.json")
    ),
    "tokenizer of a base model": Target(_whole_model, _read_tokenizer, ("tokenizer.json", "tokenizer_config.json")),
    "task, prompts and messages": Target(_task_files, _read_tasks, _TASK_FILES),
    "bridge": Target(partial(_fitted_files, None), _translate, ("bridge.json", "layer-000-attention.safetensors")),
    "statistics of a bridge": Target(
        partial(_fitted_files, "1/1"), _merge, ("statistics.json", "layer-000-attention.safetensors")
    ),
    "sketch of a model": Target(_sketch_files, _join, _SKETCH),
    "general text": Target(_text_files, _read_text, ("text.txt", "text.jsonl")),
}


class _TooSlowError(BaseException):
    """Not an Exception, so that nothing takes it for what a library raises."""


def try_once(target: Target, chance: random.Random, outcome: Outcome, label: str) -> None:
    """Damages an intact input, has it read, and adds what happened."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        target.files(folder)
        damaged = chance.choices(target.mutated, k=chance.randint(1, 3))
        for name in damaged:
            path = folder / name
            if path.is_file() and not path.is_symlink():
                chance.choice(_MUTATIONS.get(path.suffix, TEXT_MUTATIONS))(path, chance)
        before = _contents(folder)
        started = time.monotonic()
        outcome.tried += 1
        try:
            with _limited(_SECONDS):
                target.read(folder)
            outcome.taken += 1
        except UserError as error:
            outcome.refused += 1
            if not str(error).isprintable():
                outcome.failures.append(f"{label}: refused in what is no line of text: {str(error)!r}")
        except (Exception, _TooSlowError) as error:  # noqa: BLE001  # What a reader lets through is what this program looks for.
            outcome.failures.append(f"{label}: {_summary(error)}")
        outcome.slowest_seconds = max(outcome.slowest_seconds, time.monotonic() - started)
        if _contents(folder) != before:
            outcome.failures.append(f"{label}: reading changed {damaged}")


def _summary(error: BaseException) -> str:
    """The exception, and where in castlora it came through."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "castlora" in Path(frame.filename).parts]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours]
    return f"{type(error).__name__}: {str(error)[:200]} ({' > '.join(places)})"


def _contents(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path): str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(_signal: int, _frame: object) -> None:
        raise _TooSlowError(f"took more than {seconds} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def _without_log() -> Iterator[None]:
    """Libraries warn of most damage that they meet."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def fuzz(count: int, seed: int) -> dict[str, Outcome]:
    """`count` damaged inputs, spread evenly over the targets; input i of a seed is the same every time."""
    outcomes = {name: Outcome() for name in TARGETS}
    for number in tqdm(range(count), desc="damaged inputs", unit="input"):
        name = list(TARGETS)[number % len(TARGETS)]
        label = f"input {number} of seed {seed} ({name})"
        try_once(TARGETS[name], random.Random(f"{seed} {number}"), outcomes[name], label)
    return outcomes


def main(count: int = 10_000, seed: int = 0, out: Path | None = None) -> None:
    """Prints the counts, and the failures if there are any.

    Args:
        count: damaged inputs to try
        seed: of the damage
        out: JSON file for the counts
    """
    with warnings.catch_warnings(), _without_log():
        warnings.simplefilter("ignore")
        outcomes = fuzz(count, seed)
    print(f"{'':32} {'tried':>7} {'refused':>8} {'taken':>6} {'failed':>7} {'slowest':>8}")
    for name, outcome in outcomes.items():
        failed, slowest = len(outcome.failures), f"{outcome.slowest_seconds:.2f} s"
        print(f"{name:32} {outcome.tried:7} {outcome.refused:8} {outcome.taken:6} {failed:7} {slowest:>8}")
    for outcome in outcomes.values():
        for failure in outcome.failures[:20]:
            print(failure)
    if out is not None:
        counts = {name: asdict(outcome) for name, outcome in outcomes.items()}
        out.write_text(json.dumps({"seed": seed, "targets": counts, "environment": environment()}, indent=1) + "\n")
    if any(outcome.failures for outcome in outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
