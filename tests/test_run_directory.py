import shutil
from collections import namedtuple

import pytest

from castlora.errors import UserError
from castlora.run_directory import STATE_FOLDER, check_output, open_run, write_whole

REQUEST = {"adapter": "a", "seed": 0}
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture
def run(tmp_path):
    return open_run(str(tmp_path / "out"), REQUEST, 0)


def checkpoint(run, step: int, state: str | None = "{}") -> None:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if state is not None:
        (folder / "trainer_state.json").write_text(state)


def test_a_new_or_empty_folder_is_accepted(tmp_path):
    assert check_output(str(tmp_path), REQUEST) is False
    assert check_output(str(tmp_path / "new" / "deeper"), REQUEST) is False
    assert not (tmp_path / "new").exists()


def test_an_interrupted_run_is_opened_again_by_the_same_request_only(run):
    (run.state / "passages.json").touch()
    assert check_output(str(run.out), REQUEST) is True
    assert open_run(str(run.out), REQUEST, 0) == run
    assert (run.state / "passages.json").exists()
    with pytest.raises(UserError, match="out' holds an interrupted run with other settings; finish that one or give"):
        check_output(str(run.out), REQUEST | {"seed": 1})


def test_a_run_interrupted_before_it_began_does_not_block_its_folder(tmp_path):
    (tmp_path / STATE_FOLDER).mkdir()
    (tmp_path / STATE_FOLDER / "request.json.part").write_text("{")
    assert check_output(str(tmp_path), REQUEST) is False
    open_run(str(tmp_path), REQUEST, 0)
    assert check_output(str(tmp_path), REQUEST) is True


@pytest.mark.parametrize("kind", ["file", "result", "hidden"])
def test_nothing_is_ever_overwritten(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / ("adapter_config.json" if kind == "result" else ".mine")).touch()
    with pytest.raises(UserError, match=r"^--out '.*out' is not empty; give a new folder, nothing is ever overwritten"):
        check_output(str(out), REQUEST)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: DiskUsage(9, 9, 5 << 20))
    open_run(str(tmp_path / "small"), REQUEST, 5 << 20)
    with pytest.raises(UserError, match=r"out': the run needs 6 MiB of disk and 5 MiB are free; make room"):
        open_run(str(tmp_path / "new" / "out"), REQUEST, 6 << 20)
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--out '.*file/out' cannot be written \(Not a directory\)"):
        open_run(str(tmp_path / "file" / "out"), REQUEST, 0)


def test_the_last_checkpoint_is_the_newest_complete_one(run):
    assert run.last_checkpoint() is None
    for step in (5, 100, 20):
        checkpoint(run, step)
    checkpoint(run, 200, state=None)
    checkpoint(run, 300, state='{"global_step": 3')
    assert run.last_checkpoint() == str(run.checkpoints / "checkpoint-100")


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


def test_a_discarded_run_leaves_nothing_of_its_own(run):
    checkpoint(run, 5)
    run.discard()
    assert not run.out.exists()
    again = open_run(str(run.out), REQUEST, 0)
    (again.out / "notes").touch()
    again.discard()
    assert [path.name for path in run.out.iterdir()] == ["notes"]


def test_a_file_is_written_in_full_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "second \ud800")
    assert path.read_text() == "first"
