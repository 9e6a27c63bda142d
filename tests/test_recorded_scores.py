"""Scores that are measured after a transfer and go into its manifest, card and report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
import yaml
from huggingface_hub import EvalResult, ModelCard
from markupsafe import escape
from preloaded import CHECKED_HERE

from castlora import UserError, evaluate, report_runs, transfer
from castlora.cli import main
from castlora.evaluation import verification
from castlora.publishing.card import make_card
from castlora.publishing.manifest import MANIFEST_FILE
from castlora.publishing.runs import read_run
from castlora.report.formatting import number, percent


@pytest.fixture(scope="module")
def finished(base_model, adapter, prompts_file, tmp_path_factory) -> Path:
    """A finished run from a tiny Llama to a tiny Mistral."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verification, "subprocess", CHECKED_HERE)
        return transfer(
            str(adapter("llama")), str(base_model("mistral")), str(tmp_path_factory.mktemp("finished") / "run"),
            str(base_model("llama")), prompts=str(prompts_file), steps=2, batch_size=4,
            tuning=replace(tiny.SHORT, max_length=60, answer_tokens=4),
        ).folder  # fmt: skip


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def recorded(folder: Path) -> list[tuple[str, str, object]]:
    """What the card's model index says about tasks: their name, the metric and its value."""
    results = ModelCard.load(folder / "README.md").data.eval_results
    return [(one.dataset_name, one.metric_type, one.metric_value) for one in results if one.dataset_revision]


def test_the_hub_reads_in_the_card_what_was_measured(run, base_model, task) -> None:
    before = ModelCard.load(run / "README.md").data.eval_results
    result = evaluate(str(base_model("mistral")), task("animals"), str(run), record=True)
    loaded = ModelCard.load(run / "README.md")
    assert loaded.data.eval_results[: len(before)] == before
    (added,) = loaded.data.eval_results[len(before) :]
    assert added == EvalResult(
        "text-generation", "animals", "animals", dataset_revision=result["task_sha256"], metric_type="accuracy",
        metric_name="score of the transferred adapter", metric_value=result["score"],
    )  # fmt: skip
    low, high = result["ci95"]
    measured = f"{result['score']:.3f} | [{low:.3f}, {high:.3f}] | {number(result['nll'])} |"
    assert f"| `animals (accuracy)` | `transferred` | {measured}" in loaded.text
    assert f"| `animals (accuracy)` | `bare target` | {result['scores']['bare target']['score']:.3f}" in loaded.text
    assert "how much of the skill arrived is not known" not in loaded.text


def test_what_is_recorded_is_what_each_model_reaches_alone(run, base_model, task) -> None:
    recording = evaluate(str(base_model("mistral")), task("animals"), str(run), record=True)
    alone = {
        "bare target": evaluate(str(base_model("mistral")), task("animals")),
        "transferred": evaluate(str(base_model("mistral")), task("animals"), str(run)),
    }
    assert recording["lift"] is None
    assert recording["scores"] == {
        model: {name: result[name] for name in ("score", "ci95", "nll")} for model, result in alone.items()
    }
    (kept,) = json.loads((run / MANIFEST_FILE).read_text())["tasks"]
    assert kept["scores"] == recording["scores"]
    assert (kept["name"], kept["n"], kept["sha256"]) == ("animals", 12, recording["task_sha256"])


def test_scored_again_a_task_takes_its_own_place_and_another_is_added(run, base_model, task) -> None:
    animals, kings = task("animals"), task("kings", 9)
    first = evaluate(str(base_model("mistral")), animals, str(run), record=True)
    contents = {path.name: path.read_bytes() for path in run.iterdir()}
    evaluate(str(base_model("mistral")), animals, str(run), record=True)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == contents
    second = evaluate(str(base_model("mistral")), kings, str(run), record=True)
    assert recorded(run) == [("animals", "accuracy", first["score"]), ("kings", "accuracy", second["score"])]
    assert len(read_run(str(run)).report.skills) == 2
    assert not list(run.glob("*.part"))


def test_what_the_owner_wrote_into_the_card_stays(run, base_model, task) -> None:
    path = run / "README.md"
    card = ModelCard.load(path)
    card.data["license"], card.data["thumbnail"] = "apache-2.0", "fox.png"
    card.data.tags.append("fox")
    card.data.eval_results.append(
        EvalResult("text-generation", "own/set", "Mine", "accuracy", 0.5, dataset_split="test")
    )
    path.write_text(str(card).replace("## Limits", "## Who made it\n\nAnn & Bob — *both*.\n\n## Limits"))
    before = ModelCard.load(path)
    evaluate(str(base_model("mistral")), task("animals"), str(run), record=True)
    after = ModelCard.load(path)
    start, end = (after.text.index(mark) for mark in ("## Evaluation", "## Use"))
    assert after.text[:start] == before.text[: before.text.index("## Evaluation")]
    assert after.text[end:] == before.text[before.text.index("## Use") :]
    own, evaluated = before.data.to_dict(), after.data.to_dict()
    assert evaluated["model-index"][0]["results"][:-1] == own.pop("model-index")[0]["results"]
    del evaluated["model-index"]
    assert evaluated == own
    assert list(evaluated) == list(own)


def test_a_card_whose_owner_took_the_table_out_gets_metadata_alone(run, base_model, task) -> None:
    path = run / "README.md"
    path.write_text("# My adapter\n")
    result = evaluate(str(base_model("mistral")), task("animals"), str(run), record=True)
    card = ModelCard.load(path)
    assert card.text == "# My adapter\n"
    assert [one.metric_value for one in card.data.eval_results] == [result["score"]]


def test_the_report_shows_what_was_recorded(run, base_model, task, tmp_path) -> None:
    result = evaluate(str(base_model("mistral")), task("animals"), str(run), record=True)
    shown = f"animals: accuracy {result['score']:.3f}, from {result['scores']['bare target']['score']:.3f} without it"
    assert shown in (run / "report.html").read_text()
    report_runs([str(run)], str(tmp_path / "anew.html"))
    assert (tmp_path / "anew.html").read_text() == (run / "report.html").read_text()
    shutil.copytree(run, tmp_path / "twin")
    described = report_runs([str(run), str(tmp_path / "twin")], str(tmp_path / "both.html"))
    assert [task["name"] for task in described["runs"]["B"]["tasks"]] == ["animals"]
    assert "<h3>animals: accuracy</h3>" in (tmp_path / "both.html").read_text()


def test_scores_of_some_runs_do_not_replace_what_all_are_ranked_by(run, base_model, task, tmp_path) -> None:
    shutil.copytree(run, tmp_path / "unscored")
    evaluate(str(base_model("mistral")), task("animals"), str(run), record=True)
    runs = report_runs([str(run), str(tmp_path / "unscored")], str(tmp_path / "both.html"))["runs"]
    assert runs["A"]["closeness"] == runs["B"]["closeness"] == runs["B"]["verdict"]
    assert runs["A"]["verdict"].startswith("animals: accuracy")
    page = (tmp_path / "both.html").read_text()
    assert page.count(escape(runs["A"]["closeness"])) == 2 and page.count("<td>not scored</td>") == 1
    unscored = report_runs([str(tmp_path / "unscored")] * 2, str(tmp_path / "neither.html"))
    assert unscored["runs"].keys() == {"A", "B"} and "not scored" not in (tmp_path / "neither.html").read_text()


def test_a_retrained_adapter_gives_the_lift(run, base_model, tmp_path, capsys) -> None:
    """It is retrained in name only, and the task is made of its answers, so that it has all of them right."""
    model, task = str(base_model("mistral")), tmp_path / "task.jsonl"
    tiny.save_adapter(tmp_path / "retrained", base_model("mistral"), tiny.LINEAR_MODULES["mistral"], lora_alpha=200)
    prompts = list(tiny.sentences(40, seed=5))

    choices = [f" {noun}" for noun in tiny.NOUNS]

    def write(completions: list[str]) -> None:
        items = zip(prompts, completions, strict=True)
        lines = [json.dumps({"prompt": prompt, "completion": right, "choices": choices}) for prompt, right in items]
        task.write_text("\n".join(lines))

    write([choices[0]] * len(prompts))
    evaluate(model, str(task), str(tmp_path / "retrained"), str(tmp_path / "items.json"))
    write([item["prediction"] for item in json.loads((tmp_path / "items.json").read_text())["items"]])
    main([
        "evaluate", "--model", model, "--task", str(task), "--adapter", str(run), "--record", "true",
        "--retrained", str(tmp_path / "retrained"), "--json", "true",
    ])  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    bare, transferred, retrained = (
        result["scores"][name]["score"] for name in ("bare target", "transferred", "retrained")
    )
    assert retrained == 1 > 0.95 > bare
    assert result["lift"]["value"] == pytest.approx((transferred - bare) / (1 - bare))
    assert recorded(run) == [("task", "accuracy", transferred), ("task", "lift", result["lift"]["value"])]
    assert f"<td>{percent(result['lift']['value'])}</td>" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"adapter": None}, "--record is about an adapter; give one with --adapter"),
        ({"adapter": None, "record": False, "retrained": "any"}, "--retrained is about an adapter"),
        ({"adapter": "plain"}, r"plain' has no castlora\.json; give folders of finished runs of castlora transfer"),
        ({"model": "llama"}, "is an adapter for 'mistral', and --model is '.*llama'; record scores on its own base"),
        ({"retrained": "/nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_a_model_is_loaded(
    run, base_model, adapter, task, monkeypatch, options, complaint
) -> None:
    contents = {path.name: path.read_bytes() for path in run.iterdir()}
    monkeypatch.setattr("castlora.scoring.load_model", None)
    given = {"model": "mistral", "adapter": str(run), "record": True, **options}
    if given["adapter"] == "plain":
        given["adapter"] = str(shutil.copytree(adapter("mistral"), run.parent / "plain"))
    with pytest.raises(UserError, match=complaint):
        evaluate(str(base_model(given.pop("model"))), task("animals"), **given)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == contents


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"has no README\.md; give a folder that castlora transfer wrote"),
        ("---\n- a\n---\n", r"README\.md in .* is no model card .*; mend the metadata above its text"),
        ("---\na: [\n---\n", r"README\.md in .* is no model card"),
        ("---\nmodel-index: [{name: a}]\n---\n", r"README\.md in .* is no model card"),
    ],
)
def test_a_card_that_cannot_be_read_is_left_alone(run, base_model, task, monkeypatch, content, complaint) -> None:
    monkeypatch.setattr("castlora.scoring.load_model", None)
    (run / "README.md").unlink()
    if content is not None:
        (run / "README.md").write_text(content)
    with pytest.raises(UserError, match=complaint):
        evaluate(str(base_model("mistral")), task("animals"), str(run), record=True)


def test_a_killed_recording_leaves_files_that_are_whole(run, base_model, task, monkeypatch) -> None:
    """Killed after any file, it is made whole by the same command."""
    monkeypatch.setattr("castlora.publishing.record.add_scores", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(base_model("mistral")), task("animals"), str(run), record=True)
    assert len(read_run(str(run)).report.skills) == 1
    monkeypatch.undo()
    assert recorded(run) == []
    evaluate(str(base_model("mistral")), task("animals"), str(run), record=True)
    assert len(recorded(run)) == len(read_run(str(run)).report.skills) == 1


def test_hostile_task_names_do_nothing_in_the_card(run, base_model, task, tmp_path) -> None:
    path = Path(task("animals")).rename(tmp_path / "a`](x)<script>| --- license: mit.jsonl")
    evaluate(str(base_model("mistral")), str(path), str(run), record=True)
    metadata = yaml.safe_load((run / "README.md").read_text().split("\n---\n")[0].removeprefix("---\n"))
    assert "license" not in metadata
    assert recorded(run)[0][0] == "a-x-script-----license-mit"
    assert "<script>" not in (run / "report.html").read_text()


def test_a_new_card_says_what_a_card_says_that_was_scored_later(run, base_model, task) -> None:
    evaluate(str(base_model("mistral")), task("animals"), str(run), record=True)
    read = read_run(str(run)).report
    assert make_card(read.manifest, read.skills).content == (run / "README.md").read_text()
