import inspect
import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from preloaded import Started
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from castlora import commands, pipeline, push, steer, teach, transfer
from castlora.cli import main
from castlora.config import Tuning

DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """What `castlora transfer` hands to the library, which does nothing."""
    made: list[dict] = []
    signature = inspect.signature(transfer)

    def record(*values, **options) -> SimpleNamespace:
        made.append(signature.bind(*values, **options).arguments)
        return SimpleNamespace(manifest={})

    monkeypatch.setattr(pipeline, "transfer", record)
    return made


@pytest.fixture
def settings(base_model, adapter, text_file, tmp_path) -> dict[str, str]:
    """A request that works; tests spoil one thing each."""
    return {
        "adapter": str(shutil.copytree(adapter("llama", ("q_proj", "v_proj")), tmp_path / "adapter")),
        "target": str(base_model("mistral")),
        "text": str(text_file),
        "out": str(tmp_path / "out"),
        "steps": "2",
        "tuning.max-length": "40",
        "tuning.passages": "8",
        "tuning.filled-passages": "8",
        "tuning.format-candidates": "0",
        "tuning.rehearsal-passages": "8",
    }


def words(settings: dict[str, str], command: str = "transfer") -> list[str]:
    return [command, *(word for key, value in settings.items() for word in (f"--{key}", value))]


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command ends that cannot work."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("castlora: ")]
    assert captured.err.splitlines()[-1:] == lines
    assert "Traceback" not in captured.err
    assert lines[0].endswith(".") and ". " not in lines[0]
    return lines[0]


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put_nan(path: Path, key: str) -> None:
    tensors = load_file(path)
    tensors[key].view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def changed_adapter(**changes: object):
    return lambda settings, _folder: edit(Path(settings["adapter"]) / "adapter_config.json", **changes)


def corrupt_config(settings, _folder):
    (Path(settings["adapter"]) / "adapter_config.json").write_text('{"peft_type": "LORA",')


def truncated_adapter(settings, _folder):
    path = Path(settings["adapter"]) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled_adapter(settings, _folder):
    path = Path(settings["adapter"]) / "adapter_model.safetensors"
    path.rename(path.with_name("adapter_model.bin"))


def adapter_with_nan(settings, _folder):
    path = Path(settings["adapter"]) / "adapter_model.safetensors"
    put_nan(path, next(iter(load_file(path))))


def model_with_nan(settings, folder):
    settings["target"] = str(shutil.copytree(settings["target"], folder / "model"))
    put_nan(folder / "model" / "model.safetensors", "model.embed_tokens.weight")


def encoder(settings, folder):
    BertConfig(hidden_size=32, num_attention_heads=2, architectures=["BertModel"]).save_pretrained(folder / "bert")
    settings["target"] = str(folder / "bert")


def empty_text(settings, folder):
    (folder / "empty.txt").touch()
    settings["text"] = str(folder / "empty.txt")


def filled_out(settings, _folder):
    Path(settings["out"]).mkdir()
    (Path(settings["out"]) / "notes.txt").write_text("mine")


def setting(**changes: str):
    return lambda settings, _folder: settings.update({key.replace("__", "."): value for key, value in changes.items()})


BAD_INPUTS = {
    "missing adapter": (setting(adapter="/nowhere"), "Adapter '/nowhere' is not a folder"),
    "corrupt configuration": (corrupt_config, "adapter_config.json of "),
    "truncated adapter": (truncated_adapter, "is damaged or cut short"),
    "pickled adapter": (
        pickled_adapter,
        "only a pickled adapter_model.bin; make a safe copy of it first: castlora convert",
    ),
    "adapter with NaN": (adapter_with_nan, "adapter_model.safetensors of "),
    "DoRA without its magnitudes": (changed_adapter(use_dora=True), "it lacks 'base_model.model.model.layers.0."),
    "PiSSA": (changed_adapter(init_lora_weights="pissa"), "PiSSA changed the base model before training; make a plain"),
    "trained head without its weights": (changed_adapter(modules_to_save=["lm_head"]), "it lacks 'base_model.model.lm"),
    "another shape": (changed_adapter(r=8), "has shape (4, 32), the base needs (8, 32); name the base"),
    "no base named": (changed_adapter(base_model_name_or_path=None), "names no base model; name it with --source"),
    "missing base": (changed_adapter(base_model_name_or_path="/gone"), "Model '/gone' is not a folder"),
    "missing target": (setting(target="/nowhere"), "Model '/nowhere' is not a folder"),
    "missing target below here": (setting(target="models/my/llama"), "Model 'models/my/llama' is not a folder"),
    "base that cannot be had": (
        changed_adapter(base_model_name_or_path="nobody/nothing"),
        "name the adapter's base model, a folder or hub id, with --source",
    ),
    "encoder": (encoder, "(BertModel) is not a decoder-only language model"),
    "model with NaN": (model_with_nan, "hold NaN or infinity in 'model.embed_tokens.weight'"),
    "missing text": (setting(text="/nowhere.txt"), "--text '/nowhere.txt' does not exist"),
    "missing text above": (setting(text="../nowhere.md"), "--text '../nowhere.md' does not exist"),
    "empty text": (empty_text, "holds no text; give a file with at least one paragraph"),
    "missing prompts": (setting(prompts="/nowhere.txt"), "--prompts '/nowhere.txt' is not a file"),
    "format without slot": (setting(prompt_format="Question:"), "--prompt-format has no {text} slot"),
    "format and prompts": (setting(prompt_format="{text}", prompts="x"), "--prompts and --prompt-format are two"),
    "filled folder": (filled_out, "is not empty; give a new folder, nothing is ever overwritten"),
    "no steps": (setting(steps="-1"), "steps is -1; give 0 or more"),
    "negative weight": (setting(tuning__ridge="-1"), "ridge is -1.0; give 0 or more"),
    "infinite temperature": (setting(tuning__temperature=".inf"), "temperature is inf; give a number above 0"),
    "negative seed": (setting(seed="-1"), "seed is -1; give a whole number"),
    "odd rank": (setting(rank="12"), "--rank 12 is not a rank that all serving engines accept; give 16"),
    "large rank": (setting(rank="256"), "Rank 256 is above 128"),
    "long passages": (setting(**{"tuning.max-length": "97"}), "reads 96 tokens; give --tuning.max-length 96 or less"),
    "a word for a number": (setting(steps="many"), "--steps does not accept 'many'"),
    "unknown start": (setting(start="warm"), "--start does not accept 'warm'"),
    "unknown option": (setting(learning_rate="1"), "unrecognized arguments: --learning-rate 1"),
    "missing config file": (setting(config="/nowhere.yaml"), "--config: File does not exist: '/nowhere.yaml'"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_ends_with_one_sentence_and_writes_nothing(case, settings, capsys, tmp_path):
    spoil, expected = BAD_INPUTS[case]
    spoil(settings, tmp_path)
    out = Path(settings["out"])
    before = [path.name for path in out.iterdir()] if out.exists() else None
    assert expected in complaint(words(settings), capsys)
    assert ([path.name for path in out.iterdir()] if out.exists() else None) == before


@pytest.mark.parametrize("other", ["mistral", "gpt2"])
def test_an_adapter_for_another_base_is_recognised(settings, capsys, base_model, other):
    expected = "does not fit its base model"
    message = complaint(words(settings | {"source": str(base_model(other))}), capsys)
    assert expected in message and "name the base it was trained on with --source" in message
    assert not Path(settings["out"]).exists()


def test_a_full_disk_is_noticed_before_anything_is_written(settings, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: DiskUsage(9, 9, 1 << 20))
    assert "MiB of disk and 1 MiB are free; make room" in complaint(words(settings), capsys)
    assert not Path(settings["out"]).exists()


def test_other_settings_do_not_go_into_an_interrupted_run(settings, capsys, monkeypatch):
    def interrupt(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as caught:
        patched.setattr(pipeline, "start_student", interrupt)
        main(words(settings))
    assert caught.value.code == 130
    assert "the same command continues transfer or teach where it was" in capsys.readouterr().err
    assert "holds an interrupted run with other settings" in complaint(words(settings | {"steps": "3"}), capsys)
    assert [path.name for path in Path(settings["out"]).iterdir()] == [".castlora"]


def test_a_transfer_of_a_few_steps(settings, checked_in_process, caplog):
    main(words(settings))
    assert (Path(settings["out"]) / "adapter_config.json").exists()
    assert "Held-out KL to source + LoRA" in caplog.text


def test_inspect_prints_the_pairing(settings, capsys):
    main(words({key: settings[key] for key in ("adapter", "target")}, "inspect"))
    assert "target module <- source module(roles)" in capsys.readouterr().out


def test_both_spellings_of_an_option(settings, calls):
    dashed = {"prompt-format": "Q: {text}", "batch-size": "3", "tuning.answer-tokens": "5"}
    main(words(settings | dashed))
    main(words(settings | {key.replace("-", "_"): value for key, value in dashed.items()}))
    main([*words(settings), *(f"--{key}={value}" for key, value in dashed.items())])
    assert calls[0] == calls[1] == calls[2]
    assert (calls[0]["prompt_format"], calls[0]["batch_size"]) == ("Q: {text}", 3)
    assert (calls[0]["tuning"].answer_tokens, calls[0]["tuning"].max_length) == (5, 40)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("### {text}", "### {text}"),
        ("# {text}\n#", "# {text}\n#"),
        ("null", "null"),
        (r"Question: {text}\nAnswer:", "Question: {text}\nAnswer:"),
        ("[INST] {text} [/INST]", "[INST] {text} [/INST]"),
        ("- {text} -", "- {text} -"),
        ("-- Q-A: {text} --", "-- Q-A: {text} --"),
    ],
)
def test_a_prompt_format_means_what_is_typed(settings, calls, typed, meant):
    main(words(settings | {"prompt-format": typed}))
    assert calls[0]["prompt_format"] == meant


def test_without_a_prompt_format_there_is_none(settings, calls):
    main(words(settings))
    assert calls[0]["prompt_format"] is None


def test_settings_from_a_file_give_way_to_options(settings, calls, tmp_path):
    content = {"seed": 4, "steps": 9, "tuning": {"passages": 5, "mse_weight": 0.5}, "prompt_format": "### {text}"}
    content |= {key: settings[key] for key in ("adapter", "target", "out")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    main(["transfer", "--config", str(tmp_path / "run.yaml"), "--steps", "3", "--tuning.passages", "6"])
    assert (calls[0]["seed"], calls[0]["steps"], calls[0]["prompt_format"]) == (4, 3, "### {text}")
    assert calls[0]["tuning"] == Tuning(passages=6, mse_weight=0.5)


@pytest.mark.parametrize("content", [{"stepz": 3}, {"tuning": {"stepz": 3}}], ids=["outer", "inner"])
def test_unknown_keys_of_a_file_are_refused(settings, calls, tmp_path, capsys, content):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings_without_dots(settings) | content))
    assert "stepz" in complaint(["transfer", "--config", str(tmp_path / "run.yaml")], capsys)
    assert calls == []


def settings_without_dots(settings: dict[str, str]) -> dict[str, object]:
    return {key: value for key, value in settings.items() if key in ("adapter", "target", "out")}


def test_the_settings_can_be_printed_and_read_back(settings, calls, capsys, tmp_path):
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*words(settings), "--print_config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["tuning"]["passages"] == 8
    (tmp_path / "printed.yaml").write_text(printed)
    main(["transfer", "--config", str(tmp_path / "printed.yaml")])
    main(words(settings))
    assert calls[0] == calls[1]


@pytest.mark.parametrize("typed", [[], ["move"], ["transfer"], ["transfer", "--adapter"], ["inspect", "--out", "x"]])
def test_incomplete_commands_are_explained_in_one_sentence(typed, capsys):
    assert complaint(typed, capsys).startswith("castlora: ")


@pytest.mark.parametrize(
    ("command", "function"),
    [
        (commands._transfer, transfer),
        (commands._teach, teach),
        (commands._push, push),
        (commands._steer, steer),
    ],
)
def test_the_commands_take_what_the_library_takes(command, function):
    others = ("json", "push_to_hub", "private" if command is commands._transfer else "")
    expected = list(inspect.signature(function).parameters)
    assert [name for name in inspect.signature(command).parameters if name not in others] == expected


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "castlora", *arguments], capture_output=True, text=True, check=False)


def test_bad_input_in_a_process_of_its_own(tmp_path):
    words = ["transfer", "--adapter", "/nowhere", "--target", "x", "--out", str(tmp_path / "out")]
    started = Started(tmp_path / "said", main, words)
    assert (started.exit_code, started.stdout) == (2, "")
    assert started.stderr.splitlines() == [
        "castlora: Adapter '/nowhere' is not a folder; give the folder that PEFT saved, or a hub id."
    ]
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_in_a_process_of_its_own():
    finished = run("inspect", "--adaptor", "x")
    assert finished.returncode == 2
    assert finished.stderr.startswith("castlora: ") and finished.stderr.count("\n") == 1


def test_runs_say_as_much_as_is_asked_for(settings):
    asked = {name: settings[name] for name in settings.keys() - {"target", "steps", "tuning.rehearsal-passages"}}
    said = {}
    for option in ("", "-q", "-v"):
        finished = run(*words(asked | {"out": f"{settings['out']}{option}.jsonl"}, "teach"), *option.split())
        assert (finished.returncode, finished.stdout) == (0, "")
        said[option] = finished.stderr
    # Libraries may still warn.
    assert not re.search("batch/s|Wrote|Text:", said["-q"])
    assert re.search("^Wrote ", said[""], flags=re.MULTILINE) and "batch/s" in said[""]
    assert re.search(r"^\d{4}-\d\d-\d\d .* castlora: Wrote ", said["-v"], flags=re.MULTILINE)
    assert "loading configuration file" in said["-v"] and "loading configuration file" not in said[""]


def test_quiet_and_verbose_exclude_each_other(settings, calls, capsys):
    assert "--quiet and --verbose" in complaint([*words(settings), "-q", "-v"], capsys)
    assert calls == []


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_complete_commands_and_options(shell, tmp_path):
    finished = run("--print-completion", f"shtab-{shell}")
    assert all(name in finished.stdout for name in (*commands.COMMANDS, "--adapter", "tensorboard"))
    if shutil.which(shell):
        (tmp_path / "script").write_text(finished.stdout)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_options_complete_as_people_type_them(tmp_path):
    (tmp_path / "script").write_text(run("--print-completion", "shtab-bash").stdout)
    typed = "source ./script; COMP_WORDS=({}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
    asked = typed + "_shtab_castlora; echo ${{COMPREPLY[@]}}"

    def completed(words: str) -> list[str]:
        command = ["bash", "-c", asked.format(words)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()

    assert completed("castlora ins") == ["inspect"]
    assert completed("castlora transfer --prompt-f") == ["--prompt-format"]
    assert completed("castlora transfer --tuning.kl") == ["--tuning.kl-weight"]
    assert completed("castlora transfer --recipe pa") == ["paper"]
    assert completed("castlora steer --batch_") == []


def test_a_tracker_that_is_not_installed_is_named(settings, monkeypatch, capsys):
    monkeypatch.setattr("castlora.distillation.tracking.find_spec", lambda name: None)
    said = complaint(words(settings | {"report-to": "wandb"}), capsys)
    assert "--report-to wandb" in said and "pip install wandb" in said
    assert not Path(settings["out"]).exists()


def test_results_are_printed_as_json_for_scripts(settings, capsys, tmp_path, task, checked_in_process):
    main(words(settings | {"json": "true"}))
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == json.loads((tmp_path / "out" / "castlora.json").read_text())

    main(["evaluate", "--model", settings["target"], "--task", task("animals", 1), "--json", "true"])
    result = json.loads(capsys.readouterr().out)
    assert result["metric"] == "accuracy" and result["n"] == 1
    with pytest.raises(SystemExit) as ended:
        main(["check", str(tmp_path / "out"), "--json", "true"])
    (broken,) = json.loads(capsys.readouterr().out)
    assert ended.value.code == commands.NOT_PORTABLE and broken["rule"] == "base by name"
