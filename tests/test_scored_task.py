"""A task that a transfer is scored on along the way."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from castlora import UserError, evaluate, pipeline, reading
from castlora.distillation import training
from castlora.distillation.training import LossProgress
from castlora.publishing.manifest import MANIFEST_FILE
from castlora.publishing.runs import read_run
from castlora.report import BARE_TARGET, RETRAINED, SOURCE_LORA, TRANSFERRED

TUNING = replace(tiny.SHORT, learning_rate_scale=4.0)


@pytest.fixture
def scored_transfer(quick_transfer, prompts_file):
    return partial(quick_transfer, "llama", "mistral", prompts=str(prompts_file), steps=5, tuning=TUNING)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def by_step(log) -> dict[int, float]:
    return {entry["step"]: entry["task_score"] for entry in log if "task_score" in entry}


def test_the_target_is_scored_along_the_way_as_evaluate_scores_it(
    scored_transfer, base_model, adapter, task, monkeypatch
):
    # With another scale, which is chosen when the training is over, the result would not be that of the last step.
    monkeypatch.setattr(pipeline, "TRAINED_SCALES", (1.0,))
    monkeypatch.setattr(training, "PASSAGES_PER_MEASURE", 1)
    animals = task("animals", 24)
    result = scored_transfer(task=animals)
    (measured,) = result.manifest["tasks"]
    alone = {
        BARE_TARGET: evaluate(str(base_model("mistral")), animals),
        SOURCE_LORA: evaluate(str(base_model("llama")), animals, str(adapter("llama"))),
        TRANSFERRED: evaluate(str(base_model("mistral")), animals, str(result.folder)),
    }
    assert list(measured["scores"]) == list(alone)
    for model, expected in alone.items():
        assert measured["scores"][model]["score"] == expected["score"], model
        assert measured["scores"][model]["nll"] == pytest.approx(expected["nll"], rel=1e-4), model
    assert (measured["name"], measured["n"], measured["metric"]) == ("animals", 24, "accuracy")
    scores = by_step(result.log)
    assert list(scores) == list(range(6))
    assert scores[5] == alone[TRANSFERRED]["score"] != alone[BARE_TARGET]["score"]


def test_the_progress_bar_keeps_the_latest_score():
    shown = []
    progress = LossProgress()
    progress.training_bar = SimpleNamespace(set_postfix=shown.append)
    for logs in ({"loss": 2.0}, {"loss": 1.0, "task_score": 0.25}, {"loss": 0.5}):
        progress.on_log(None, None, None, logs)
    assert shown == [{"loss": "2.0000"}, {"loss": "1.0000", "task": "0.250"}, {"loss": "0.5000", "task": "0.250"}]


def test_it_changes_nothing_else(scored_transfer, task):
    scored, unscored = scored_transfer("scored", task=task("animals")), scored_transfer("unscored")
    assert weights(scored.folder) == weights(unscored.folder)
    assert scored.manifest["losses"] == unscored.manifest["losses"]
    assert scored.manifest["answers"] == unscored.manifest["answers"]
    assert unscored.manifest["tasks"] == [] and not by_step(unscored.log)
    assert "--task animals.jsonl" in scored.manifest["command"]


def test_an_interrupted_run_ends_with_the_same_scores(scored_transfer, task, monkeypatch):
    animals = task("animals")

    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline, "keep_best_scale", interrupt)
        scored_transfer(task=animals)
    with monkeypatch.context() as patched:
        # What models that are not trained make of it is not asked again.
        patched.setattr(reading.ScoredTask, "score_untrained", interrupt)
        resumed = scored_transfer(task=animals)
    undisturbed = scored_transfer("undisturbed", task=animals)
    assert resumed.manifest["tasks"] == undisturbed.manifest["tasks"]
    assert by_step(resumed.log) == by_step(undisturbed.log)


def test_card_and_report_have_the_scores_and_later_the_lift(scored_transfer, base_model, adapter, task):
    animals = task("animals", 24)
    folder = scored_transfer(task=animals).folder
    card, page = ((folder / name).read_text(encoding="utf-8") for name in ("README.md", "report.html"))
    assert "| `animals (accuracy)` | `source + LoRA` |" in card
    assert (
        "Score on &#39;animals&#39;, by step; 0 is the start; source + LoRA reaches" in page and "Lift on" not in page
    )
    before = json.loads((folder / MANIFEST_FILE).read_text())["tasks"]
    found = evaluate(str(base_model("mistral")), animals, str(folder), retrained=str(adapter("mistral")), record=True)
    (after,) = json.loads((folder / MANIFEST_FILE).read_text())["tasks"]
    assert list(after["scores"]) == [BARE_TARGET, SOURCE_LORA, TRANSFERRED, RETRAINED]
    assert after["scores"][SOURCE_LORA] == before[0]["scores"][SOURCE_LORA]
    assert after["lift"] == found["lift"]
    assert [skill.name for skill in read_run(str(folder)).report.skills] == ["animals"]


def test_a_task_scored_in_another_way_does_not_keep_the_teachers_score(scored_transfer, base_model, task, monkeypatch):
    animals = task("animals")
    folder = scored_transfer(task=animals).folder
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["tasks"][0]["chat"] = True
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    evaluate(str(base_model("mistral")), animals, str(folder), record=True)
    (after,) = json.loads((folder / MANIFEST_FILE).read_text())["tasks"]
    assert list(after["scores"]) == [BARE_TARGET, TRANSFERRED]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("not JSON", "line 1: not JSON"),
        (json.dumps({"prompt": "Who?"}), "`completion` is missing"),
        (json.dumps({"prompt": "Who?", "completion": " the fox" * 500}), "is longer than the"),
    ],
)
def test_a_task_that_cannot_be_used_leaves_nothing(scored_transfer, tmp_path, line, complaint):
    (tmp_path / "task.jsonl").write_text(line)
    with pytest.raises(UserError, match=complaint):
        scored_transfer(task=str(tmp_path / "task.jsonl"))
    assert not (tmp_path / "out").exists()
