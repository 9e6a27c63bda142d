from pathlib import Path

import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from castlora import transfer
from castlora.config import Tracker


@pytest.fixture
def move(base_model, adapter, text_file, tmp_path, checked_in_process, monkeypatch):
    """Moves an adapter from a folder of its own, so that trackers may write there."""
    monkeypatch.chdir(tmp_path)

    def run(out: str, report_to: Tracker | None):
        tuning = tiny.SHORT
        places = str(adapter("llama")), str(base_model("gpt2")), out
        return transfer(*places, text=str(text_file), steps=3, batch_size=4, tuning=tuning, report_to=report_to)

    return run


def losses(folder: Path) -> list[float]:
    return [event.value for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]


def test_a_tracker_hears_of_the_losses_and_changes_nothing(move, tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    tracked, untracked = move("tracked", "tensorboard"), move("untracked", None)
    assert losses(tmp_path / "runs" / "tracked") == pytest.approx([entry["loss"] for entry in tracked.log[1:]])
    names, others = (sorted(path.name for path in run.folder.iterdir()) for run in (tracked, untracked))
    assert names == others
    weights, other_weights = ((run.folder / "adapter_model.safetensors").read_bytes() for run in (tracked, untracked))
    assert weights == other_weights


def test_tensorboard_writes_where_its_own_variable_says(move, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    move("tracked", "tensorboard")
    assert losses(tmp_path / "elsewhere")
    assert not (tmp_path / "runs").exists()
