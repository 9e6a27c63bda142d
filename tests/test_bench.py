import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny
import yaml
from filelock import FileLock

from castlora import config
from castlora.bench import grid, reading
from castlora.bench.methods import METHODS
from castlora.bench.quality import plan_runs, run_quality
from castlora.bench.spec import BenchmarkModel, BenchmarkSpec, read_spec
from castlora.bench.tables import write_page
from castlora.bench.trained import Distilled
from castlora.cli import main
from castlora.errors import UserError

OTHER_SKILL = "control: adapter of another skill"
CHOICES = [" fox", " hen", " river"]
LITTLE = {"rehearsal_passages": 8, "rehearsal_tokens": 12}
# The source would answer hundreds of variants of a few prompts.
AS_GIVEN = replace(config.DEFAULT, fewest_prompts=0)


def write_lines(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture(autouse=True)
def little_is_read(monkeypatch):
    monkeypatch.setitem(config.RECIPES, "default", AS_GIVEN)
    write = reading.write_rehearsed
    monkeypatch.setattr(
        reading, "write_rehearsed", lambda models, recipe, seed: write(models, replace(recipe, **LITTLE), seed)
    )


@pytest.fixture
def spec(base_model, adapter, text_file, tmp_path) -> BenchmarkSpec:
    """A llama and a mistral with an adapter each for one skill, and all files that a skill can have."""
    folder = tmp_path / "tasks" / "animals"
    folder.mkdir(parents=True)
    items = [
        {"prompt": f"Who? {sentence} Answer:", "completion": CHOICES[i % 3], "choices": CHOICES}
        for i, sentence in enumerate(tiny.sentences(24))
    ]
    write_lines(folder / "test.jsonl", items[:9])
    write_lines(folder / "train.jsonl", items[9:])
    write_lines(folder / "prompts.jsonl", [{"prompt": item["prompt"]} for item in items[9:]])
    (folder / "skill.json").write_text(json.dumps({"prompt_format": "Who? {text} Answer:"}))
    models = {}
    for name in ("llama", "mistral"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "animals").symlink_to(adapter(name))
        models[name] = BenchmarkModel(str(base_model(name)), str(tmp_path / "adapters" / name / "{skill}"))
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("\n\n".join(tiny.sentences(8, seed=7)), encoding="utf-8")
    tasks = str(tmp_path / "tasks")
    return BenchmarkSpec(models, ["llama:mistral"], ["animals"], tasks, str(text_file), held_out_text=str(held_out))


def records(out: Path) -> dict[tuple[str, str], dict[str, object]]:
    runs = [json.loads(path.read_text()) for path in out.rglob("*.seed0.json")]
    return {(run["method"], run["regime"]): run for run in runs}


def run_briefly(spec: BenchmarkSpec, out: Path, methods: list[str] | None = None) -> None:
    run_quality(spec, out, methods, seeds=1, steps=2, batch_size=2, passages=8, max_length=64, running_length=24)


def kind(name: str) -> object:
    """What tells a method from others that differ in numbers alone."""
    method = METHODS[name]
    if type(method) is not Distilled:
        return name
    text, weights = method.tuning.write_answers, (method.tuning.kl_weight, method.tuning.mse_weight)
    return method.recipe, method.start, method.is_trained, method.tuning.trained, text, weights


def test_every_kind_of_method_runs_and_the_page_shows_it(spec, tmp_path, monkeypatch):
    monkeypatch.setattr("castlora.bench.untrained._LABELLED_STEPS", 2)
    out = tmp_path / "records"
    methods = list({kind(name): name for name in reversed(METHODS) if name != OTHER_SKILL}.values())
    without_prompts = [name for name in methods if not {"none", "prompts"} & set(METHODS[name].regimes)]
    run_briefly(spec.narrowed(regimes=["none", "prompts"]), out, methods)
    run_briefly(spec.narrowed(regimes=["general", "format"]), out, without_prompts)
    found = records(out)
    assert {name for name, _ in found} == set(methods) >= {"default", "paper", "closed form", "logit-delta oracle"}
    assert all(regime in METHODS[name].regimes for name, regime in found)
    assert all(0 <= run["score"] <= 1 and len(run["scores"]) == 9 for run in found.values())
    assert {name for name, run in found.items() if "text_loss" not in run} == {("logit-delta oracle", "none")}
    write_page(out, tmp_path / "results.md")
    page = (tmp_path / "results.md").read_text()
    assert (
        "| llama → mistral | animals |" in page
        and "## Unlabelled task prompts" in page
        and "## General ability" in page
    )


def test_standard_output_has_the_page_alone_and_quiet_no_progress(spec, tmp_path, capsys, caplog):
    written, out = tmp_path / "spec.yaml", tmp_path / "out"
    written.write_text(yaml.safe_dump(asdict(spec)))
    options = ["--spec", str(written), "--out", str(out), "--seeds", "1", "--regimes", "none"]
    command = ["bench", "quality", *options, "--methods"]
    main([*command, "direct copy"])
    assert capsys.readouterr().out == f"Wrote {out / 'results.md'}\n"
    assert re.search(r"direct-copy\.none\.seed0\.json: accuracy 0\.\d{3}$", caplog.text, flags=re.MULTILINE)
    caplog.clear()
    main([*command, "Cross-LoRA", "--quiet"])
    assert caplog.text == ""


def test_several_lengths_draw_steps_against_lift_and_share_what_does_not_depend_on_them(spec, tmp_path, capsys):
    written, out = tmp_path / "spec.yaml", tmp_path / "out"
    written.write_text(yaml.safe_dump(asdict(spec)))
    options = ["--spec", str(written), "--out", str(out), "--seeds", "1", "--regimes", "none,prompts"]
    command = ["bench", "quality", *options, "--methods", "fresh,direct copy", "--batch-size"]
    main([*command, "2", "--steps", "2,3"])
    folder = out / "quality" / "{steps}" / "llama--mistral" / "animals"
    longest, shorter = (Path(str(folder).format(steps=steps)) for steps in (3, 2))
    assert len(list(longest.glob("*.seed0.json"))) == 2
    assert {path.name for path in shorter.glob("*.seed0.json")} == {"fresh.prompts.seed0.json"}
    assert json.loads((shorter / "fresh.prompts.seed0.json").read_text())["recipe"]["steps"] == 2
    assert (shorter / "references.json").read_bytes() == (longest / "references.json").read_bytes()
    # Adapters of random weights have nothing to gain; these say that there is something.
    record = json.loads((longest / "references.json").read_text())
    record["references"]["bare target"] |= {"score": 0.0, "scores": "0" * 9}
    record["references"]["retrained"] |= {"score": 1.0, "scores": "1" * 9}
    for folder in (longest, shorter):
        (folder / "references.json").write_text(json.dumps(record))
    # One more number of steps adds a point, and the page remains that of the greatest.
    main([*command, "2", "--steps", "1"])
    shortest = longest.parents[2] / "1" / "llama--mistral" / "animals"
    assert (shortest / "references.json").read_bytes() == (longest / "references.json").read_bytes()
    assert {path.name for path in shortest.glob("*.seed0.json")} == {"fresh.prompts.seed0.json"}
    page = (out / "results.md").read_text()
    assert "1 transfers of 3 steps × 2 passages" in page and "| steps | fresh (1 cell) |" in page
    assert all(f"\n| {steps} | " in page for steps in (1, 2, 3))
    assert (out / "results-steps-prompts.svg").is_file()
    with pytest.raises(SystemExit):
        main([*command, "1", "--steps", "4"])
    assert "holds runs with batch_size 2, not 1; give another folder" in capsys.readouterr().err
    assert not (out / "quality" / "4").exists()


def test_the_adapter_of_another_skill_is_moved_and_tested_on_this_one(spec, tmp_path, adapter):
    folder = Path(spec.tasks)
    shutil.copytree(folder / "animals", folder / "birds")
    birds = [json.loads(line) for line in (folder / "birds" / "test.jsonl").read_text().splitlines()]
    write_lines(folder / "birds" / "test.jsonl", birds[:5])
    for name in ("llama", "mistral"):
        (tmp_path / "adapters" / name / "birds").symlink_to(adapter(name, r=2))
    both = replace(spec, skills=["animals", "birds"]).narrowed(regimes=["prompts"])
    run_briefly(both, tmp_path / "records", [OTHER_SKILL])
    found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("control-*.json")}
    assert {skill: (run["moved"], run["n"]) for skill, run in found.items()} == {
        "animals": ("birds", 9), "birds": ("animals", 5),
    }  # fmt: skip


def test_a_plain_lora_learns_what_nonlinear_maps_have_learned(spec, tmp_path):
    method = "paper start, nonlinear, distilled"
    narrowed = spec.narrowed(regimes=["prompts"])
    run_quality(narrowed, tmp_path, [method], seeds=1, steps=12, batch_size=4, passages=8, max_length=64)
    run = records(tmp_path)[method, "prompts"]
    for before, after in (run["networks"]["held_out_kl"], run["held_out_kl"]):
        assert after < before
    bare_target = run["held_out_kl"][0]
    assert bare_target != pytest.approx(run["networks"]["held_out_kl"][0])  # another teacher


def test_what_is_there_is_not_run_again_and_what_another_process_runs_is_left_to_it(spec, tmp_path, monkeypatch):
    spec = spec.narrowed(regimes=["none"])
    run_briefly(spec, tmp_path, ["direct copy"])
    path = next(tmp_path.rglob("direct-copy.none.seed0.json"))
    path.write_text(path.read_text().replace('"score"', '"kept": true, "score"'))
    with FileLock(path.parent / "none.seed0.lock"):
        run_briefly(spec, tmp_path, ["direct copy", "LoRA-X"])
    assert ("LoRA-X", "none") not in records(tmp_path)
    run_briefly(spec, tmp_path, ["direct copy", "LoRA-X"])
    assert records(tmp_path)["direct copy", "none"]["kept"] is True
    assert ("LoRA-X", "none") in records(tmp_path)


def test_runs_of_other_length_are_not_mixed_in(spec, tmp_path):
    spec = spec.narrowed(regimes=["none"])
    run_briefly(spec, tmp_path, ["direct copy"])
    with pytest.raises(UserError, match="holds runs with steps 2, not 3; give another folder"):
        run_quality(spec, tmp_path, ["direct copy"], 1, steps=3, batch_size=2, passages=8, max_length=64)


def test_runs_on_other_items_or_adapters_are_not_mixed_in(spec, tmp_path, adapter):
    spec, out = spec.narrowed(regimes=["none"]), tmp_path / "records"
    run_briefly(spec, out, ["direct copy"])
    run_briefly(spec, out, ["direct copy"])
    items = Path(spec.tasks) / "animals" / "test.jsonl"
    as_it_was = items.read_text()
    items.write_text(as_it_was.replace("Who?", "What?"))
    with pytest.raises(UserError, match="animals was measured with other test items; give another folder"):
        run_briefly(spec, out, ["LoRA-X"])
    items.write_text(as_it_was)
    of_target = tmp_path / "adapters" / "mistral" / "animals"
    of_target.unlink()
    of_target.symlink_to(adapter("mistral", r=2))
    with pytest.raises(UserError, match="animals was measured with other target adapter weights; give another folder"):
        run_briefly(spec, out, ["LoRA-X"])


def test_text_is_written_once_for_all_starts_and_schedules(spec, tmp_path, monkeypatch):
    written = []
    teach = grid.teach_text
    monkeypatch.setattr(grid, "teach_text", lambda *args: written.append(args) or teach(*args))
    spec = spec.narrowed(regimes=["prompts"])
    for steps, batch_size in ((2, 2), (3, 1)):
        out = tmp_path / f"results-{steps}"
        run_quality(spec, out, ["default", "ridge start"], 1, steps, batch_size, passages=8, max_length=64)
        assert len(records(out)) == 2
    assert len(written) == 1


def test_seeds_come_outermost_and_weights_alone_have_none(spec):
    planned = plan_runs(spec, ["fresh", "direct copy"], seeds=2)
    assert [(cell.seed, cell.regime) for cell in planned] == [
        (0, "none"), (0, "general"), (0, "format"), (0, "prompts"), (1, "general"), (1, "format"), (1, "prompts"),
    ]  # fmt: skip
    assert list(planned.values()) == [["direct copy"], *[["fresh"]] * 6]


def test_a_specification_is_read_with_paths_beside_it(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "adapters").mkdir()
    (tmp_path / "small").mkdir()
    (tmp_path / "bench.yaml").write_text(
        "models:\n"
        "  small: {base: small, adapters: 'adapters/{skill}'}\n"
        "  large: {base: org/large, adapters: 'org/large-{skill}'}\n"
        "pairs: ['small:large']\nskills: [colours]\ntasks: tasks\nregimes: [prompts]\n"
    )
    spec = read_spec(str(tmp_path / "bench.yaml"))
    assert spec.base("small") == str(tmp_path / "small") and spec.base("large") == "org/large"
    assert spec.adapter("small", "colours") == str(tmp_path / "adapters" / "colours")
    assert spec.adapter("large", "colours") == "org/large-colours"
    assert spec.tasks == str(tmp_path / "tasks") and spec.text is None and spec.regimes == ["prompts"]


def test_the_bundle_is_a_benchmark_without_general_text():
    spec = read_spec(None).narrowed()
    assert spec.pairs == ["llama-s:mistral-s"] and spec.regimes == ["none", "prompts"]
    assert not spec.has_labels()
    with pytest.raises(UserError, match=r"has no .*train\.jsonl"):
        spec.training_items("question-type")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--spec", "nowhere.yaml"], "--spec 'nowhere.yaml' is not a file"),
        (["--spec", "BROKEN"], 'is no benchmark: Parser key "models"'),
        (["--pairs", "llama-s:gpt2"], "Pair 'llama-s:gpt2' is not SOURCE:TARGET of the models llama-s, mistral-s."),
        (["--skills", "cooking"], "Skill 'cooking' has no"),
        (["--regimes", "none,all"], "Regime 'all' is unknown; choose from none, general, format, prompts."),
        (["--steps", "20,0"], "steps is '20,0'; give whole numbers above 0, with commas between."),
        (["--steps", "20x"], "steps is '20x'; give whole numbers above 0, with commas between."),
        (["--seeds", "0"], "seeds is 0; give 1 or more."),
        (
            ["--methods", "magic"],
            "Method 'magic' is unknown; choose from default; default, prompts taught; default, hidden states; default,",
        ),
    ],
)
def test_a_benchmark_that_cannot_run_is_refused_and_nothing_is_written(options, complaint, tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("models: {small: {base: 3}}\n")
    options = [option.replace("BROKEN", str(tmp_path / "broken.yaml")) for option in options]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "quality", "--out", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_methods_are_named_with_commas_between(monkeypatch, tmp_path):
    asked = []

    def run_lengths(*given):
        asked.append(given)
        (tmp_path / "quality" / "800").mkdir(parents=True)

    monkeypatch.setattr("castlora.bench.lengths.run_lengths", run_lengths)
    monkeypatch.setattr("castlora.bench.tables.write_page", lambda *_: None)
    main(["bench", "quality", "--out", str(tmp_path), "--methods", "fresh,Cross-LoRA, projected,paper", "--seeds", "1"])
    assert asked[0][1:3] == (tmp_path / "quality", ["fresh", "Cross-LoRA, projected", "paper"])
