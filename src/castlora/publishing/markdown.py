"""Markdown of cards, into which text comes that may be hostile."""

import json
import re
from collections.abc import Sequence

from castlora.report.formatting import MISSING, printable

LONGEST_NAME = 200


def python_string(text: str) -> str:
    """Writes text as a string of Python."""
    return json.dumps(printable(text), ensure_ascii=False)


def code(text: str) -> str:
    """Writes text as a Markdown code span, the one place where neither Markdown nor HTML means anything."""
    line = " ".join(printable(text).split())[:LONGEST_NAME]
    if not line:
        return MISSING
    fence = "`" * (_longest_run_of_backticks(line) + 1)
    padding = " " if "`" in line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def fenced(language: str, text: str) -> str:
    """Writes text as a code block that nothing in it ends."""
    lines = printable(text).strip("\n")
    fence = "`" * max(3, _longest_run_of_backticks(lines) + 1)
    return f"{fence}{language}\n{lines}\n{fence}"


def _longest_run_of_backticks(text: str) -> int:
    return max(map(len, re.findall(r"`+", text)), default=0)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes rows of Markdown as a table; the dividing line means nothing inside a cell."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "¦") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
