"""Puts the help of every command into the page of the command line's reference, when the site is built."""

import os
from contextlib import redirect_stdout, suppress
from io import StringIO
from typing import Any

from castlora.bench.commands import BENCHMARKS
from castlora.cli import parser
from castlora.commands import COMMANDS

PAGE = "cli.md"
_COLUMNS = "100"


def on_page_markdown(markdown: str, page: Any, **_context: Any) -> str:
    """Called by mkdocs with each page."""
    return f"{markdown}\n{reference()}" if page.file.src_uri == PAGE else markdown


def reference() -> str:
    """A section with the help of each command, as `castlora COMMAND --help` prints it."""
    commands = [*((name,) for name in COMMANDS), *(("bench", name) for name in BENCHMARKS)]
    return "\n\n".join(f"## castlora {' '.join(words)}\n\n```text\n{help_of(words)}\n```" for words in commands)


def help_of(words: tuple[str, ...]) -> str:
    """What `--help` after these words prints."""
    os.environ["COLUMNS"] = _COLUMNS
    printed = StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        parser().parse_args([*words, "--help"])
    return printed.getvalue().strip()
