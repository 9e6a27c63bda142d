"""Renders the results of the quality benchmark into docs, a JSON summary and a table of means in the README.

python -m benchmarks.quality_report
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli

from benchmarks.retrained import Learned, lifts_by_seed, pooled, read_records
from castlora.bench.lengths import Lengths, steps_section
from castlora.bench.results import DEFAULT_METHOD, MeanLift, PooledCell, References, mean_lifts
from castlora.bench.tables import REGIME_TITLES, arrow, mean_with_interval, write_page
from castlora.config import REGIMES, Regime

WITHOUT, FRESH = "ridge start", "fresh"
"""The default without rehearsal, with little known about the task and with prompts."""
FROM_MAPS = "ridge start, rehearsed"
OVERVIEW: dict[tuple[Regime, str], str] = {
    ("general", DEFAULT_METHOD): "general: default",
    ("general", WITHOUT): "general: no rehearsal",
    ("format", DEFAULT_METHOD): "format: default",
    ("format", WITHOUT): "format: no rehearsal",
    ("prompts", DEFAULT_METHOD): "prompts: default",
    ("prompts", FRESH): "prompts: no rehearsal",
    ("prompts", FROM_MAPS): "prompts: closed-form start",
}
"""Columns of the table by pair and skill."""
COMPARED = {
    DEFAULT_METHOD: "**castlora**",
    FROM_MAPS: "closed-form start with prompts too",
    WITHOUT: "closed-form start, no rehearsal",
    FRESH: "a fresh LoRA, no rehearsal",
    "paper start": "random maps, no rehearsal",
    "paper": "the paper's recipe",
    "closed form, last layer solved, rehearsed": "untrained (`--steps 0`)",
    "closed form, last layer solved": "untrained, no rehearsal",
    "closed form": "closed form, untrained",
    "Cross-LoRA": "Cross-LoRA, which reads weights alone",
}
"""Rows of the README's table: methods of the benchmark, and what they are called there."""
TUNED_ON = ("llama-s:mistral-s", "gpt2-s:gpt2-m", "stories260K-hf:llama-s", "llama-s:stories260K-hf")
"""Pairs on which numbers of the default were chosen; on the last two, the limit of the learning rate alone."""
TABLE_BEGINS, TABLE_ENDS = "<!-- lift -->", "<!-- end of the table -->"


def overview(references: References, cells: Sequence[PooledCell]) -> str:
    """Lift of the default and of what it is compared with on every pair and skill, and means."""
    found = {(cell.pair, cell.skill, cell.regime, cell.method): cell for cell in cells}
    titles = " | ".join(OVERVIEW.values())
    rows = [f"| pair | skill | bare | retrained | {titles} |", "|---" * (4 + len(OVERVIEW)) + "|"]
    for pair, skill in dict.fromkeys((cell.pair, cell.skill) for cell in cells):
        of_pair = [found.get((pair, skill, regime, method)) for regime, method in OVERVIEW]
        if any(of_pair):
            bare, retrained = (references[pair, skill][name]["score"] for name in ("bare target", "retrained"))
            lifts = " | ".join(
                f"{cell.lift.lift:z.2f}" if cell is not None and cell.lift.countable else "–" for cell in of_pair
            )
            rows.append(f"| {arrow(pair)} | {skill} | {bare:.3f} | {retrained:.3f} | {lifts} |")
    untouched = [cell for cell in cells if cell.pair not in TUNED_ON]
    return "\n".join([*rows, _means("mean (cells)", cells), _means("on pairs never used for tuning", untouched)])


def _means(title: str, cells: Sequence[PooledCell]) -> str:
    means = [
        [cell.lift.lift for cell in cells if (cell.regime, cell.method) == column and cell.lift.countable]
        for column in OVERVIEW
    ]
    written = " | ".join(f"{np.mean(lifts):z.2f} ({len(lifts)})" if lifts else "–" for lifts in means)
    return f"| {title} | | | | {written} |"


def comparison(cells: Sequence[PooledCell], retrained: Mapping[int, Mapping[Learned, float]]) -> str:
    """The README's table: mean lifts by what is known about the task, of the default and of others.

    Args:
        cells: of the benchmark
        retrained: lifts of retrained adapters of other seeds, by seed
    """
    regimes = [regime for regime in REGIMES if regime != "none"]
    rows = [f"| | {' | '.join(REGIME_TITLES[regime] for regime in regimes)} |", "|---" * (1 + len(regimes)) + "|"]
    untouched = [cell for cell in cells if cell.pair not in TUNED_ON]
    last = {DEFAULT_METHOD: f"{COMPARED[DEFAULT_METHOD]} on pairs never used for tuning"}
    for titles, counted in ((COMPARED, cells), (last, untouched)):
        found = {(mean.method, mean.regime): mean for mean in mean_lifts(counted)}
        for method, title in titles.items():
            # What reads no text is the same whatever is known.
            means = [found.get((method, regime), found.get((method, "none"))) for regime in regimes]
            if any(means):
                rows.append(f"| {title} | {' | '.join(_mean(mean, counted) for mean in means)} |")
    if retrained:
        lifts = pooled(retrained)
        again = f"{mean_with_interval(lifts)} · {len(lifts)} · {len(retrained)}"
        rows.append(f"| retrained with the labels, other seeds | {' | '.join([again] * len(regimes))} |")
    return "\n".join(rows)


def _mean(mean: MeanLift | None, cells: Sequence[PooledCell]) -> str:
    """A mean lift with its interval, and how many cells and seeds it is of."""
    if mean is None:
        return "–"
    seeds = sorted({cell.seeds for cell in cells if (cell.regime, cell.method) == (mean.regime, mean.method)})
    low, high = mean.ci95
    of_cells = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"{mean.lift:z.2f} [{low:z.2f}, {high:z.2f}] · {mean.cells} · {of_cells}"


def replace_marked(page: str, table: str, begins: str = TABLE_BEGINS, ends: str = TABLE_ENDS) -> str:
    """The page with the table between its two marks.

    Raises:
        ValueError: the page has no marks.
    """
    before, mark, rest = page.partition(begins)
    _, end, after = rest.partition(ends)
    if not mark or not end:
        raise ValueError(f"The page has no table between {begins} and {ends}.")
    return f"{before}{mark}\n{table}\n{end}{after}"


def main(
    results: Path = Path("benchmarks/results/quality"),
    page: Path = Path("docs/results.md"),
    findings: Path | None = Path("docs/findings.md"),
    readme: Path | None = Path("README.md"),
    retrained: Path = Path("benchmarks/results/retrained"),
    steps: Path | None = Path("benchmarks/results/steps"),
) -> None:
    """Writes the page, tables in two other pages and, beside the results, a summary as JSON.

    Args:
        results: folder of the runs
        page: Markdown file to write
        findings: Markdown file with a marked table to replace, of lifts by pair and skill; null for none
        readme: the same, of mean lifts; null for none
        retrained: folder of what `python -m benchmarks.retrained` found, for the latter
        steps: folder of what `python -m benchmarks.steps` found; null for none
    """
    section = ("", {}) if steps is None else steps_section(Lengths.read(steps), page.stem)
    references, cells = write_page(results, page, section)
    again = lifts_by_seed(references, read_records(retrained))
    for path, table in ((findings, overview(references, cells)), (readme, comparison(cells, again))):
        if path is not None:
            path.write_text(replace_marked(path.read_text(), table))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
