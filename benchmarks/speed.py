"""Takes the times of castlora on this machine and renders them into docs.

python -m benchmarks.speed
"""

import json
from pathlib import Path

from jsonargparse import auto_cli

from benchmarks.quality_report import replace_marked
from castlora.bench.speed.page import tables
from castlora.bench.speed.run import RECORD_FILE
from castlora.cli import main as castlora

TABLES_BEGIN, TABLES_END = "<!-- what was measured -->", "<!-- end of what was measured -->"


def main(
    out: Path = Path("benchmarks/results/speed"), page: Path = Path("docs/speed.md"), only_render: bool = False
) -> None:
    """Runs `castlora bench speed` and puts its tables between the marks of the page.

    Args:
        out: folder of the record
        page: Markdown file with marks
        only_render: whether the record that is there is rendered, and nothing measured
    """
    if not only_render:
        castlora(["bench", "speed", "--out", str(out)])
    record = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))
    marked = replace_marked(page.read_text(encoding="utf-8"), tables(record), TABLES_BEGIN, TABLES_END)
    page.write_text(marked, encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
