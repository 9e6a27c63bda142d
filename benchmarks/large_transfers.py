"""Whole transfers between models of 7B sizes with random weights, each within the memory of a smaller accelerator.

    python -m benchmarks.large_transfers --work large

The rest of the accelerator is kept full meanwhile, so that a run sees what a card of that size has free. WORK takes
the models: 28 GB for the pair `7b`. Entries that are already in the record are skipped.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from castlora.adapters.factors import LowRank, write_portable
from castlora.bench.grid import environment
from castlora.bench.speed.models import SHAPES, Shape, random_adapter
from castlora.config import ShapeName
from castlora.demonstration.bundle import SOURCE, TARGET, demo_models_path, demo_skill
from castlora.execution.run_directory import write_whole
from castlora.models.loading import best_device, skeleton
from castlora.models.modules import linear_slots
from castlora.publishing.runs import MANIFEST_FILE
from castlora.text.passages import read_prompts

_UPDATE_SCALE = 0.05
"""Of a random LoRA's B, so that its update is small beside the weights."""
_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Way:
    """Options of a transfer, and the accelerator that they are for."""

    gibibytes: float
    options: tuple[str, ...] = ()


WAYS: Mapping[str, Way] = {
    "one model at a time": Way(24, ("--low-memory", "true")),
    "one model at a time, both in 4 bits": Way(
        16, ("--low-memory", "true", "--source-bits", "4", "--target-bits", "4")
    ),
    "both models in 4 bits": Way(40, ("--source-bits", "4", "--target-bits", "4")),
    "both models": Way(80),
}


def write_model(folder: Path, shape: Shape, tokenizer: PreTrainedTokenizerFast) -> None:
    """A model with random weights, in the dtype that it will be loaded in; nothing where it is already."""
    if folder.exists():
        return
    device = best_device()
    torch.manual_seed(0)
    with device:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype)
    unfinished = folder.with_suffix(".unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def long_prompts(tokenizers: list[PreTrainedTokenizerFast], length: int, count: int) -> list[str]:
    """Prompts of the demo, joined until another one would make them longer than `length` tokens for one tokenizer."""
    short = read_prompts(str(demo_skill().prompts), count=1000, seed=0)
    prompts, joined = [], ""
    for index in range(len(short) * count):
        longer = f"{joined}{short[index % len(short)]} {index}\n"
        if max(len(tokenizer(longer).input_ids) for tokenizer in tokenizers) > length:
            prompts.append(joined)
            longer = ""
        if len(prompts) == count:
            break
        joined = longer
    return prompts


def prepare(work: Path, shape: ShapeName, rank: int, length: int, passages: int) -> dict[str, Path]:
    """Writes both models, an adapter and prompts.

    Returns:
        the option that takes it → file or folder
    """
    tokenizers = [AutoTokenizer.from_pretrained(demo_models_path() / name) for name in (SOURCE, TARGET)]
    pair = SHAPES[shape]
    places = {name: work / name for name in ("source", "target", "adapter", "prompts.jsonl")}
    write_model(places["source"], pair.source, tokenizers[0])
    write_model(places["target"], pair.target, tokenizers[1])
    torch.manual_seed(0)
    factors, _ = random_adapter(pair, rank)
    small = {name: LowRank(lora.a, _UPDATE_SCALE * lora.b) for name, lora in factors.items()}
    slots = linear_slots(skeleton(pair.source.config()), pair.source.config())
    places["adapter"].mkdir(exist_ok=True)
    write_portable(places["adapter"], small, slots, rank, str(places["source"]), None)
    prompts = long_prompts(tokenizers, length - _ANSWER_TOKENS, passages)
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    places["prompts.jsonl"].write_text(lines, encoding="utf-8")
    return {name.removesuffix(".jsonl"): place for name, place in places.items()}


def leave_free(gibibytes: float) -> torch.Tensor | None:
    """Takes all memory of the accelerator but this much, until what it returns is dropped; nothing on a processor."""
    device = best_device()
    if device.type == "cpu":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return torch.empty(max(0, free - round(gibibytes * 2**30)), dtype=torch.uint8, device=device)


def run(way: Way, places: Mapping[str, Path], out: Path, numbers: Mapping[str, int], limit: int) -> dict[str, Any]:
    """One transfer in a process of its own, timed by its log."""
    command = [sys.executable, "-m", "castlora", "-v", "transfer", "--out", str(out), *way.options]
    for name, value in {**places, **numbers}.items():
        command += [f"--{name}", str(value)]
    ballast = leave_free(way.gibibytes)
    with out.with_suffix(".log").open("w", encoding="utf-8") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = -1
    del ballast
    torch.cuda.empty_cache()
    entry: dict[str, Any] = {"gibibytes": way.gibibytes, "options": list(way.options), **numbers, "exit_code": code}
    if code == 0:
        manifest = json.loads((out / MANIFEST_FILE).read_text(encoding="utf-8"))
        kept = ("seconds", "peak_memory_bytes", "peak_accelerator_bytes", "logit_difference", "losses", "passages")
        entry |= {name: manifest[name] for name in kept}
    return entry


def main(
    work: Path,
    out: Path = Path("benchmarks/results/large_transfers.json"),
    shape: ShapeName = "7b",
    ways: Sequence[str] = tuple(WAYS),
    steps: int = 20,
    batch_size: int = 8,
    length: int = 256,
    passages: int = 96,
    rank: int = 16,
    limit: int = 3600,
) -> None:
    """Runs what is missing of the record.

    Args:
        work: folder for models, runs and their logs
        out: the record
        shape: sizes of the pair
        ways: which transfers
        steps: optimizer steps
        batch_size: passages per step
        length: tokens per passage
        passages: passages in all
        rank: rank of the adapter
        limit: seconds after which a run is stopped and counted as failed
    """
    work.mkdir(parents=True, exist_ok=True)
    places = prepare(work, shape, rank, length, passages)
    numbers = {
        "steps": steps, "batch-size": batch_size, "tuning.max-length": length, "tuning.answer-tokens": _ANSWER_TOKENS,
        "tuning.rehearsal-passages": 32, "tuning.rehearsal-tokens": 32,
    }  # fmt: skip
    record = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"shape": shape, "rank": rank, "runs": {}}
    for name in ways:
        if name in record["runs"]:
            continue
        entry = run(WAYS[name], places, work / name.replace(" ", "-"), numbers, limit)
        device = best_device()
        accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
        record["runs"][name] = {**entry, "environment": {**environment(), "accelerator": accelerator}}
        write_whole(out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
