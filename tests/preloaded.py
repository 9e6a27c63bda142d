"""Starts processes that find the libraries imported, which takes longer than what most tests do in a process."""

import json
import multiprocessing
import os
import subprocess
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

from torch.distributed import TCPStore

from castlora.cli import main
from castlora.evaluation import verification

_FROM_SERVER = multiprocessing.get_context("forkserver")
_FROM_SERVER.set_forkserver_preload([
    "castlora.pipeline", "castlora.bench.commands", "castlora.evaluation.verification",
])  # fmt: skip


def _check(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
    *_, arguments, reference = command
    difference = verification._relative_difference(**json.loads(arguments), reference=Path(reference))
    return subprocess.CompletedProcess(command, 0, json.dumps({"relative_difference": difference}), "")


CHECKED_HERE = SimpleNamespace(run=_check)
"""In the place of `subprocess`: the process that checks a written adapter has to import everything anew."""


class Started:
    """A process and the files that hold what it says."""

    meeting_place: TCPStore | None = None
    """Of several that were launched together; it is there as long as something holds it."""

    def __init__(self, folder: Path, call: Callable[..., None], *arguments: object, **environment: object) -> None:
        """Starts it.

        Args:
            folder: for the files, made by this
            call: a function of a module
            arguments: it is called with
            environment: variables that are added
        """
        folder.mkdir(parents=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        settings = {name: str(value) for name, value in environment.items()}
        self.process: BaseProcess = _FROM_SERVER.Process(
            target=_run, args=(self._out, self._err, settings, call, arguments), daemon=True
        )
        self.process.start()

    @property
    def exit_code(self) -> int:
        """Waits for the end; a signal's is negative."""
        self.process.join()
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()


def run_castlora(*words: object) -> None:
    """`castlora WORD...`, which checks in this process what it wrote."""
    verification.subprocess = CHECKED_HERE
    main(list(map(str, words)))


def launched(folder: Path, count: int, call: Callable[..., None], *arguments: object) -> list[Started]:
    """Processes that are told of each other as torchrun tells those that it starts; none is ended for another."""
    meeting_place = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    together = {"MASTER_ADDR": "localhost", "MASTER_PORT": meeting_place.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    together |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    started = [
        Started(folder / str(rank), call, *arguments, **together, RANK=rank, LOCAL_RANK=rank) for rank in range(count)
    ]
    for one in started:
        one.meeting_place = meeting_place
    return started


def finish(started: list[Started]) -> None:
    """Waits until all have ended well; the others of one that failed would wait for it."""
    running = {one.process.sentinel: one for one in started}
    while running:
        ended = running.pop(wait(running)[0])
        if ended.exit_code != 0:
            for other in running.values():
                other.process.kill()
        assert ended.exit_code == 0, ended.stderr


def _run(
    out: Path, err: Path, settings: dict[str, str], call: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    os.environ.update(settings)
    for path, descriptor in ((out, 1), (err, 2)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    call(*arguments)
