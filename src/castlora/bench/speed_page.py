"""Renders the record of `castlora bench speed` into Markdown."""

from collections.abc import Mapping
from itertools import pairwise
from statistics import median
from typing import Any

_INTRODUCTION = """What castlora's own work costs, as a ratio to the work that nothing could do without. Both sides of a
ratio are timed in turns in one process, and the ratio is taken within each turn; its median and its range are shown.
The models are Llama-style with random weights, the text is random: neither changes what a step costs."""


def render_speed(record: Mapping[str, Any]) -> str:
    """The page: ratios, folding, growth and what it was measured with."""
    work = record["workload"]
    shape = work["shape"]
    text = (
        f"Shape `{record['shape']}`: {shape['layers']} layers of width {shape['width']}, vocabulary "
        f"{shape['vocabulary']}; all modules adapted, rank {work['rank']}; passages of {work['tokens']} tokens, of "
        f"which the last {work['answer_tokens']} count; {work['batch_size']} per step, {work['passages']} to fit on."
    )
    made_with = record["environment"]
    footer = (
        f"Seed {record['seed']}; commit {made_with['commit'][:10]}; {made_with['machine']}; "
        f"torch {made_with['versions']['torch']}."
    )
    sections = [
        "# Speed", " ".join(_INTRODUCTION.split()), text, _ratios(record["ratios"]),
        "## Folding an adapter into the target", _folding(record["folding"]),
        "## Growth", "Seconds at each size, and in brackets the factor that the last doubling cost.",
        _growth(record["growth"]), footer,
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def _ratios(ratios: list[Mapping[str, Any]]) -> str:
    rows = ["| | seconds of | to seconds of | ratio | range | target |", "|---|---|---|---|---|---|"]
    for one in ratios:
        span = f"{min(one['ratios']):.2f}–{max(one['ratios']):.2f}, n = {len(one['ratios'])}"
        rows.append(
            f"| {one['measure']} | {one['of']} | {one['to']} | {one['median']:.2f} | {span} | {one['at_most']:.2f} |"
        )
    return "\n".join(rows)


def _folding(folded: list[Mapping[str, Any]]) -> str:
    rows = ["| shape | rank | seconds | maps of one layer |", "|---|---|---|---|"]
    for one in folded:
        size = f"{one['map_bytes_per_layer'] / 2**20:,.0f} MiB"
        rows.append(f"| {one['shape']} | {one['rank']} | {median(one['seconds']):.2g} | {size} |")
    return "\n".join(rows)


def _growth(growths: list[Mapping[str, Any]]) -> str:
    rows = ["| what grows | | | | | |", "|---|---|---|---|---|---|"]
    for one in growths:
        sizes = sorted(one["seconds"].items(), key=lambda item: int(item[0]))
        factors = [None, *(later / earlier for (_, earlier), (_, later) in pairwise(sizes))]
        figures = [
            f"{size}: {seconds:.2g}" + (f" (×{factor:.2f})" if factor else "")
            for (size, seconds), factor in zip(sizes, factors, strict=True)
        ]
        rows.append(f"| {one['size']} | {one['measure']} | " + " | ".join(figures) + " |")
    return "\n".join(rows)
