"""Skills that are tasks of lm-evaluation-harness, from task files of our own."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny

from castlora.bench.harness import check_task, harness_figures, item_scores
from castlora.bench.quality import run_quality
from castlora.bench.spec import BenchmarkModel, BenchmarkSpec
from castlora.bench.tables import write_page
from castlora.cli import main
from castlora.errors import UserError
from castlora.evaluation.accuracy import evaluate_model
from castlora.evaluation.tasks import load_task
from castlora.models.completions import CausalLM

CHOICES = [" fox", " hen", " river"]
CHOOSE = """
task: animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{choices.index(completion)}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
WRITE = """
task: spelling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: {metric}}}]
"""


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    lines = (
        {"prompt": f"Who? {sentence} Answer:", "completion": CHOICES[number % 3], "choices": CHOICES}
        for number, sentence in enumerate(tiny.sentences(12))
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module", autouse=True)
def quick_harness():
    """Spares what takes longer than all tests here: its own thousands of task files, and `pip list` for each score."""
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def tasks(items, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("harness")
    (folder / "animals.yaml").write_text(CHOOSE.format(items=items))
    (folder / "spelling.yaml").write_text(WRITE.format(items=items, metric="exact_match"))
    (folder / "away.yaml").write_text(CHOOSE.format(items="/nowhere.jsonl").replace("task: animals", "task: away"))
    return str(folder)


@pytest.fixture
def model(base_model) -> CausalLM:
    return tiny.load(base_model("llama"))


def test_the_harness_scores_choices_as_we_do(model, base_model, items, tasks):
    tokenizer = tiny.tokenizer_of(base_model("llama"))
    ours = evaluate_model(model, tokenizer, load_task(items))
    theirs = harness_figures(model, tokenizer, "animals", tasks, 0)
    assert theirs["scores"] == "".join(str(int(score)) for score in ours.scores)
    assert (theirs["metric"], theirs["n"], theirs["score"], theirs["nll"]) == ("acc", 12, ours.score, None)
    assert 0 < ours.score < 1 and theirs["ci95"] == ours.ci95


def test_what_a_model_writes_is_matched(model, base_model, tasks):
    found = harness_figures(model, tiny.tokenizer_of(base_model("llama")), "spelling", tasks, 0)
    assert (found["metric"], found["n"], len(found["scores"])) == ("exact_match", 12, 12)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([{"filter": "none", "acc": 1.0, "acc_norm": 0.0}, {"filter": "none", "acc": 0.0}], ("acc", [1, 0])),
        (
            [{"filter": "strict", "exact_match": 0.0}, {"filter": "flexible", "exact_match": 1.0}],
            ("exact_match, strict", [0]),
        ),
    ],
)
def test_the_first_filter_and_the_first_binary_metric_count(samples, expected):
    metric, scores = item_scores("a task", samples)
    assert (metric, scores.tolist()) == expected


@pytest.mark.parametrize("sample", [{"filter": "none", "bleu": 3.2}, {"filter": "none", "acc": 0.5}])
def test_a_task_without_a_binary_score_is_refused(sample):
    with pytest.raises(UserError, match="--lm-eval 'a task' gives items no acc or exact_match; choose a task that"):
        item_scores("a task", [sample])


def test_a_task_whose_data_is_missing_is_named(model, base_model, tasks):
    check_task("away", tasks)
    with pytest.raises(UserError, match="--lm-eval 'away' cannot be run"):
        harness_figures(model, tiny.tokenizer_of(base_model("llama")), "away", tasks, None)


def test_a_benchmark_runs_on_tasks_of_the_harness(base_model, adapter, text_file, tasks, tmp_path):
    models = {}
    for name in ("llama", "mistral"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "animals").symlink_to(adapter(name))
        models[name] = BenchmarkModel(str(base_model(name)), str(tmp_path / "adapters" / name / "{skill}"))
    spec = BenchmarkSpec(models, ["llama:mistral"], [], "unused", str(text_file)).of_harness(["animals"], tasks, 0)
    out = tmp_path / "records"
    short = {"steps": 2, "batch_size": 2, "passages": 8, "max_length": 64, "running_length": 24}
    run_quality(spec.narrowed(regimes=["none"]), out, None, seeds=1, **short)
    general = spec.narrowed(regimes=["general"])
    run_quality(general, out, ["paper"], seeds=1, **short)
    write_page(out, tmp_path / "results.md")
    runs = [json.loads(path.read_text()) for path in out.rglob("*.seed0.json")]
    assert {run["method"] for run in runs} == {"direct copy", "Cross-LoRA", "Cross-LoRA, projected", "LoRA-X", "paper"}
    assert all(run["metric"] == "acc" and run["n"] == 12 for run in runs)
    assert "| llama → mistral | animals |" in (tmp_path / "results.md").read_text()
    with pytest.raises(UserError, match="Skill 'animals' has no"):
        replace(spec, lm_eval=[]).narrowed(regimes=["none"])


def test_an_unknown_task_is_refused_before_anything_is_written(tasks, tmp_path, capsys):
    options = ["--lm-eval", "gsm9k", "--lm-eval-tasks", tasks]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "quality", "--out", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2
    assert f"--lm-eval 'gsm9k' is no task of lm-evaluation-harness or in {tasks!r}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
