"""Runs that are interrupted go on to the same bytes; the commands of `benchmarks.faults` disturb many more."""

import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from preloaded import Started, run_castlora
from safetensors.torch import load_file

from castlora import UserError, config, pipeline
from castlora.cli import main
from castlora.distillation.training import TRAINABLE_FILE, DistillationTrainer

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "castlora.json", "report.html", "report.json"]


def weights(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


def test_a_run_with_other_settings_does_not_touch_an_interrupted_one(quick_transfer, tmp_path, monkeypatch):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline, "train_student", interrupt)
        quick_transfer("llama", "gpt2")
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds an interrupted run with other settings"):
        quick_transfer("llama", "gpt2", seed=1)
    assert kept == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    quick_transfer("llama", "gpt2")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES


@pytest.mark.parametrize("option", ["adapter", "prompts"])
def test_a_run_goes_on_with_the_adapter_and_the_prompts_that_it_began_with(
    quick_transfer, adapter, prompts_file, tmp_path, monkeypatch, option
):
    shutil.copytree(adapter("llama"), tmp_path / "adapter")
    shutil.copy(prompts_file, tmp_path / "prompts.txt")
    files = {"adapter": tmp_path / "adapter", "prompts": tmp_path / "prompts.txt"}
    given = {"text": None, **{name: str(path) for name, path in files.items()}}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(
            pipeline, "train_student", lambda *_arguments, **_options: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        quick_transfer("llama", "gpt2", **given)
    changed = files[option] / "adapter_config.json" if option == "adapter" else files[option]
    as_it_was = changed.read_text()
    changed.write_text(as_it_was + "\n")
    with pytest.raises(UserError, match=f"--{option} is not what it was when the run that this would continue began"):
        quick_transfer("llama", "gpt2", **given)
    changed.write_text(as_it_was)
    quick_transfer("llama", "gpt2", **given)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES


@pytest.fixture
def interrupted_transfer(quick_transfer, monkeypatch):
    """A transfer that is interrupted after six steps."""
    compute_loss = DistillationTrainer.compute_loss

    def interrupt(trainer, *arguments, **keywords):
        if trainer.state.global_step == 6:
            raise KeyboardInterrupt
        return compute_loss(trainer, *arguments, **keywords)

    def run(*arguments, **options):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(DistillationTrainer, "compute_loss", interrupt)
            quick_transfer(*arguments, **options)

    return run


def test_interrupted_maps_and_head_continue_to_the_same_bytes(quick_transfer, interrupted_transfer, tmp_path):
    options = {"recipe": "paper", "start": "ridge", "steps": 10}
    interrupted_transfer("llama", "gpt2", **options)
    (checkpoint,) = (tmp_path / "out").glob(".castlora/checkpoints/checkpoint-6")
    kept = load_file(checkpoint / TRAINABLE_FILE)
    assert {"hidden_head" if "hidden_head" in key else key.split(".")[-3] for key in kept} == {
        "hidden_head", "parametrizations",
    }  # fmt: skip
    resumed = quick_transfer("llama", "gpt2", **options)
    undisturbed = quick_transfer("llama", "gpt2", "undisturbed", **options)
    assert weights(resumed.folder) == weights(undisturbed.folder)
    assert [entry["step"] for entry in resumed.log] == [entry["step"] for entry in undisturbed.log]
    assert resumed.manifest["losses"] == undisturbed.manifest["losses"]
    told = [
        "wall time, since it was resumed" in (one.folder / "report.html").read_text() for one in (resumed, undisturbed)
    ]
    assert told == [resumed.manifest["resumed"], undisturbed.manifest["resumed"]] == [True, False]


@pytest.mark.parametrize(
    "damaged", ["checkpoints/checkpoint-6/optimizer.pt", "checkpoints/checkpoint-6/trainable.safetensors",
                "checkpoints/checkpoint-5/trainer_state.json", "reading/passages.json"],
)  # fmt: skip
def test_damaged_state_makes_a_run_go_on_from_what_is_whole(quick_transfer, interrupted_transfer, tmp_path, damaged):
    interrupted_transfer("llama", "gpt2", steps=10)
    path = tmp_path / "out" / ".castlora" / damaged
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    resumed = quick_transfer("llama", "gpt2", steps=10)
    undisturbed = quick_transfer("llama", "gpt2", "undisturbed", steps=10)
    assert weights(resumed.folder) == weights(undisturbed.folder)
    assert not (resumed.folder / ".castlora").exists()


def test_a_killed_run_continues_to_the_same_bytes(base_model, adapter, prompts_file, tmp_path, monkeypatch, request):
    def words(out: Path) -> list[str]:
        places = {"adapter": adapter("llama"), "target": base_model("gpt2"), "prompts": prompts_file, "out": out}
        numbers = {"steps": 20, "batch_size": 4, "tuning.max-length": 60, "tuning.answer-tokens": 6}
        numbers |= {"tuning.rehearsal-passages": 8, "tuning.rehearsal-tokens": 12, "start": "readout"}
        return ["transfer", *(word for key, value in (places | numbers).items() for word in (f"--{key}", str(value)))]

    out = tmp_path / "killed"
    process = Started(tmp_path / "said", run_castlora, *words(out)).process
    while process.is_alive() and not list(out.glob(".castlora/checkpoints/checkpoint-*/sealed.json")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == [".castlora"]

    resumed_from = []
    train_student = pipeline.train_student

    def spy(*arguments, **options):
        resumed_from.append(arguments[-1])
        return train_student(*arguments, **options)

    monkeypatch.setattr(pipeline, "train_student", spy)
    main(words(out))
    request.getfixturevalue("checked_in_process")
    main(words(tmp_path / "undisturbed"))
    assert Path(resumed_from[0]).name.startswith("checkpoint-") and resumed_from[1] is None
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert weights(out) == weights(tmp_path / "undisturbed")
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (out, tmp_path / "undisturbed")]
    assert configs[0] == configs[1]


def test_an_interrupted_run_is_not_continued_with_another_default(quick_transfer, monkeypatch):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline, "start_student", interrupt)
        quick_transfer("llama", "gpt2")
    monkeypatch.setitem(config.RECIPES, "default", replace(config.DEFAULT, temperature=3.0))
    with pytest.raises(UserError, match="holds an interrupted run with other settings"):
        quick_transfer("llama", "gpt2")
