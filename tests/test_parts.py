"""Reading that is interrupted goes on with what it has, to the same bytes."""

import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from preloaded import Started, run_castlora

from castlora import UserError, teach, transfer
from castlora.cli import main
from castlora.config import Tuning
from castlora.errors import ResumableError
from castlora.execution.parts import Parts
from castlora.execution.run_directory import STATE_FOLDER
from castlora.teaching import answers, curriculum, format_search, selection
from castlora.teaching import teach as teaching

SEARCHED = Tuning(filled_passages=40, candidates=4, format_candidates=12, max_length=88, answer_tokens=8)


class Kill(BaseException):
    """Ends a run wherever it is, as nothing catches it."""


def test_a_part_is_computed_once(tmp_path):
    parts, computed = Parts(tmp_path / "parts"), []

    def compute() -> list[float]:
        computed.append(1)
        return [0.1, float("nan")]

    first = parts.json("a", ["input"], compute)
    assert repr(parts.json("a", ["input"], compute)) == repr(first) == "[0.1, nan]"
    assert len(computed) == 1
    parts.json("a", ["another input"], compute)
    assert len(computed) == 2
    Parts().json("a", ["another input"], compute)
    assert len(computed) == 3


def test_tensors_are_kept_to_the_bit(tmp_path):
    parts = Parts(tmp_path / "parts")
    value = {"ids": torch.arange(3), "sum": torch.rand(5, dtype=torch.float64)}
    parts.tensors("a", [], lambda: value)
    kept = parts.tensors("a", [], dict)
    assert kept.keys() == value.keys() and all(torch.equal(kept[name], value[name]) for name in value)


DAMAGES = {"cut": lambda old: old[:-1], "emptied": lambda old: b"", "changed": lambda old: old[:-1] + b"X"}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_part_is_computed_again(tmp_path, damage: Callable[[bytes], bytes]):
    parts = Parts(tmp_path / "parts")
    parts.json("a", [], lambda: "old")
    path = tmp_path / "parts" / "a"
    path.write_bytes(damage(path.read_bytes()))
    assert parts.json("a", [], lambda: "new") == "new"


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often each kind of reading was done; batches are small."""
    counted: dict[str, int] = {}
    places = {
        "format": (format_search, "next_token_probabilities"),
        "choice": (selection, "_predict"),
        "answer": (answers, "_sample_answers"),
    }

    def count(name: str, original: Callable, *arguments):
        counted[name] += 1
        return original(*arguments)

    for name, (module, function) in places.items():
        counted[name] = 0
        monkeypatch.setattr(module, function, partial(count, name, getattr(module, function)))
    monkeypatch.setattr(curriculum, "_PROMPT_BATCH", 8)
    monkeypatch.setattr(selection, "_BATCHES_KEPT_TOGETHER", 4)
    return counted


@pytest.fixture
def places(base_model, adapter, text_file) -> dict[str, str]:
    return {"adapter": str(adapter("llama")), "source": str(base_model("llama")), "text": str(text_file)}


@pytest.mark.parametrize(
    ("module", "function", "stop_after"),
    [
        (format_search, "next_token_probabilities", 11),
        (selection, "_predict", 2),
        (answers, "_sample_answers", 3),
        (teaching, "write_taught", 0),
    ],
)
def test_teaching_goes_on_where_it_was(places, tmp_path, monkeypatch, calls, module, function, stop_after):
    undisturbed = teach(**places, out=str(tmp_path / "undisturbed.jsonl"), tuning=SEARCHED).read_bytes()
    done = dict(calls)
    assert all(count > 3 for count in done.values())
    original, left = getattr(module, function), [stop_after]

    def stop(*arguments):
        if left[0] == 0:
            raise Kill
        left[0] -= 1
        return original(*arguments)

    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as stopping, pytest.raises(Kill):
        stopping.setattr(module, function, stop)
        teach(**places, out=str(out), tuning=SEARCHED)
    assert not out.exists()
    assert (tmp_path / f"{STATE_FOLDER}-out.jsonl").is_dir()
    assert teach(**places, out=str(out), tuning=SEARCHED).read_bytes() == undisturbed
    # A format is tried by two readings, with the adapter and without; the first of them may have been done in vain.
    twice = {name: count - 2 * done[name] for name, count in calls.items()}
    assert twice == {"format": 1 if function == "next_token_probabilities" else 0, "choice": 0, "answer": 0}
    assert sorted(path.name for path in tmp_path.glob("*out.jsonl*")) == ["out.jsonl"]


def test_a_transfer_reads_nothing_twice_either(
    places, base_model, tmp_path, monkeypatch, calls, checked_in_process
) -> None:
    def run(out: str) -> bytes:
        folder = transfer(
            **places, target=str(base_model("mistral")), out=str(tmp_path / out), steps=2, batch_size=4, tuning=SEARCHED
        ).folder
        return (folder / "adapter_model.safetensors").read_bytes()

    undisturbed, done = run("undisturbed"), dict(calls)
    original = answers._sample_answers

    def stop(*arguments):
        if calls["answer"] == done["answer"] + 4:
            raise Kill
        return original(*arguments)

    with monkeypatch.context() as stopping, pytest.raises(Kill):
        stopping.setattr(answers, "_sample_answers", stop)
        run("out")
    assert run("out") == undisturbed
    assert calls == {name: 2 * count for name, count in done.items()}
    assert not (tmp_path / "out" / STATE_FOLDER).exists()


def test_killed_teaching_continues_to_the_same_bytes(base_model, adapter, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Who? {sentence} Answer:" for sentence in tiny.sentences(1200, seed=9)))

    def words(out: Path) -> list[str]:
        places = {"adapter": adapter("llama"), "source": base_model("llama"), "prompts": prompts, "out": out}
        return ["teach", *(word for key, value in places.items() for word in (f"--{key}", str(value)))]

    out = tmp_path / "killed.jsonl"
    process = Started(tmp_path / "said", run_castlora, *words(out)).process
    state = tmp_path / f"{STATE_FOLDER}-killed.jsonl"
    while process.is_alive() and not (state / "parts" / "answers-00002").exists():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    main(words(out))
    main(words(tmp_path / "undisturbed.jsonl"))
    assert out.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
    assert not state.exists()


@pytest.fixture
def interrupted(places, prompts_file, tmp_path, monkeypatch) -> dict[str, str]:
    """The settings of a run of teach that was ended before it had written its file."""
    settings = {**places, "prompts": str(prompts_file), "out": str(tmp_path / "out.jsonl")}
    del settings["text"]
    with monkeypatch.context() as stopping, pytest.raises(Kill):
        stopping.setattr(teaching, "write_taught", lambda *_arguments: (_ for _ in ()).throw(Kill))
        teach(**settings)
    return settings


def test_an_interrupted_file_is_finished_by_the_same_settings_only(interrupted, tmp_path):
    with pytest.raises(
        UserError, match=r"jsonl' is the file of an interrupted run with other settings \(seed\); finish"
    ):
        teach(**interrupted, seed=1)
    (tmp_path / f"{STATE_FOLDER}-out.jsonl" / "request.json").write_text("{")
    with pytest.raises(UserError, match=r"an interrupted run whose request\.json is damaged; give a new file"):
        teach(**interrupted)


def test_a_file_that_came_there_meanwhile_is_not_overwritten(interrupted, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(UserError, match=r"out\.jsonl' exists; give a new file"):
        teach(**interrupted)
    assert out.read_text() == "mine"
    out.unlink()
    teach(**interrupted)
    assert out.read_bytes() == teach(**interrupted | {"out": str(tmp_path / "undisturbed.jsonl")}).read_bytes()


def test_killed_between_its_result_and_the_end_it_only_tidies_up(interrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as stopping, pytest.raises(Kill):
        stopping.setattr(shutil, "rmtree", lambda *_arguments: (_ for _ in ()).throw(Kill))
        teach(**interrupted)
    written = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.setattr(answers, "_sample_answers", lambda *_arguments: pytest.fail("answered again"))
    assert teach(**interrupted).read_bytes() == written
    assert not (tmp_path / f"{STATE_FOLDER}-out.jsonl").exists()


@pytest.mark.parametrize("option", ["prompts", "adapter"])
def test_teaching_goes_on_with_what_it_began_with_alone(places, prompts_file, tmp_path, option):
    """What was kept belongs to the prompts and to the adapter that were read then."""
    shutil.copytree(places["adapter"], tmp_path / "adapter")
    settings = {**places, "adapter": str(tmp_path / "adapter"), "prompts": str(tmp_path / "prompts.txt")}
    del settings["text"]
    (tmp_path / "prompts.txt").write_text(prompts_file.read_text())
    given = {**settings, "out": str(tmp_path / "out.jsonl")}
    with pytest.MonkeyPatch.context() as stopping, pytest.raises(Kill):
        stopping.setattr(teaching, "write_taught", lambda *_arguments: (_ for _ in ()).throw(Kill))
        teach(**given)
    changed = tmp_path / "prompts.txt" if option == "prompts" else tmp_path / "adapter" / "adapter_model.safetensors"
    as_it_was = changed.read_bytes()
    changed.write_bytes(as_it_was[:-1] + bytes([as_it_was[-1] ^ 1]))
    with pytest.raises(UserError, match=f"--{option} is not what it was when the run that this would continue began"):
        teach(**given)
    changed.write_bytes(as_it_was)
    assert teach(**given).read_bytes() == teach(**{**settings, "out": str(tmp_path / "anew.jsonl")}).read_bytes()


def test_a_hub_that_fails_meanwhile_takes_nothing_back(places, prompts_file, tmp_path, monkeypatch):
    settings = {**places, "prompts": str(prompts_file), "out": str(tmp_path / "out.jsonl")}
    del settings["text"]
    with monkeypatch.context() as failing, pytest.raises(ResumableError):
        failing.setattr(teaching, "write_taught", lambda *_arguments: (_ for _ in ()).throw(ResumableError("down.")))
        teach(**settings)
    monkeypatch.setattr(answers, "_sample_answers", lambda *_arguments: pytest.fail("answered again"))
    assert teach(**settings).is_file()


def test_teaching_that_bad_input_ends_leaves_nothing(places, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one prompt\n")
    before = sorted(tmp_path.iterdir())
    settings = {**places, "prompts": str(prompts)}
    del settings["text"]
    with pytest.raises(UserError, match="yields 1 passages"):
        teach(**settings, out=str(tmp_path / "out.jsonl"))
    assert sorted(tmp_path.iterdir()) == before
