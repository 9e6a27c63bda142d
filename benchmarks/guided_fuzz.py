"""Searches for inputs that break a reader, led by which lines of castlora they reach.

    python -m benchmarks.guided_fuzz -max_total_time=600

Runs on Linux, where atheris does, with the options of libFuzzer. Each input replaces one file of an intact input of
`benchmarks.fuzz`; the search ends at the first failure, with the input in a file, and otherwise with the number of
inputs tried.
"""

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["castlora"]):
    from benchmarks.fuzz import TARGETS, Target
    from castlora.errors import UserError

_SECONDS = 10
PLACES = [(target, name) for target in TARGETS.values() for name in target.mutated]
"""What a first byte stands for: a reader, and the file of its input that is replaced."""


def write_seeds(folder: Path) -> None:
    """Intact files, from which the search starts."""
    for number, (target, name) in enumerate(PLACES):
        with tempfile.TemporaryDirectory() as temporary:
            target.files(Path(temporary))
            (folder / str(number)).write_bytes(bytes([number]) + (Path(temporary) / name).read_bytes())


def read(target: Target, name: str, content: bytes) -> None:
    """Has an input read whose file `name` holds `content`; any exception but a refusal is a failure."""
    with tempfile.TemporaryDirectory() as temporary:
        target.files(Path(temporary))
        (Path(temporary) / name).write_bytes(content)
        try:
            target.read(Path(temporary))
        except UserError as error:
            if not str(error).isprintable():
                raise AssertionError(f"refused in what is no line of text: {str(error)!r}") from error


def try_bytes(data: bytes) -> None:
    """One input of the search."""
    if data:
        read(*PLACES[data[0] % len(PLACES)], data[1:])


def main() -> None:
    """Searches until libFuzzer's limits."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        write_seeds(Path(temporary))
        atheris.Setup([*sys.argv, f"-timeout={_SECONDS}", "-max_len=1000000", temporary], try_bytes)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
