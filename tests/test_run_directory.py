import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors import SafetensorError

from castlora.adapters.files import find_adapter
from castlora.adapters.portable import check_portable
from castlora.errors import ResumableError, UserError
from castlora.execution.run_directory import (
    STATE_FOLDER,
    check_finished,
    check_output,
    hold_to_inputs,
    open_file_run,
    open_run,
    seal,
    write_whole,
)
from castlora.publishing.runs import read_run

REQUEST = {"adapter": "a", "seed": 0}
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture
def run(tmp_path):
    with open_run(str(tmp_path / "out"), REQUEST, 0) as run:
        yield run


def checkpoint(run, step: int) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"moments")
    (folder / "trainer_state.json").write_text("{}")
    seal(folder)
    return folder


def test_a_new_or_empty_folder_is_accepted(tmp_path):
    assert check_output(str(tmp_path), REQUEST) is False
    assert check_output(str(tmp_path / "new" / "deeper"), REQUEST) is False
    assert not (tmp_path / "new").exists()


def test_an_interrupted_run_is_opened_again_by_the_same_request_only(tmp_path):
    out = str(tmp_path / "out")
    with open_run(out, REQUEST, 0) as run:
        (run.state / "passages.json").touch()
    assert check_output(out, REQUEST) is True
    with open_run(out, REQUEST, 0) as again:
        assert again == run
        assert (again.state / "passages.json").exists()
    with pytest.raises(UserError, match=r"out' holds an interrupted run with other settings \(seed\); finish that one"):
        check_output(out, REQUEST | {"seed": 1})


def test_a_folder_serves_one_run_at_a_time(run):
    with (
        pytest.raises(UserError, match="out' is in use by another run; wait for its end"),
        open_run(str(run.out), REQUEST, 0),
    ):
        pass
    assert check_output(str(run.out), REQUEST) is True


def test_a_run_that_was_published_while_waiting_is_not_run_again(tmp_path, monkeypatch):
    """Two processes saw an empty folder, and the other one was faster."""
    out = tmp_path / "out"
    acquire = FileLock.acquire

    def publish_first(lock):
        (out / "adapter_config.json").touch()
        return acquire(lock)

    monkeypatch.setattr(FileLock, "acquire", publish_first)
    with pytest.raises(UserError, match="out' is not empty"), open_run(str(out), REQUEST, 0):
        pass


@pytest.mark.parametrize(
    ("error", "free", "is_full"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 9 << 20, True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 9 << 20, True),
        (RuntimeError("unexpected pos 576 vs 534"), 0, True),
        (RuntimeError("unexpected pos 576 vs 534"), 9 << 20, False),
    ],
)
def test_a_disk_that_becomes_full_is_said_in_one_sentence(tmp_path, monkeypatch, error, free, is_full):
    says = "disk is full; make room, and the same" if is_full else "pos 576"
    with (
        pytest.raises(UserError if is_full else type(error), match=says),
        open_run(str(tmp_path / "out"), REQUEST, 0),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _folder: DiskUsage(9, 9, free))
        raise error
    assert check_output(str(tmp_path / "out"), REQUEST) is True


def test_a_run_interrupted_before_it_began_does_not_block_its_folder(tmp_path):
    (tmp_path / STATE_FOLDER).mkdir()
    (tmp_path / STATE_FOLDER / "request.json.part").write_text("{")
    assert check_output(str(tmp_path), REQUEST) is False
    with open_run(str(tmp_path), REQUEST, 0):
        pass
    assert check_output(str(tmp_path), REQUEST) is True


@pytest.mark.parametrize("kind", ["file", "result", "hidden"])
def test_nothing_is_ever_overwritten(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / ("adapter_config.json" if kind == "result" else ".mine")).touch()
    state = "is a file" if kind == "file" else "is not empty"
    with pytest.raises(UserError, match=rf"^--out '.*out' {state}; give a new folder, nothing is ever overwritten"):
        check_output(str(out), REQUEST)


def test_an_unfinished_run_is_named_by_all_that_read_results(tmp_path):
    with open_run(str(tmp_path), REQUEST, 0):
        pass
    for read in (find_adapter, read_run, lambda folder: check_portable(Path(folder))):
        with pytest.raises(UserError, match=r"The run in '.*' is not finished; call the command that began it again"):
            read(str(tmp_path))
    (tmp_path / "adapter_config.json").touch()
    check_finished(tmp_path)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: DiskUsage(9, 9, 5 << 20))
    with open_run(str(tmp_path / "small"), REQUEST, 5 << 20):
        pass
    refused = pytest.raises(UserError, match=r"out': the run needs 6 MiB of disk and 5 MiB are free; make room")
    with refused, open_run(str(tmp_path / "new" / "out"), REQUEST, 6 << 20):
        pass
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused = pytest.raises(UserError, match=r"^--out '.*file/out' cannot be written \(Not a directory\)")
    with refused, open_run(str(tmp_path / "file" / "out"), REQUEST, 0):
        pass


def test_the_last_checkpoint_is_the_newest_one_that_is_as_it_was(run):
    assert run.last_checkpoint() is None
    for step in (5, 100, 20):
        checkpoint(run, step)
    (checkpoint(run, 200) / "sealed.json").unlink()
    (checkpoint(run, 300) / "trainer_state.json").write_text("{")
    (checkpoint(run, 400) / "optimizer.pt").unlink()
    (checkpoint(run, 500) / "planted.pt").touch()
    (checkpoint(run, 600) / "sealed.json").write_text("[" * 100_000)
    assert run.last_checkpoint() == str(run.checkpoints / "checkpoint-100")


@pytest.mark.parametrize("content", ["{", "", "[" * 100_000])
def test_a_damaged_request_is_named(run, content):
    (run.state / "request.json").write_text(content)
    with pytest.raises(UserError, match=r"holds an interrupted run whose request\.json is damaged; give a new folder"):
        check_output(str(run.out), REQUEST)


def test_results_that_an_interrupted_run_left_are_not_published(tmp_path):
    out = str(tmp_path / "out")
    with open_run(out, REQUEST, 0) as run:
        run.finished.mkdir()
        (run.finished / "half").touch()
    with open_run(out, REQUEST, 0) as run:
        run.finished.mkdir()
        (run.finished / "whole").touch()
        run.publish()
    assert [path.name for path in run.out.iterdir()] == ["whole"]


def test_what_makes_an_adapter_loadable_is_published_last(run, monkeypatch):
    run.finished.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "zebra"):
        (run.finished / name).write_text(name)
    moved = []
    replace = type(run.out).replace
    monkeypatch.setattr(type(run.out), "replace", lambda path, to: (moved.append(path.name), replace(path, to)))
    run.publish()
    assert moved[-1] == "adapter_config.json" and len(moved) == 4
    assert sorted(path.name for path in run.out.iterdir()) == sorted(moved)
    assert (run.out / "zebra").read_text() == "zebra"


def test_a_discarded_run_leaves_nothing_of_its_own(tmp_path):
    with open_run(str(tmp_path / "out"), REQUEST, 0) as run:
        checkpoint(run, 5)
        run.discard()
    assert not run.out.exists()
    with open_run(str(run.out), REQUEST, 0) as again:
        (again.out / "notes").touch()
        again.discard()
    assert [path.name for path in run.out.iterdir()] == ["notes"]


def test_a_run_killed_while_it_is_tidied_up_still_says_which_one_it_was(run, monkeypatch):
    checkpoint(run, 5)
    run.finished.mkdir()
    (run.finished / "adapter_config.json").touch()
    removed = []

    def stop(path):
        removed.append(path.name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", stop)
        run.publish()
    assert removed != [STATE_FOLDER]
    assert check_output(str(run.out), REQUEST) is True
    run.publish()
    assert [path.name for path in run.out.iterdir()] == ["adapter_config.json"]


def test_folders_that_a_killed_run_had_published_are_replaced(tmp_path):
    out = str(tmp_path / "out")
    for content in ("half", "whole"):
        with open_run(out, REQUEST, 0) as run:
            (run.finished / "model").mkdir(parents=True)
            (run.finished / "model" / "config.json").write_text(content)
            if content == "half":
                (run.finished / "model").replace(run.out / "model")
            else:
                run.publish()
    assert (run.out / "model" / "config.json").read_text() == "whole"
    assert [path.name for path in run.out.iterdir()] == ["model"]


def test_a_run_goes_on_with_what_it_read_alone(tmp_path):
    hold_to_inputs(tmp_path, {"--prompts": "one", "--adapter": "two"})
    hold_to_inputs(tmp_path, {"--prompts": "one", "--adapter": "two"})
    with pytest.raises(ResumableError, match="--adapter is not what it was when the run that this would continue beg"):
        hold_to_inputs(tmp_path, {"--prompts": "one", "--adapter": "three"})
    for content in ("{", "[1]", "[" * 100_000):
        (tmp_path / "inputs.json").write_text(content)
        with pytest.raises(ResumableError, match=r"inputs\.json' is damaged; give another --out"):
            hold_to_inputs(tmp_path, {"--prompts": "one", "--adapter": "two"})


def test_what_may_pass_leaves_the_state_of_a_file_and_bad_input_does_not(tmp_path):
    out = tmp_path / "out.jsonl"
    for error, is_kept in ((ResumableError, True), (UserError, False)):
        with pytest.raises(error), open_file_run(str(out), REQUEST) as state:
            (state / "part").touch()
            raise error("it has ended.")
        assert (state / "part").exists() == is_kept


def test_a_file_is_written_in_full_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "second \ud800")
    assert path.read_text() == "first"
