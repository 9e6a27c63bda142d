"""The output folder of a run: it resumes what was interrupted and shows nothing half-written."""

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from castlora.errors import ResumableError, UserError

STATE_FOLDER = ".castlora"
_REQUEST_FILE = "request.json"
_SEAL_FILE = "sealed.json"
_LOCK_FILE = "lock"
_INPUTS_FILE = "inputs.json"
_FINGERPRINT_BYTES = 64 << 20
_LAST_FILE = "adapter_config.json"
_LAST_FILES = (_LAST_FILE, "bridge.json", "statistics.json", "sketch.json")
"""Without it nothing takes a folder for what it is to be."""
_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
_DERIVED = ("resolved_recipe", "castlora_version")
_NEXT_TO_NOTHING = 1 << 20
"""Bytes."""


@dataclass(frozen=True)
class RunDirectory:
    """Where a run keeps its state until it is finished."""

    out: Path

    @property
    def state(self) -> Path:
        """Folder of everything that is not a result."""
        return self.out / STATE_FOLDER

    @property
    def parts(self) -> Path:
        """Folder of what the stage that is under way has computed so far."""
        return self.state / "parts"

    @property
    def checkpoints(self) -> Path:
        """Folder of the Trainer's checkpoints."""
        return self.state / "checkpoints"

    @property
    def reading(self) -> Path:
        """Folder of the text that the run reads."""
        return self.state / "reading"

    @property
    def finished(self) -> Path:
        """Folder in which results are put together before they appear in `out`."""
        return self.state / "finished"

    def last_checkpoint(self) -> str | None:
        """The newest checkpoint that was written to its end and is as it was then, if there is one."""
        whole = [path for path in self.checkpoints.glob("checkpoint-*") if is_sealed(path)]
        newest = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
        return str(newest) if newest else None

    def drop_what_is_not_whole(self) -> None:
        """Removes what an interrupted run was still writing, and what has been damaged since; it is made again."""
        kept = [self.reading, *self.checkpoints.glob("*")]
        for folder in (self.finished, *(path for path in kept if not is_sealed(path))):
            shutil.rmtree(folder, ignore_errors=True)

    def discard(self) -> None:
        """Takes back what a run that cannot go on has written, and the folder if nothing else is in it."""
        shutil.rmtree(self.state)
        if not any(self.out.iterdir()):
            self.out.rmdir()

    def publish(self) -> None:
        """Moves the results into `out`, the file that makes them loadable last, and drops the state."""
        for path in sorted(self.finished.iterdir(), key=lambda path: path.name in _LAST_FILES):
            # Whoever was killed here before has left folders, which nothing replaces.
            if (self.out / path.name).is_dir():
                shutil.rmtree(self.out / path.name)
            path.replace(self.out / path.name)
        # Whoever is killed here can still say which run it was, and finish it again.
        for path in self.state.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        shutil.rmtree(self.state)


def hold_to_inputs(state: Path, inputs: Mapping[str, str]) -> None:
    """Notes what a run reads; one that goes on must read the same, for what it has kept is of that.

    Args:
        state: folder of the run's state
        inputs: option → digest of what it names

    Raises:
        ResumableError: one of them is another now, or the note is damaged.
    """
    noted = state / _INPUTS_FILE
    if not noted.exists():
        write_whole(noted, json.dumps(inputs))
    try:
        before = dict(json.loads(noted.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ResumableError(f"{str(noted)!r} is damaged; give another --out.") from error
    for option, digest in inputs.items():
        if before.get(option) != digest:
            raise ResumableError(
                f"{option} is not what it was when the run that this would continue began; give it as it was, or "
                "another --out."
            )


def fingerprint(*paths: Path) -> str:
    """What tells files from others of their names: a digest of the size and the first 64 MiB of each that is there."""
    digest = hashlib.sha256()
    for path in filter(Path.is_file, paths):
        with path.open("rb") as file:
            digest.update(b"%d " % path.stat().st_size + file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Notes what a folder holds once it is whole, so that what is lost or changed afterwards is noticed."""
    write_whole(folder / _SEAL_FILE, json.dumps(_digests(folder)))


def is_sealed(folder: Path) -> bool:
    """Whether a folder holds what it held when it was sealed."""
    try:
        noted = json.loads((folder / _SEAL_FILE).read_text(encoding="utf-8"))
        return bool(noted == _digests(folder))
    except (OSError, ValueError, RecursionError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(path for path in folder.iterdir() if path.name != _SEAL_FILE):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


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
        state = "is not empty" if folder.is_dir() else "is a file"
        raise UserError(f"--out {out!r} {state}; give a new folder, nothing is ever overwritten.")
    _check_request(f"--out {out!r} holds", "folder", request_file, request)
    return True


def check_output_file(out: str, request: dict[str, Any]) -> bool:
    """Whether an interrupted run of the same request has begun to make the file `out`.

    Raises:
        UserError: the file is there or cannot be, or another run has begun to make it.
    """
    request_file = file_state(Path(out)) / _REQUEST_FILE
    check_folder_of(out)
    if not request_file.is_file():
        check_absent(out)
        return False
    _check_request(f"--out {out!r} is the file of", "file", request_file, request)
    return True


def is_finished(folder: Path) -> bool:
    """Whether a folder holds the result of a run, and nothing of its state any more."""
    return (folder / _LAST_FILE).exists() and not (folder / STATE_FOLDER).exists()


def check_finished(folder: Path) -> None:
    """Raises a UserError if a folder holds a run that was begun and has no result yet."""
    if (folder / STATE_FOLDER).is_dir() and not (folder / _LAST_FILE).exists():
        raise UserError(f"The run in {str(folder)!r} is not finished; call the command that began it again.")


def file_state(out: Path) -> Path:
    """Folder beside a file that is being made, of everything that is not the result."""
    return out.with_name(f"{STATE_FOLDER}-{out.name}")


def _check_request(holds: str, place: str, request_file: Path, request: dict[str, Any]) -> None:
    try:
        interrupted = dict(json.loads(request_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{holds} an interrupted run whose {_REQUEST_FILE} is damaged; give a new {place}.") from error
    if interrupted != request:
        raise UserError(
            f"{holds} an interrupted run with other settings ({_differing(interrupted, request)}); finish that one or "
            f"give a new {place}."
        )


def _differing(interrupted: dict[str, Any], request: dict[str, Any]) -> str:
    """Names of the settings that differ; those that follow from others only where there are no others."""
    names = [name for name, value in request.items() if name not in interrupted or interrupted[name] != value]
    given = [name for name in names if name not in _DERIVED] or names or sorted(interrupted.keys() - request.keys())
    return ", ".join(name.replace("_", " ") for name in given)


@contextmanager
def open_run(out: str, request: dict[str, Any], needed_bytes: int) -> Iterator[RunDirectory]:
    """Creates the output folder, or opens the interrupted run in it; while it is open no other process can.

    Raises:
        UserError: the folder cannot be used, another process uses it, or the disk is or becomes too full.
    """
    run = RunDirectory(Path(out))
    check_output(out, request)
    free = _free_bytes(run.out)
    if free < needed_bytes:
        raise UserError(
            f"--out {out!r}: the run needs {needed_bytes >> 20} MiB of disk and {free >> 20} MiB are free; "
            "make room or give a folder on another disk."
        )
    with _open_state(run.state, out, "folder", request, check_output):
        run.drop_what_is_not_whole()
        yield run


@contextmanager
def open_file_run(out: str, request: dict[str, Any]) -> Iterator[Path]:
    """The folder of the state of a run that makes one file, new or from an interrupted run.

    What is written there under the name of the file becomes the file, and the folder goes, when all is done, or when
    bad input has ended the run.

    Raises:
        UserError: the file cannot be made, another process makes it, or the disk becomes too full.
    """
    path, state = Path(out), file_state(Path(out))
    check_output_file(out, request)
    with _open_state(state, out, "file", request, check_output_file):
        try:
            yield state
        except ResumableError:
            raise
        except UserError:
            shutil.rmtree(state)
            raise
        result = state / path.name
        # The same run may have been killed right after it had put its result there.
        if path.exists() and path.read_bytes() != result.read_bytes():
            check_absent(out)
        result.replace(path)
        shutil.rmtree(state)


@contextmanager
def _open_state(
    state: Path, out: str, place: str, request: dict[str, Any], check: Callable[[str, dict[str, Any]], bool]
) -> Iterator[None]:
    try:
        state.mkdir(parents=True, exist_ok=True)
        # The system takes the lock from a process that is killed.
        lock = FileLock(state / _LOCK_FILE, blocking=False).acquire()
    except Timeout as error:
        raise UserError(f"--out {out!r} is in use by another run; wait for its end or give a new {place}.") from error
    except OSError as error:
        raise UserError(f"--out {out!r} cannot be written ({error.strerror}); give another {place}.") from error
    with lock, _full_disk_as_user_error(Path(out)):
        # Another run may have ended or begun before the lock was ours.
        if not check(out, request):
            write_whole(state / _REQUEST_FILE, json.dumps(request, indent=1, sort_keys=True))
        yield


@contextmanager
def _full_disk_as_user_error(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # Each library has its own exception for a file that it could not write.
        if not any(said in str(error) for said in _FULL) and _free_bytes(out) > _NEXT_TO_NOTHING:
            raise
        raise UserError(
            f"--out {str(out)!r}: the disk is full; make room, and the same command continues where it was."
        ) from error


def _free_bytes(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _holds_no_result(folder: Path) -> bool:
    """Whether a folder is empty, up to a run that was interrupted before it began."""
    return all(path.name == STATE_FOLDER for path in folder.iterdir())


def folder_names(option: str, named: Sequence[str]) -> dict[str, str]:
    """Names of the folders inside `out` for models or adapters that an option has named several of.

    Args:
        option: as people type it
        named: folders or hub ids

    Returns:
        what was named → its last component

    Raises:
        UserError: nothing is named, or two would share a folder.
    """
    if not named:
        raise UserError(f"{option} names nothing; give at least one.")
    names = [(Path(one).resolve() if Path(one).is_dir() else Path(one)).name for one in named]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(f"{option} names {name!r} {count} times, which would share a folder; give one at a time.")
    return dict(zip(named, names, strict=True))


def check_folder_of(out: str) -> None:
    """Raises a UserError unless the folder that a file is to lie in exists."""
    if not Path(out).parent.is_dir():
        raise UserError(f"--out {out!r} lies in no folder that exists; give a new file.")


def check_absent(out: str) -> None:
    """Raises a UserError if there is a file or folder of this name."""
    if Path(out).exists():
        raise UserError(f"--out {out!r} exists; give a new file, nothing is ever overwritten.")


def write_new_file(out: str, content: str) -> None:
    """Writes a file that `check_absent` has accepted, and the folders that it lies in.

    Raises:
        UserError: it cannot be written.
    """
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(out), content)
    except OSError as error:
        raise UserError(f"--out {out!r} cannot be written ({error.strerror}); give another file.") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, so that it is there in full or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)
