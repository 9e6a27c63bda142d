"""One adapter onto several targets, for which it is asked once."""

import functools
import json

import pytest
import tiny

from castlora import UserError, several, transfer, transfer_to_each
from castlora.cli import main
from castlora.config import Tuning

TARGETS = ("mistral", "gpt2")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def settings(adapter, base_model, prompts_file) -> dict:
    """Of a short transfer from the tiny Llama."""
    return {
        "adapter": str(adapter("llama")),
        "source": str(base_model("llama")),
        "prompts": str(prompts_file),
        "steps": 3,
        "batch_size": 4,
        "tuning": tiny.SHORT,
    }


@pytest.fixture
def targets(base_model) -> list[str]:
    return [str(base_model(name)) for name in TARGETS]


def test_each_target_gets_the_bytes_of_a_transfer_of_its_own(settings, targets, tmp_path, checked_in_process, task):
    out = tmp_path / "moved"
    manifests = transfer_to_each(targets=targets, out=str(out), **settings, task=task("topics"))
    assert sorted(path.name for path in out.iterdir()) == ["comparison.html", "gpt2", "mistral", "taught.jsonl"]
    assert list(manifests) == targets
    for target, name in zip(targets, TARGETS, strict=True):
        alone = transfer(target=target, out=str(tmp_path / name), **settings)
        assert (out / name / WEIGHTS).read_bytes() == (alone.folder / WEIGHTS).read_bytes()
        assert manifests[target]["target"]["name"] == name
        assert [task["name"] for task in manifests[target]["tasks"]] == ["topics"]
    page = (out / "comparison.html").read_text()
    assert "mistral" in page and "gpt2" in page


def test_what_was_interrupted_goes_on_and_nothing_is_done_twice(
    settings, targets, tmp_path, checked_in_process, monkeypatch
):
    started = []

    @functools.wraps(transfer)
    def interrupt_the_second(adapter, target, out, **options):
        started.append(target)
        if target == targets[1]:
            raise KeyboardInterrupt
        return transfer(adapter, target, out, **options)

    def move(**changes):
        return transfer_to_each(**{"targets": targets, "out": str(tmp_path / "moved"), **settings, **changes})

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(several, "transfer", interrupt_the_second)
        move()
    assert started == targets
    before = (tmp_path / "moved" / "mistral" / WEIGHTS).stat().st_mtime_ns
    with pytest.raises(UserError, match=r"holds an interrupted run with other settings \(seed\)"):
        move(seed=1)
    monkeypatch.setattr(several, "teach", None)
    move()
    assert (tmp_path / "moved" / "mistral" / WEIGHTS).stat().st_mtime_ns == before
    assert (tmp_path / "moved" / "gpt2" / WEIGHTS).exists()
    with pytest.raises(UserError, match="is not empty; give a new folder"):
        move()


def test_running_text_is_read_for_each_target(settings, targets, text_file, tmp_path, checked_in_process):
    running = settings | {"prompts": None, "text": str(text_file), "recipe": "paper"}
    transfer_to_each(targets=targets, out=str(tmp_path / "moved"), **running)
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["comparison.html", *sorted(TARGETS)]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"targets": []}, "--target names nothing"),
        ({"targets": ["one/model", "other/model"]}, "--target names 'model' 2 times, which would share a folder"),
        ({"targets": ["nowhere/at/all", "mistral"]}, "'nowhere/at/all' is not a folder"),
        ({"rank": 4}, "--rank 4"),
        ({"task": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"seed": -1}, "seed is -1"),
        ({"tuning": Tuning(max_length=5000)}, "max_length is 5000"),
        ({"low_memory": True, "target_bits": 8}, "--target-bits 8 cannot be had with --low-memory"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_no_target_can_be_moved_with_leaves_nothing(settings, targets, tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        transfer_to_each(**{"targets": targets, "out": str(tmp_path / "moved"), **settings, **changes})
    assert not (tmp_path / "moved").exists()


def test_a_setting_that_transfer_does_not_have_is_no_setting_here(settings, targets, tmp_path):
    with pytest.raises(TypeError, match="stepz"):
        transfer_to_each(**settings, targets=targets, out=str(tmp_path / "moved"), stepz=3)
    assert not (tmp_path / "moved").exists()


def test_the_command_line_takes_targets_one_by_one(settings, targets, tmp_path, capsys, checked_in_process):
    words = [f"--{name}={value}" for name, value in settings.items() if name != "tuning"]
    words += [f"--tuning.{name}={value}" for name, value in vars(tiny.SHORT).items() if value is not None]
    main(["transfer", *words, "--target", targets[0], f"--target={targets[1]}", "--out", str(tmp_path), "--json=true"])
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == targets
    written = [json.loads((tmp_path / name / "castlora.json").read_text()) for name in TARGETS]
    assert list(printed.values()) == written


def test_one_repository_does_not_take_several_adapters(settings, targets, tmp_path, capsys):
    words = ["--adapter", settings["adapter"], "--out", str(tmp_path / "moved"), "--push-to-hub", "me/moved"]
    with pytest.raises(SystemExit) as stopped:
        main(["transfer", *words, "--target", targets[0], "--target", targets[1]])
    assert stopped.value.code == 2
    assert (
        "--push-to-hub names one repository for several adapters; give each to castlora push" in capsys.readouterr().err
    )
    assert not (tmp_path / "moved").exists()
