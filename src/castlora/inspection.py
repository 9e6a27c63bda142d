"""The preflight: what a transfer will pair, drop and cost, from configurations and the adapter alone."""

import time
from collections import Counter

import torch

from castlora.adapters import PORTABLE_RANKS
from castlora.config import DEFAULT
from castlora.manifest import command_line
from castlora.models import load_tokenizer, public_name, skeleton
from castlora.pairing import describe
from castlora.plan import Plan, describe_beyond, plan_transfer
from castlora.stages import HELD_OUT_PASSAGES
from castlora.tokens import ByteTokenizer
from castlora.vocabulary import SharedVocabulary

_BYTES_PER_WEIGHT = 4
_PROMPT_TOKENS = 48
"""A sentence in a prompt format."""
_UTILISATION = 0.35
"""Share of the measured matrix-product rate that a training step reaches."""


def inspect(adapter: str, target: str, source: str | None = None, steps: int = 1000, batch_size: int = 16) -> str:
    """Describes a transfer without loading a model.

    Args:
        adapter: folder or hub id of a PEFT LoRA
        target: folder or hub id of the new base model
        source: base model of the adapter, if not the one that its configuration names
        steps: optimizer steps to forecast
        batch_size: passages per step to forecast

    Returns:
        a text for the terminal

    Raises:
        UserError: something is missing, damaged or does not fit.
    """
    plan = plan_transfer(adapter, target, source)
    source_bytes = ByteTokenizer.from_tokenizer(load_tokenizer(plan.source, plan.source_revision))
    target_bytes = ByteTokenizer.from_tokenizer(load_tokenizer(plan.target))
    sections = [
        _bases(plan),
        _ranks(plan),
        _vocabularies(plan, source_bytes, target_bytes),
        describe(plan.pairing),
        _not_carried(plan),
        _forecast(plan, steps, batch_size),
        _advice(adapter, target, source),
    ]
    return "\n\n".join(sections)


def parameter_count(plan: Plan) -> tuple[int, int]:
    """Parameters of the source and of the target."""
    return skeleton(plan.source_config).num_parameters(), skeleton(plan.target_config).num_parameters()


def _bases(plan: Plan) -> str:
    lines = ["          family     layers  width  parameters"]
    counts = parameter_count(plan)
    bases = (("source", plan.source_config, plan.source), ("target", plan.target_config, plan.target))
    for (label, config, name), count in zip(bases, counts, strict=True):
        lines.append(
            f"{label}    {config.model_type:<10} {config.num_hidden_layers:>6} {config.hidden_size:>6}"
            f"  {count / 1e6:>8.2f} M  {public_name(name)}"
        )
    return "\n".join(lines)


def _ranks(plan: Plan) -> str:
    ranks = Counter(factors.rank for factors in plan.factors.values())
    adapted = ", ".join(f"{count} modules of rank {rank}" for rank, count in sorted(ranks.items()))
    accepted = ", ".join(map(str, PORTABLE_RANKS))
    kind = plan.adapter.kind
    cut = "" if plan.adapter.is_plain else f" The update of a {kind} adapter is cut to this rank for the maps' start."
    return (
        f"Adapter {public_name(plan.adapter.name)} ({kind}): {adapted}.{cut} The folded maps need rank "
        f"{plan.exact_rank}, a fresh start {plan.adapter_rank}; the rank that is written is the next one of {accepted}."
    )


def _vocabularies(plan: Plan, source: ByteTokenizer, target: ByteTokenizer) -> str:
    shared = SharedVocabulary.of(source, target, plan.source_config.vocab_size, plan.target_config.vocab_size)
    if shared.is_whole:
        return f"Tokenizers: the same, {len(source.spellings)} tokens."
    count = len(shared.source_ids)
    return (
        f"Tokenizers differ: {count} tokens are spelled alike, {count / len(source.spellings):.0%} of the source's and "
        f"{count / len(target.spellings):.0%} of the target's."
    )


def _not_carried(plan: Plan) -> str:
    without = [pair.target.name for pair in plan.pairing.pairs if not pair.branches]
    dropped = ", ".join(plan.pairing.dropped) or "nothing"
    lines = [f"Source modules dropped: {dropped}. Target modules left unchanged: {len(without)}."]
    if plan.beyond:
        lines.append(describe_beyond(plan.beyond))
    return "\n".join(lines)


def _forecast(plan: Plan, steps: int, batch_size: int) -> str:
    source_count, target_count = parameter_count(plan)
    tokens = steps * batch_size * DEFAULT.max_length
    # Two operations per weight and token forward, and two more for the student's way back through frozen weights.
    operations = tokens * (2 * source_count + 4 * target_count)
    rate = _product_rate()
    seconds = operations / (_UTILISATION * rate)
    candidates = (DEFAULT.filled_passages + HELD_OUT_PASSAGES) * DEFAULT.candidates
    read = candidates * _PROMPT_TOKENS + (DEFAULT.filled_passages + HELD_OUT_PASSAGES) * DEFAULT.answer_tokens
    reading_seconds = 2 * source_count * read / (_UTILISATION * rate)
    memory = (source_count + target_count) * _BYTES_PER_WEIGHT + 4 * batch_size * DEFAULT.max_length * (
        plan.source_config.vocab_size + 3 * plan.target_config.vocab_size
    )
    return (
        f"Forecast for {steps} steps of {batch_size} passages on this machine: about {_duration(seconds)} and "
        f"{memory / 2**30:.1f} GiB of memory beyond Python's own. Before them, source + LoRA reads {candidates} "
        f"candidate prompts and writes answers: about {_duration(reading_seconds)}, less where --prompts are given."
    )


def _advice(adapter: str, target: str, source: str | None) -> str:
    places = {"adapter": adapter, "target": target, "source": source, "out": "NEW-FOLDER", "prompts": "FILE"}
    return (
        f"To move it:\n  {command_line({**places, 'tuning': {}})}\n"
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
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
