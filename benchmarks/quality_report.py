"""Renders the results of the quality benchmark into docs, a JSON summary and the table of the README.

python -m benchmarks.quality_report
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli

from castlora.bench.results import DEFAULT_METHOD, PooledCell, References
from castlora.bench.tables import arrow, write_page
from castlora.config import Regime

WITHOUT = "ridge start"
"""The default without rehearsal."""
OVERVIEW: dict[tuple[Regime, str], str] = {
    ("general", DEFAULT_METHOD): "general: default",
    ("general", WITHOUT): "general: no rehearsal",
    ("format", DEFAULT_METHOD): "format: default",
    ("format", WITHOUT): "format: no rehearsal",
    ("prompts", DEFAULT_METHOD): "prompts: default",
    ("prompts", WITHOUT): "prompts: no rehearsal",
    ("prompts", "fresh"): "prompts: fresh, no rehearsal",
}
"""Columns of the README's table."""
TUNED_ON = ("llama-s:mistral-s", "gpt2-s:gpt2-m", "stories260K-hf:llama-s", "llama-s:stories260K-hf")
"""Pairs on which numbers of the default were chosen; on the last two, the limit of the learning rate alone."""
TABLE_BEGINS, TABLE_ENDS = "<!-- lift by pair and skill -->", "<!-- end of the table -->"


def overview(references: References, cells: Sequence[PooledCell]) -> str:
    """The README's table: lift of the default and of what it is compared with on every pair and skill, and means."""
    found = {(cell.pair, cell.skill, cell.regime, cell.method): cell for cell in cells}
    titles = " | ".join(OVERVIEW.values())
    rows = [f"| pair | skill | bare | retrained | {titles} |", "|---" * (4 + len(OVERVIEW)) + "|"]
    for pair, skill in dict.fromkeys((cell.pair, cell.skill) for cell in cells):
        of_pair = [found.get((pair, skill, regime, method)) for regime, method in OVERVIEW]
        if any(of_pair):
            bare, retrained = (references[pair, skill][name]["score"] for name in ("bare target", "retrained"))
            lifts = " | ".join(
                f"{cell.lift.lift:.2f}" if cell is not None and cell.lift.countable else "–" for cell in of_pair
            )
            rows.append(f"| {arrow(pair)} | {skill} | {bare:.3f} | {retrained:.3f} | {lifts} |")
    untouched = [cell for cell in cells if cell.pair not in TUNED_ON]
    return "\n".join([*rows, _means("mean (cells)", cells), _means("on pairs never used for tuning", untouched)])


def _means(title: str, cells: Sequence[PooledCell]) -> str:
    means = [
        [cell.lift.lift for cell in cells if (cell.regime, cell.method) == column and cell.lift.countable]
        for column in OVERVIEW
    ]
    written = " | ".join(f"{np.mean(lifts):.2f} ({len(lifts)})" if lifts else "–" for lifts in means)
    return f"| {title} | | | | {written} |"


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
    readme: Path | None = Path("README.md"),
) -> None:
    """Writes the page, the table in the README and, beside the results, a summary as JSON.

    Args:
        results: folder of the runs
        page: Markdown file to write
        readme: Markdown file with a marked table to replace; null for none
    """
    references, cells = write_page(results, page)
    if readme is not None:
        readme.write_text(replace_marked(readme.read_text(), overview(references, cells)))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
