"""What each command of the command line does; everything heavy is imported when it runs."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from castlora.bridge.commands import BRIDGE_COMMANDS
from castlora.config import Bits, Form, RecipeName, Start, TextTuning, Tracker, Tuning
from castlora.execution.launcher import is_main

NOT_PORTABLE = 1


def _transfer(
    adapter: str,
    target: list[str] | str,
    out: str,
    source: str | None = None,
    text: str | None = None,
    prompt_format: str = "",  # were it optional, jsonargparse would read "### {text}" as a YAML comment: None
    prompts: str | None = None,
    chat: bool = False,
    taught: str | None = None,
    recipe: RecipeName = "default",
    start: Start | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    rank: int | None = None,
    tuning: Tuning = Tuning(),
    task: str | None = None,
    report_to: Tracker | None = None,
    low_memory: bool = False,
    source_bits: Bits | None = None,
    target_bits: Bits | None = None,
    sharded: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    json: bool = False,
) -> None:
    r"""Moves an adapter to another base model and writes a standard PEFT LoRA.

    The same command continues a run that was interrupted.

    Args:
        adapter: folder or hub id of a PEFT LoRA
        target: folder or hub id of the new base model; given several times, each one gets a folder in out, and source +
            LoRA is asked once for all of them
        out: folder to write, new or empty
        source: base model of the adapter, if not the one that its configuration names
        text: general text: .txt or .jsonl, gzipped or not, or a hub data set; by default allenai/c4
        prompt_format: the adapter's prompt format with a {text} slot, filled from the general text; \n is a new line
        prompts: file of unlabelled prompts of the task, instead of general text
        chat: whether prompts are messages of a user, which each model reads in its own chat template
        taught: file that castlora teach wrote, instead of all other text
        recipe: castlora's default, or the paper as far as it is stated
        start: random maps (paper), closed-form maps (ridge), these and a solved last layer (readout), or a plain LoRA
            (fresh), instead of the recipe's: by default fresh with prompts and 400 steps, unless the target has the
            source's shapes, else ridge
        steps: optimizer steps, instead of the recipe's; 0 writes the start as it is solved, by default `readout`
        batch_size: passages per step, instead of the recipe's
        seed: the same seed gives the same bytes on the same machine
        rank: rank of the adapter to write; by default the smallest that holds the update
        tuning: departures from the recipe's other numbers
        task: task file, as castlora evaluate has it, that the target is scored on along the way; changes nothing else
        report_to: tracker that shows the losses while the training runs; TensorBoard's files lie in runs
        low_memory: whether an accelerator holds one of the two models at a time, and activations are computed again;
            for pairs too large for it, and slower
        source_bits: 4 (NF4) or 8, for a source quantized by bitsandbytes, such as QLoRA trains on
        target_bits: the same for the target, if it is to be served so
        sharded: whether each of the processes that torchrun started keeps a part of both models' layers (FSDP2); for
            models that no accelerator holds
        push_to_hub: OWNER/NAME of a repository on the hub that the adapter is uploaded to, as castlora push does
        private: whether a new repository is private
        json: whether the manifest is printed when all is done; of several targets, the manifest of each
    """
    from transformers.utils.logging import disable_progress_bar

    from castlora.execution.processes import from_main
    from castlora.pipeline import transfer as run
    from castlora.publishing.hub import check_push, push
    from castlora.several import transfer_to_each

    disable_progress_bar()
    settings: dict[str, Any] = {
        "source": source, "text": text, "prompt_format": _prompt_format(prompt_format), "prompts": prompts,
        "chat": chat, "taught": taught, "recipe": recipe, "start": start, "steps": steps, "batch_size": batch_size,
        "seed": seed, "rank": rank, "tuning": tuning, "task": task, "report_to": report_to, "low_memory": low_memory,
        "source_bits": source_bits, "target_bits": target_bits, "sharded": sharded,
    }  # fmt: skip
    targets = [target] if isinstance(target, str) else target
    if push_to_hub:
        from_main(partial(check_push, push_to_hub, targets))
    if len(targets) == 1:
        manifest: Any = run(adapter, targets[0], out, **settings).manifest
    else:
        manifest = transfer_to_each(adapter, targets, out, **settings)
    if push_to_hub:
        from_main(partial(push, out, push_to_hub, private))
    if json and is_main():
        _print_json(manifest)


def _teach(
    adapter: str,
    out: str,
    source: str | None = None,
    text: str | None = None,
    prompt_format: str = "",
    prompts: str | None = None,
    chat: bool = False,
    seed: int = 0,
    tuning: TextTuning = TextTuning(),
    source_bits: Bits | None = None,
    sharded: bool = False,
) -> None:
    r"""Writes prompts with the answers of source + LoRA, once for transfers to any number of targets.

    The same command continues a run that was interrupted.

    Args:
        adapter: folder or hub id of a PEFT LoRA
        out: JSON lines file to write, for castlora transfer --taught
        source: base model of the adapter, if not the one that its configuration names
        text: general text: .txt or .jsonl, gzipped or not, or a hub data set; by default allenai/c4
        prompt_format: the adapter's prompt format with a {text} slot, filled from the general text; \n is a new line
        prompts: file of unlabelled prompts of the task, instead of general text
        chat: whether prompts are messages of a user, which each model reads in its own chat template
        seed: of the draw and of the answers
        tuning: how much text, and how long
        source_bits: 4 (NF4) or 8, for a source quantized by bitsandbytes, such as QLoRA trains on
        sharded: whether each of the processes that torchrun started keeps a part of the source's layers (FSDP2)
    """
    from transformers.utils.logging import disable_progress_bar

    from castlora.teaching.teach import teach as run

    disable_progress_bar()
    run(adapter, out, source, text, _prompt_format(prompt_format), prompts, chat, seed, tuning, source_bits, sharded)


def _prompt_format(written: str) -> str | None:
    """A prompt format as the command line has it: empty for none, and line ends written out."""
    return written.replace("\\n", "\n") if written else None


def _evaluate(
    model: str,
    task: str,
    adapter: str | None = None,
    out: str | None = None,
    batch_size: int = 32,
    chat: bool = False,
    retrained: str | None = None,
    record: bool = False,
    bits: Bits | None = None,
    json: bool = False,
) -> None:
    """Scores a model, with or without an adapter, on a task file.

    Args:
        model: folder or hub id of the base model
        task: JSON lines with prompt, completion and optionally choices
        adapter: folder or hub id of a PEFT LoRA for it
        out: JSON file for the result
        batch_size: items per forward pass
        chat: whether prompts are messages of a user, in the model's chat template
        retrained: adapter that was trained on the task for the model, to measure the lift by
        record: whether the scores go into manifest, model card and report of the adapter, which transfer wrote
        bits: 4 (NF4) or 8, for a model quantized by bitsandbytes
        json: whether the result is printed as JSON
    """
    from castlora.scoring import describe
    from castlora.scoring import evaluate as run

    result = run(model, task, adapter, out, batch_size, None, chat, retrained, record, bits)
    _print_result(result, describe(result), json)


def _inspect(
    adapter: str,
    target: str,
    source: str | None = None,
    steps: int = 1000,
    batch_size: int = 16,
    source_bits: Bits | None = None,
    target_bits: Bits | None = None,
    processes: int = 1,
    json: bool = False,
) -> None:
    """Shows before a transfer what will be paired, what will be dropped, and what it will cost.

    Args:
        adapter: folder or hub id of a PEFT LoRA
        target: folder or hub id of the new base model
        source: base model of the adapter, if not the one that its configuration names
        steps: optimizer steps to forecast
        batch_size: passages per step to forecast
        source_bits: 4 (NF4) or 8, for a source that bitsandbytes is to quantize
        target_bits: the same for the target
        processes: how many are to hold both models together with castlora transfer --sharded
        json: whether all this is printed as JSON
    """
    from castlora.inspection import inspect as run

    found = run(adapter, target, source, steps, batch_size, source_bits, target_bits, processes)
    _print_result(found.record, str(found), json)


def _check(folder: str, json: bool = False) -> None:
    """Tells which rules of serving engines an adapter breaks; exit code 1 if it breaks one.

    Args:
        folder: folder of a PEFT LoRA
        json: whether the broken rules are printed as JSON
    """
    from castlora.adapters.portable import check_portable, describe

    findings = check_portable(folder)
    if json:
        _print_json([vars(finding) for finding in findings])
    else:
        print(describe(findings))
    if findings:
        sys.exit(NOT_PORTABLE)


def _convert(adapter: str, to: Form, out: str, base: str | None = None, llama_cpp: str | None = None) -> None:
    """Writes an adapter in another form: portable PEFT, MLX-LM, merged into its base model, GGUF, or without a pickle.

    Args:
        adapter: folder or hub id of a PEFT adapter, or folder of an MLX-LM adapter
        to: peft (the plain LoRA that engines load), mlx, merged (the base model with the adapter in it), gguf, or
            safetensors (the tensors of a pickled adapter_model.bin)
        out: folder to write, new or empty; a new file for gguf
        base: base model of the adapter, if not the one that its configuration names
        llama_cpp: folder of llama.cpp's sources, whose converter makes the gguf
    """
    from castlora.adapters.conversion import convert as run

    run(adapter, to, out, base, llama_cpp)


def _push(adapter: str, repo: str, private: bool = False, report: bool = False) -> None:
    """Uploads an adapter or a bridge to the hub, with its card and what was done to make it.

    Args:
        adapter: folder that castlora transfer, translate or fit wrote
        repo: OWNER/NAME; made if there is none
        private: whether a new repository is private
        report: whether report.html goes along, which shows some of the prompts
    """
    from pathlib import Path

    from castlora.bridge.cast_maps import CastMaps
    from castlora.bridge.files import BRIDGE_FILE
    from castlora.publishing.hub import push as run

    if (Path(adapter) / BRIDGE_FILE).is_file():
        print(CastMaps.load(adapter).push(repo, private))
    else:
        print(run(adapter, repo, private, report))


def _steer(
    adapter: str,
    target: str,
    task: str,
    source: str | None = None,
    text: str | None = None,
    prompts: str | None = None,
    layer: int | None = None,
    strength: float = 1.0,
    seed: int = 0,
    out: str | None = None,
    json: bool = False,
) -> None:
    """Steers the target with source + LoRA while it answers a task; needs both models and writes no adapter.

    Args:
        adapter: folder or hub id of a PEFT LoRA
        target: folder or hub id of the model to steer
        task: JSON lines with prompt, completion and choices
        source: base model of the adapter, if not the one that its configuration names
        text: general text to fit the bridge on: .txt or .jsonl, gzipped or not, or a hub data set
        prompts: file of unlabelled prompts to fit the bridge on instead
        layer: decoder layer of the target whose output is replaced; by default at two thirds of the depth
        strength: 0 keeps the target's own hidden states, 1 replaces them
        seed: of everything random
        out: JSON file for the result
        json: whether the result is printed as JSON
    """
    from castlora.steering import describe
    from castlora.steering import steer as run

    result = run(adapter, target, task, source, text, prompts, layer, strength, seed, out)
    _print_result(result, describe(result), json)


def _report(runs: list[str], out: str, json: bool = False) -> None:
    """Writes one page that compares finished runs of transfer, or shows one of them anew.

    Args:
        runs: folders that castlora transfer wrote
        out: HTML file to write, new
        json: whether the comparison is printed as JSON
    """
    from castlora.publishing.runs import report_runs

    described = report_runs(runs, out)
    if json:
        _print_json(described)


def _demo(out: str = "castlora-demo", seed: int = 0, json: bool = False) -> None:
    """Moves a skill between the two bundled models, and shows how much of it arrived.

    Args:
        out: folder to write, new or empty
        seed: of everything random
        json: whether the figures are printed as JSON
    """
    from castlora.demonstration import demonstrate

    result = demonstrate(out, seed)
    _print_result(result.record, str(result), json)


def _print_result(record: Any, text: str, json: bool) -> None:
    if json:
        _print_json(record)
    else:
        print(text)


def _print_json(value: Any) -> None:
    """The only thing that a command prints to standard output; all else goes to standard error."""
    from json import dumps

    print(dumps(value, indent=1))


# The names differ from the package's public ones, which jsonargparse would look up and so import.
COMMANDS: dict[str, Callable[..., None]] = {
    "transfer": _transfer,
    "teach": _teach,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "check": _check,
    "convert": _convert,
    "push": _push,
    "report": _report,
    **BRIDGE_COMMANDS,
    "steer": _steer,
    "demo": _demo,
}
