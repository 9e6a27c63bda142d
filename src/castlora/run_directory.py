"""The output folder of a run: it resumes what was interrupted and shows nothing half-written."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castlora.errors import UserError

STATE_FOLDER = ".castlora"
_REQUEST_FILE = "request.json"
_LAST_FILE = "adapter_config.json"


@dataclass(frozen=True)
class RunDirectory:
    """Where a run keeps its state until it is finished."""

    out: Path

    @property
    def state(self) -> Path:
        """Folder of everything that is not a result."""
        return self.out / STATE_FOLDER

    @property
    def checkpoints(self) -> Path:
        """Folder of the Trainer's checkpoints."""
        return self.state / "checkpoints"

    @property
    def finished(self) -> Path:
        """Folder in which results are put together before they appear in `out`."""
        return self.state / "finished"

    def last_checkpoint(self) -> str | None:
        """The newest checkpoint that was written to its end, if there is one."""
        complete = [path for path in self.checkpoints.glob("checkpoint-*") if _is_complete(path)]
        newest = max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)
        return str(newest) if newest else None

    def discard(self) -> None:
        """Takes back what a run that cannot go on has written, and the folder if nothing else is in it."""
        shutil.rmtree(self.state)
        if not any(self.out.iterdir()):
            self.out.rmdir()

    def publish(self) -> None:
        """Moves the results into `out`, the file that makes an adapter loadable last, and drops the state."""
        for path in sorted(self.finished.iterdir(), key=lambda path: path.name == _LAST_FILE):
            path.replace(self.out / path.name)
        shutil.rmtree(self.state)


def _is_complete(checkpoint: Path) -> bool:
    """Whether the Trainer wrote the file that it writes last, and to its end."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def check_output(out: str, request: dict[str, Any]) -> bool:
    """Whether `out` holds an interrupted run of the same request.

    Raises:
        UserError: `out` holds something else.
    """
    folder = Path(out)
    request_file = folder / STATE_FOLDER / _REQUEST_FILE
    if not folder.exists() or (folder.is_dir() and not request_file.exists() and _holds_no_result(folder)):
        return False
    if not request_file.is_file():
        raise UserError(f"--out {out!r} is not empty; give a new folder, nothing is ever overwritten.")
    if json.loads(request_file.read_text(encoding="utf-8")) != request:
        raise UserError(
            f"--out {out!r} holds an interrupted run with other settings; finish that one or give a new folder."
        )
    return True


def open_run(out: str, request: dict[str, Any], needed_bytes: int) -> RunDirectory:
    """Creates the output folder, or opens the interrupted run in it.

    Raises:
        UserError: the folder cannot be used, or the disk is too full.
    """
    run = RunDirectory(Path(out))
    resuming = check_output(out, request)
    try:
        existing = next(folder for folder in (run.out, *run.out.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        if free < needed_bytes:
            raise UserError(
                f"--out {out!r}: the run needs {needed_bytes >> 20} MiB of disk and {free >> 20} MiB are free; "
                "make room or give a folder on another disk."
            )
        run.state.mkdir(parents=True, exist_ok=True)
        if not resuming:
            write_whole(run.state / _REQUEST_FILE, json.dumps(request, indent=1, sort_keys=True))
    except OSError as error:
        raise UserError(f"--out {out!r} cannot be written ({error.strerror}); give another folder.") from error
    return run


def _holds_no_result(folder: Path) -> bool:
    """Whether a folder is empty, up to a run that was interrupted before it began."""
    return all(path.name == STATE_FOLDER for path in folder.iterdir())


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there in full or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
