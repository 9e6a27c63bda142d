"""The preflight: what a transfer will pair, drop and cost, from configurations and the adapter alone."""

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.utils.import_utils import is_bitsandbytes_available

from castlora.adapters.factors import PORTABLE_RANKS
from castlora.adapters.vocabulary import tokenizer_of
from castlora.alignment.tokens import ByteTokenizer
from castlora.alignment.vocabulary import SharedVocabulary
from castlora.config import DEFAULT, Bits, TextTuning, check_above_zero, check_zero_or_more, resolve_recipe
from castlora.distillation.rehearsal import PASSAGES_PER_REHEARSED
from castlora.distillation.training import check_rehearsal
from castlora.maps.copied_start import STEPS_OF_PLAIN_START, has_shapes_of_source
from castlora.model_pair import HELD_OUT_PASSAGES, Loading
from castlora.models.loading import (
    best_device,
    dtype_on,
    load_tokenizer,
    public_name,
    sharded_bytes,
    skeleton,
    vocabulary_size,
    weight_bytes,
)
from castlora.models.modules import number_of_layers
from castlora.models.pairing import describe
from castlora.plan import Plan, describe_beyond, plan_transfer
from castlora.publishing.licences import describe_licences, read_licences
from castlora.publishing.manifest import command_line, describe_pairing
from castlora.stages import HELD_OUT_REHEARSED, STATISTICS_PASSAGES, passages_to_rehearse
from castlora.teaching.format_search import tokens_to_search

_PROMPT_TOKENS = 48
"""A sentence in a prompt format."""
# What a decoder layer keeps of a token for the way back: counted on Mistral, GPT-2 and GPT-NeoX, rounded up.
_KEPT_BYTES_PER_WIDTH, _KEPT_NUMBERS_PER_NEURON = 40, 5
_UTILISATION = 0.35
"""Share of the measured matrix-product rate that a training step reaches."""


@dataclass(frozen=True)
class Inspection:
    """What a transfer will pair, drop and cost; `str` of it is a text for the terminal."""

    record: dict[str, Any]
    """The same for programs: numbers, names and lists that JSON holds."""
    text: str

    def __str__(self) -> str:
        return self.text


def inspect(
    adapter: str,
    target: str,
    source: str | None = None,
    steps: int = 1000,
    batch_size: int = 16,
    source_bits: Bits | None = None,
    target_bits: Bits | None = None,
    processes: int = 1,
) -> Inspection:
    """Describes a transfer without loading a model.

    Args:
        adapter: folder or hub id of a PEFT LoRA
        target: folder or hub id of the new base model
        source: base model of the adapter, if not the one that its configuration names
        steps: optimizer steps to forecast
        batch_size: passages per step to forecast
        source_bits: 4 or 8, for a source whose layers bitsandbytes is to quantize
        target_bits: the same for the target
        processes: how many are to hold both models together, each a part of their layers (FSDP2)

    Returns:
        a text for the terminal, and the record that it was made from

    Raises:
        UserError: something is missing, damaged or does not fit.

    Example:
        >>> from castlora.demonstration.bundle import SKILL, demo_adapters_path, demo_models_path
        >>> models, adapter = demo_models_path(), demo_adapters_path() / "llama-s" / SKILL
        >>> found = inspect(str(adapter), str(models / "mistral-s"), source=str(models / "llama-s"))
        >>> found.record["source"]["layers"], found.record["target"]["layers"], found.record["dropped"]
        (4, 5, [])
    """
    plan = plan_transfer(adapter, target, source)
    check_above_zero(processes=processes, batch_size=batch_size)
    check_zero_or_more(steps=steps)
    loading = Loading(source_bits=source_bits, target_bits=target_bits, sharded=processes > 1)
    loading.check(plan.adapter.is_plain, processes)
    if loading.sharded:
        check_rehearsal(batch_size, processes)
    of_base = load_tokenizer(plan.source, plan.source_revision)
    source_tokenizer = tokenizer_of(plan.adapter.folder, of_base, plan.source_config)
    source_bytes = ByteTokenizer.from_tokenizer(source_tokenizer)
    target_bytes = ByteTokenizer.from_tokenizer(load_tokenizer(plan.target))
    record: dict[str, Any] = {
        **_bases(plan),
        "adapter": _adapter(plan),
        "tokenizers": _tokenizers(plan, source_bytes, target_bytes),
        "pairing": describe_pairing(plan.pairing),
        "dropped": list(plan.pairing.dropped),
        "unchanged": [pair.target.name for pair in plan.pairing.pairs if not pair.branches],
        "licences": read_licences(plan),
        "forecast": asdict(_forecast(plan, steps, batch_size, loading, processes)),
        "command": _command(adapter, target, source, loading, steps, batch_size, processes),
    }
    sections = [
        _say_verdict(plan),
        _say_bases(record),
        _say_ranks(plan),
        _say_tokenizers(record["tokenizers"]),
        describe(plan.pairing),
        _say_not_carried(plan, record),
        describe_licences(record["licences"]),
        _say_forecast(_Forecast(**record["forecast"])),
        _say_command(record["command"], loading),
    ]
    return Inspection(record, "\n\n".join(sections))


def parameter_count(plan: Plan) -> tuple[int, int]:
    """Parameters of the source and of the target."""
    return skeleton(plan.source_config).num_parameters(), skeleton(plan.target_config).num_parameters()


def _bases(plan: Plan) -> dict[str, dict[str, Any]]:
    bases = (("source", plan.source_config, plan.source), ("target", plan.target_config, plan.target))
    return {
        label: {
            "name": public_name(name),
            "family": config.model_type,
            "layers": config.get_text_config().num_hidden_layers,
            "width": config.get_text_config().hidden_size,
            "parameters": parameters,
        }
        for (label, config, name), parameters in zip(bases, parameter_count(plan), strict=True)
    }


def _say_bases(record: Mapping[str, Any]) -> str:
    lines = ["          family     layers  width  parameters"]
    for label in ("source", "target"):
        base = record[label]
        lines.append(
            f"{label}    {base['family']:<10} {base['layers']:>6} {base['width']:>6}"
            f"  {base['parameters'] / 1e6:>8.2f} M  {base['name']}"
        )
    return "\n".join(lines)


def _adapter(plan: Plan) -> dict[str, Any]:
    return {
        "name": public_name(plan.adapter.name),
        "kind": plan.adapter.kind,
        "ranks": {name: factors.rank for name, factors in plan.factors.items()},
        "beyond_maps": list(plan.beyond),
        "rank_of_folded_maps": plan.exact_rank,
        "rank_of_fresh_start": plan.adapter_rank,
    }


def _say_ranks(plan: Plan) -> str:
    ranks = Counter(factors.rank for factors in plan.factors.values())
    adapted = ", ".join(f"{count} modules of rank {rank}" for rank, count in sorted(ranks.items()))
    accepted = ", ".join(map(str, PORTABLE_RANKS))
    kind = plan.adapter.kind
    cut = "" if plan.adapter.is_plain else f" The update of a {kind} adapter is cut to this rank for the maps' start."
    largest = PORTABLE_RANKS[-1]
    too_large = f" A start that needs more is cut to rank {largest}." if plan.exact_rank > largest else ""
    return (
        f"Adapter {public_name(plan.adapter.name)} ({kind}): {adapted}.{cut} The folded maps need rank "
        f"{plan.exact_rank}, a fresh start {plan.adapter_rank}; the rank that is written is the next one of {accepted}."
        f"{too_large}"
    )


def _tokenizers(plan: Plan, source: ByteTokenizer, target: ByteTokenizer) -> dict[str, Any]:
    shared = SharedVocabulary.of(
        source, target, vocabulary_size(plan.source_config), vocabulary_size(plan.target_config)
    )
    return {
        "same": shared.is_whole,
        "source_tokens": len(source.spellings),
        "target_tokens": len(target.spellings),
        "spelled_alike": len(shared.source_ids),
    }


def _say_tokenizers(tokenizers: Mapping[str, Any]) -> str:
    if tokenizers["same"]:
        return f"Tokenizers: the same, {tokenizers['source_tokens']} tokens."
    count = tokenizers["spelled_alike"]
    return (
        f"Tokenizers differ: {count} tokens are spelled alike, {count / tokenizers['source_tokens']:.0%} of the "
        f"source's and {count / tokenizers['target_tokens']:.0%} of the target's."
    )


def _say_not_carried(plan: Plan, record: Mapping[str, Any]) -> str:
    lines = [
        f"Source modules dropped: {len(record['dropped'])}. Target modules left unchanged: {len(record['unchanged'])}."
    ]
    if plan.beyond:
        lines.append(describe_beyond(plan.beyond))
    return "\n".join(lines)


@dataclass(frozen=True)
class _Forecast:
    """What a transfer needs on this machine."""

    steps: int
    batch_size: int
    seconds: float
    searching_seconds: float
    """Before the first step, where source + LoRA is asked which prompt formats it listens to."""
    candidate_prompts: int
    """Prompts made of general text that source + LoRA reads before the first step."""
    reading_seconds: float
    rehearsed_passages: int
    """What the bare target writes before the first step."""
    writing_seconds: float
    memory_bytes: int
    low_memory_bytes: int | None
    """Of the accelerator, with --low-memory; None where weights of 8 bits rule it out."""
    processes: int
    """How many hold the models together; memory is of each."""
    disk_bytes: int
    """While it runs; what is left afterwards is the adapter."""


def _forecast(plan: Plan, steps: int, batch_size: int, loading: Loading, processes: int) -> _Forecast:
    source_count, target_count = parameter_count(plan)
    # Two operations per weight and token forward, and two more for the student's way back through frozen weights.
    if steps > 0:
        operations = steps * batch_size * DEFAULT.max_length * (2 * source_count + 4 * target_count)
    else:
        # The closed form and the last layer each read their text once.
        operations = 2 * STATISTICS_PASSAGES * DEFAULT.max_length * 2 * (source_count + target_count)
    rehearsed = steps * batch_size // PASSAGES_PER_REHEARSED * DEFAULT.rehearsal_tokens
    # The bare target's predictions are looked up.
    operations += rehearsed * 4 * target_count
    rate = _product_rate()
    memory_bytes, low_memory_bytes = _forecast_memory(plan, math.ceil(batch_size / processes), loading, processes)
    candidates = (DEFAULT.filled_passages + HELD_OUT_PASSAGES) * DEFAULT.candidates
    recipe = resolve_recipe("default", None, steps, batch_size, TextTuning())
    written = passages_to_rehearse(recipe) + HELD_OUT_REHEARSED
    prompts = candidates * _PROMPT_TOKENS + (DEFAULT.filled_passages + HELD_OUT_PASSAGES) * DEFAULT.answer_tokens
    searched = tokens_to_search(DEFAULT.format_candidates, _PROMPT_TOKENS, DEFAULT.answer_tokens)
    return _Forecast(
        steps,
        batch_size,
        seconds=operations / (_UTILISATION * rate),
        searching_seconds=2 * source_count * searched / (_UTILISATION * rate),
        candidate_prompts=candidates,
        reading_seconds=2 * source_count * prompts / (_UTILISATION * rate),
        rehearsed_passages=written,
        writing_seconds=2 * target_count * written * DEFAULT.rehearsal_tokens / (_UTILISATION * rate),
        memory_bytes=memory_bytes,
        low_memory_bytes=low_memory_bytes,
        processes=processes,
        disk_bytes=plan.state_bytes(DEFAULT),
    )


def _forecast_memory(plan: Plan, batch_size: int, loading: Loading, processes: int) -> tuple[int, int | None]:
    """Bytes that a step needs with both models and all activations, and with few and one model, or parts of both.

    Args:
        plan: of the transfer
        batch_size: passages that one process reads
        loading: in what precision
        processes: how many hold the models together
    """
    bytes_per_number = dtype_on(best_device()).itemsize
    if processes > 1:
        configs = plan.source_config, plan.target_config
        of_source, of_target = (sharded_bytes(config, bytes_per_number, processes) for config in configs)
    else:
        of_source = weight_bytes(plan.source_config, bytes_per_number, loading.source_bits)
        of_target = weight_bytes(plan.target_config, bytes_per_number, loading.target_bits)
    scored = bytes_per_number * batch_size * DEFAULT.max_length
    taught, learned = scored * vocabulary_size(plan.source_config), 3 * scored * vocabulary_size(plan.target_config)
    read = batch_size * DEFAULT.max_length + batch_size // PASSAGES_PER_REHEARSED * DEFAULT.rehearsal_tokens
    layers, width = number_of_layers(plan.target_slots), plan.target_config.get_text_config().hidden_size
    neurons = max(slot.d_in for slot in plan.target_slots.values())
    of_layer = read * (_KEPT_BYTES_PER_WIDTH * width + _KEPT_NUMBERS_PER_NEURON * bytes_per_number * neurons)
    inputs = read * layers * width * bytes_per_number
    together = of_source + of_target + taught + learned + layers * of_layer
    if 8 in (loading.source_bits, loading.target_bits):
        return together, None
    learning = of_target + inputs + of_layer + learned
    return together, (of_source + learning if processes > 1 else max(of_source, learning)) + taught


def _say_verdict(plan: Plan) -> str:
    with_partner, modules = len(plan.pairing.mapped), len(plan.pairing.pairs)
    partners = f"{with_partner} of {modules} modules of the target have a partner in the adapter"
    does_it = f"It can be moved: {partners}. The default recipe trains a LoRA that starts from folded closed-form maps"
    if not has_shapes_of_source(plan.pairing, plan.factors):
        return f"{does_it}, or with prompts and {STEPS_OF_PLAIN_START} steps from nothing."
    return (
        f"{does_it}. All shapes are the source's: if the target was trained on from the source, try the adapter as it "
        "is first. With general text castlora starts from it where that is nearer to source + LoRA than the maps."
    )


def _say_forecast(forecast: _Forecast) -> str:
    what = f"{forecast.steps} steps of {forecast.batch_size} passages" if forecast.steps else "the start without a step"
    alone = ""
    if forecast.low_memory_bytes is not None:
        where = "" if forecast.processes > 1 else "on an accelerator "
        alone = f" ({forecast.low_memory_bytes / 2**30:.1f} {where}with --low-memory true)"
    each = f" in each of {forecast.processes} processes that hold the models together" if forecast.processes > 1 else ""
    return (
        f"Forecast for {what} on this machine: about {_duration(forecast.seconds)}, "
        f"{forecast.memory_bytes / 2**30:.1f} GiB of memory beyond Python's own{alone}{each}, "
        f"and {forecast.disk_bytes / 2**30:.2f} GiB of disk while it runs. "
        f"Before, source + LoRA reads {forecast.candidate_prompts} candidate prompts and writes answers: about "
        f"{_duration(forecast.reading_seconds)}, less where --prompts are given; and the target writes "
        f"{forecast.rehearsed_passages} passages to rehearse: about {_duration(forecast.writing_seconds)}. "
        f"Where neither prompts nor their format are given, it is first asked in {DEFAULT.format_candidates} formats: "
        f"about {_duration(forecast.searching_seconds)}."
    )


def _command(
    adapter: str, target: str, source: str | None, loading: Loading, steps: int, batch_size: int, processes: int
) -> str:
    places = {"adapter": adapter, "target": target, "source": source, "out": "NEW-FOLDER", "prompts": "FILE"}
    held = {"source_bits": loading.source_bits, "target_bits": loading.target_bits, "sharded": loading.sharded}
    numbers = {
        "steps": steps if steps != DEFAULT.steps else None,
        "batch_size": batch_size if batch_size != DEFAULT.batch_size else None,
    }
    # It is read where the folders are, and must run there.
    return command_line({**places, **numbers, **held, "tuning": {}}, str, processes)


def _say_command(command: str, loading: Loading) -> str:
    needs_package = (loading.source_bits or loading.target_bits) and not is_bitsandbytes_available()
    missing = "That needs bitsandbytes, which is missing here: pip install 'castlora[quantized]'.\n"
    return (
        f"To move it:\n  {command}\n{missing if needs_package else ''}"
        "FILE holds prompts of the task without answers, one per line; with them most of a skill arrives. Without them "
        "give --prompt-format 'Question: {text}\\nAnswer:', as the adapter was asked in training, and less arrives; "
        "with general text alone castlora looks for such formats itself."
    )


def _product_rate(size: int = 512, repeats: int = 10) -> float:
    """Floating-point operations per second of a matrix product here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.randn(size, size, device=device)
    (matrix @ matrix).sum().item()
    started = time.perf_counter()
    product = matrix
    for _ in range(repeats):
        product = matrix @ matrix
    product.sum().item()
    return 2 * size**3 * repeats / (time.perf_counter() - started)


def _duration(seconds: float) -> str:
    if seconds < 1.5:
        return "a second"
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
