"""Runs the demo and keeps its figures: python -m benchmarks.demo."""

import json
import tempfile
from pathlib import Path

from jsonargparse import auto_cli

from castlora.bench.grid import environment
from castlora.demonstration.story import demonstrate


def main(out: Path = Path("benchmarks/results/demo.json"), seed: int = 0) -> None:
    """Writes the figures of the demo with the commit and the machine.

    Args:
        out: file to write
        seed: of everything random
    """
    with tempfile.TemporaryDirectory() as folder:
        record = demonstrate(folder, seed).record
    out.write_text(json.dumps({**record, "environment": environment()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
