"""Renders the record of the speed benchmark."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from castlora.bench.speed.models import SHAPES, Shape

_NOTES = {
    "serving": "Tokens per second, so that more is better; a target is met where the quartiles reach it.",
    "fit": (
        "Seconds of the closed-form start. Bare are the forward passes of both models over the same tokens, with their "
        "output heads."
    ),
    "distillation step": (
        "Seconds of a step of the Trainer, with its optimizer and the making of its batch, over those of the bare "
        "passes on the same batch, whose loss is the sum of the same logits. With rehearsal, a step also reads a "
        "passage of the target's own beside every fourth, which the bare passes leave out."
    ),
    "joining sketches": (
        "Seconds until a bridge is written, files included, between the two models of the package over the same text. "
        "A sketch is made once for a model, whatever the others are."
    ),
}


def page(record: dict[str, Any]) -> str:
    """The whole page."""
    return f"# Speed\n\n{tables(record)}\n"


def tables(record: dict[str, Any]) -> str:
    """What was measured and on what: a paragraph, and a table for each measure that was taken."""
    sections = [_introduction(record)]
    for measure, note in _NOTES.items():
        rows = [_ratio_row(ratio) for ratio in record["ratios"] if ratio["measure"] == measure]
        if rows:
            head = ["| | compared | with | ratio [quartiles] | target | seconds, both |", "|---|---|---|---|---|---|"]
            sections += [f"## {measure.capitalize()}", note, "\n".join([*head, *rows])]
    if record["limits"]:
        sections += ["## Limits of the machine", _LIMITS, _limits_table(record["limits"])]
    if record["folding"]:
        sections += ["## Folding", _FOLDING, _folding_table(record["folding"])]
    # Records of before bridges have none.
    if record.get("translating"):
        sections += ["## Over a bridge", _TRANSLATING, _translating_table(record["translating"])]
    if record["growth"]:
        sections += ["## Growth", _GROWTH, _growth_table(record["growth"])]
    return "\n\n".join([*sections, "## Environment", _environment(record["environment"])])


_LIMITS = (
    "Operations are those of the linear modules in the passes through the models, and nothing else; the limit is the "
    "rate of a large matrix product in the dtype of the models, taken in the same run. Answered prompts."
)
_FOLDING = (
    "Elapsed seconds for all modules on a processor, module by module; memory is what the process had at its highest, "
    "beyond its idle state. The adapter and the maps of the module that is being folded are in it."
)
_TRANSLATING = (
    "Elapsed seconds from opening the bridge to the written adapter, files included; memory is what the process had at "
    "its highest beyond its idle state, pages of the files included. It may be twice the written adapter and the maps "
    "of one layer."
)
_GROWTH = (
    "Medians, while one number doubles and all others stay (2 layers of width 32, rank 8, answered prompts). A factor "
    "of 2 per doubling is linear."
)


def _introduction(record: dict[str, Any]) -> str:
    settings = record["settings"]
    shape = SHAPES[settings["shape"]]
    return (
        f"Models with random weights: {_described(shape.source)} → {_described(shape.target)}; an adapter of rank "
        f"{settings['rank']} on all linear modules; unlike tokenizers. Passages have {settings['length']} tokens, of "
        "which all count (running text) or the last eighth (answered prompts). Steps and requests have "
        f"{settings['batch_size']} of them, fits {settings['passages']}. Each ratio is the median of "
        f"{settings['repeats']} or more repetitions in which both sides took turns. Seed {settings['seed']}; "
        f"{settings['threads']} thread(s); {record['environment']['seconds']}."
    )


def _described(shape: Shape) -> str:
    return (
        f"{shape.model_type} ({shape.layers} layers of width {shape.width}, {shape.neurons} neurons, "
        f"{shape.vocabulary} tokens)"
    )


def _ratio_row(ratio: dict[str, Any]) -> str:
    own, other = ratio["sides"]
    low, high = ratio["quartiles"]
    value = f"{ratio['ratio']:.2f} [{low:.2f}, {high:.2f}]"
    seconds = f"{own['median_seconds']:.3g}, {other['median_seconds']:.3g}"
    return f"| {ratio['name']} | {own['name']} | {other['name']} | {value} | {_target(ratio)} | {seconds} |"


def _target(ratio: dict[str, Any]) -> str:
    if ratio["target"] is None:
        return "–"
    bound = "≥" if ratio["unit"] == "tokens per second" else "≤"
    return f"{bound} {ratio['target']:.2f}: {_verdict(ratio['is_met'])}"


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "missed"


def _limits_table(uses: Sequence[dict[str, Any]]) -> str:
    rows = [
        "| work | seconds | tokens per second | teraflops | of the limit | memory (GiB) |",
        "|---|---|---|---|---|---|",
    ]
    for one in uses:
        seconds = float(np.median(one["seconds"]))
        memory = "–" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**30:.1f}"
        rows.append(
            f"| {one['work']} | {seconds:.3g} | {one['tokens_per_second']:.0f} | "
            f"{one['operations'] / seconds / 1e12:.3g} | {one['share_of_limit']:.0%} | {memory} |"
        )
    return "\n".join(rows)


def _folding_table(foldings: Sequence[dict[str, Any]]) -> str:
    rows = ["| target model | modules | rank | seconds | target | memory (MiB) |", "|---|---|---|---|---|---|"]
    for one in foldings:
        target = SHAPES[one["shape"]].target
        mebibytes = (one["peak_bytes"] - one["idle_bytes"]) / 2**20
        memory = f"{mebibytes:.0f}" if mebibytes >= 1 else "under 1"
        rows.append(
            f"| {one['shape']}: {target.layers} layers of width {target.width} | {one['modules']} | {one['rank']} | "
            f"{np.median(one['seconds']):.2g} | ≤ {one['target']:g}: {_verdict(one['is_met'])} | {memory} |"
        )
    return "\n".join(rows)


def _translating_table(translations: Sequence[dict[str, Any]]) -> str:
    rows = [
        "| target model | modules | rank | maps (MiB) | seconds | target | memory (MiB) | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in translations:
        target = SHAPES[one["shape"]].target
        maps, memory, allowed = (
            f"{size / 2**20:.0f}"
            for size in (one["maps_bytes"], one["peak_bytes"] - one["idle_bytes"], one["allowed_bytes"])
        )
        roles = ", ".join(one["roles"] or ["all"])
        seconds = f"{np.median(one['seconds']):.2g} | ≤ {one['target']:g}: {_verdict(one['is_in_time'])}"
        needed = f"{memory} | ≤ {allowed}: {_verdict(one['is_in_memory'])}"
        size = f"{one['shape']}: {target.layers} layers of width {target.width}"
        rows.append(f"| {size} | {roles} | {one['rank']} | {maps} | {seconds} | {needed} |")
    return "\n".join(rows)


def _growth_table(growths: Sequence[dict[str, Any]]) -> str:
    rows = [
        "| seconds of | while doubles | from, to | seconds | factor per doubling | beside its passes |",
        "|---|---|---|---|---|---|",
    ]
    for one in growths:
        seconds = ", ".join(f"{value:.3g}" for value in one["seconds"])
        factors = ", ".join(f"{value:.2f}" for value in one["per_doubling"])
        beside = ", ".join(f"{value:.2f}" for value in one["beside_passes"] or ()) or "–"
        ends = f"{one['sizes'][0]}, {one['sizes'][-1]}"
        rows.append(f"| a {one['of']} | {one['against']} | {ends} | {seconds} | {factors} | {beside} |")
    return "\n".join(rows)


def _environment(environment: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"Commit {environment['commit'][:10]}; {environment['machine']}; device {environment['device']}; Python "
        f"{environment['python']}; {packages}."
    )
