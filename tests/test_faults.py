"""What `benchmarks.faults` calls a failure; the disturbed runs themselves are its command."""

import json
import random

import pytest

from benchmarks import faults
from benchmarks.faults import Outcome, Undisturbed, check_finished, check_unfinished, main, written


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": "here"}))
    return folder


@pytest.fixture
def expected(out) -> Undisturbed:
    return Undisturbed(written(out), 1.0)


def test_the_place_of_the_base_model_makes_no_difference(out, expected):
    (out / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": "there"}))
    assert written(out) == expected.written
    (out / "adapter_config.json").write_text(json.dumps({"r": 9, "base_model_name_or_path": "here"}))
    assert written(out) != expected.written


def test_only_a_whole_adapter_may_be_loadable_before_the_end(out, expected):
    outcome = Outcome()
    check_unfinished(out, expected, outcome, "whole")
    assert (outcome.began_again, outcome.failures) == (0, [])
    (out / "adapter_model.safetensors").write_bytes(b"weig")
    check_unfinished(out, expected, outcome, "half")
    assert outcome.failures == ["half: a half-written adapter could be loaded"]
    (out / "adapter_config.json").unlink()
    check_unfinished(out, expected, outcome, "no configuration yet")
    assert (outcome.began_again, len(outcome.failures)) == (1, 1)


@pytest.mark.parametrize(
    ("code", "weights", "state", "complaints"),
    [
        (0, b"weights", False, []),
        (1, b"weights", False, ["going on ended with exit code 1: why"]),
        (0, b"others", False, ["other bytes than those of the undisturbed run"]),
        (0, b"weights", True, ["the state of the run was left behind"]),
    ],
)
def test_a_run_must_go_on_to_the_same_bytes_and_tidy_up(out, expected, monkeypatch, code, weights, state, complaints):
    (out / ".castlora").mkdir()

    def finish(_command):
        (out / "adapter_model.safetensors").write_bytes(weights)
        if not state:
            (out / ".castlora").rmdir()
        return code, "why"

    monkeypatch.setattr(faults, "finish", finish)
    outcome = Outcome()
    check_finished(out, expected, outcome, "x")
    assert outcome.failures == [f"x: {complaint}" for complaint in complaints]


@pytest.mark.parametrize("failures", [[], ["it broke"]])
def test_counts_are_written_and_a_failure_ends_the_command(tmp_path, monkeypatch, expected, capsys, failures):
    moments = []

    def disturb(_folder, _expected, chance: random.Random) -> Outcome:
        moments.append(chance.random())
        return Outcome(1, 1, list(failures))

    monkeypatch.setattr(faults, "undisturbed", lambda _out: expected)
    monkeypatch.setattr(faults, "DISTURBANCES", {"kill -9": (disturb, 4)})
    record = tmp_path / "faults.json"
    if failures:
        with pytest.raises(SystemExit, match="1"):
            main(share=0.5, out=record)
    else:
        main(share=0.5, out=record)
    counts = json.loads(record.read_text())["disturbances"]["kill -9"]
    assert (counts["tried"], counts["began_again"], counts["failures"]) == (2, 2, failures * 2)
    assert len(set(moments)) == 2
    assert ("it broke" in capsys.readouterr().out) == bool(failures)
