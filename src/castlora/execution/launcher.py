"""What torchrun or `accelerate launch` says to each process that it starts, read from the environment."""

import os
import time

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_TURN = 5.0
"""Seconds; a launcher looks every tenth of a second whether a process has ended."""


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return "LOCAL_RANK" in os.environ


def process_count() -> int:
    """How many processes the launcher started on all machines; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_process_count() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return int(os.environ.get("RANK", 0)) == 0


def environment_of_its_own() -> dict[str, str]:
    """The environment for a process that is to work alone."""
    return {name: value for name, value in os.environ.items() if name not in _VARIABLES}


def wait_for_turn(found_bad_input: bool) -> None:
    """Lets another process say first why all of them end; the launcher then ends this one before it speaks.

    Bad input that all processes find is the main process's to tell. What else a process fails with is often only that
    another one is gone.
    """
    if process_count() > 1 and not (found_bad_input and is_main()):
        time.sleep(_TURN if found_bad_input else 2 * _TURN)
