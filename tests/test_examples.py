"""The examples run, and the shipped settings are ones that the command line takes."""

import json
from functools import partial
from pathlib import Path

import pytest
import yaml

import castlora
from castlora.bench.spec import read_spec
from castlora.cli import parser
from castlora.config import Tuning
from examples import live_layer, transfer_and_measure, transfer_with_ray, use_without_castlora

ROOT = Path(__file__).parents[1]
TRANSFERS = sorted((ROOT / "configs" / "transfer").glob("*.yaml"))


def test_the_live_layer_and_its_fold_agree(capsys):
    live_layer.main()
    assert "trained numbers: 40,960\nnumbers of the LoRA: 2,560, rank 8\n" in capsys.readouterr().out


def test_an_adapter_answers_the_same_attached_and_merged(tmp_path, capsys):
    use_without_castlora.main(str(tmp_path))
    attached, merged, mlx = capsys.readouterr().out.splitlines()
    assert attached == "attached: setting" and merged == "merged: setting"
    assert Path(mlx.removeprefix("for MLX-LM: ")).is_dir()


@pytest.mark.slow
def test_a_transfer_is_measured(tmp_path, capsys, monkeypatch, short_demo_skill, checked_in_process):
    monkeypatch.setattr(transfer_and_measure, "demo_skill", lambda: short_demo_skill)
    briefly = Tuning(fewest_prompts=0, rehearsal_passages=8, rehearsal_tokens=12)
    monkeypatch.setattr(castlora, "transfer", partial(castlora.transfer, tuning=briefly))
    transfer_and_measure.main(str(tmp_path / "out"), steps=30)
    printed = capsys.readouterr().out
    assert float(printed.split("retrained ")[1].split()[0]) > 0.9
    assert float(printed.split("lift ")[1].split()[0]) > 0.05
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.slow
def test_every_adapter_is_moved_once_with_ray(tmp_path, capsys):
    pytest.importorskip("ray", reason="ray is not installed; pip install 'castlora[ray]'")
    entry = transfer_with_ray.bundled_adapters()[0]
    listed = {**entry, "name": "lost", "adapter": str(tmp_path / "nothing")}, {**entry, "name": "moved"}
    (tmp_path / "adapters.jsonl").write_text("".join(json.dumps(one) + "\n" for one in listed))
    printed = []
    for _ in range(2):
        with pytest.raises(SystemExit, match="1"):
            transfer_with_ray.main(str(tmp_path / "out"), str(tmp_path / "adapters.jsonl"), steps=10)
        printed.append(capsys.readouterr())
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"moved.jsonl", "moved-on-mistral-s"}
        assert "lost-on-mistral-s: " in printed[-1].err and "nothing' is not a folder" in printed[-1].err
    assert printed[0].out == printed[1].out and "of the answers are those of source + LoRA" in printed[0].out


@pytest.mark.parametrize("path", TRANSFERS, ids=lambda path: path.stem)
def test_the_settings_of_common_pairs_are_taken(path):
    options = ["transfer", "--config", str(path), "--adapter", "my-lora", "--out", "moved"]
    settings = parser().parse_args(options).transfer
    written = yaml.safe_load(path.read_text())
    assert written == {"source": settings.source, "target": settings.target, "text": settings.text}
    assert settings.source != settings.target and settings.text == "allenai/c4"
    assert f"configs/transfer/{path.name}" in path.read_text()


def test_the_common_pairs_are_there():
    assert {path.stem for path in TRANSFERS} >= {
        "llama-2-7b-to-13b", "llama-2-7b-to-mistral-7b", "llama-3.1-8b-to-qwen3-8b", "mistral-7b-to-gemma-2-9b",
        "qwen2.5-7b-to-qwen3-8b",
    }  # fmt: skip


def test_the_settings_of_the_benchmark_are_taken(tmp_path):
    (path,) = (ROOT / "configs" / "bench").glob("*.yaml")
    spec = read_spec(str(path))
    assert spec.pairs == ["llama-2-7b:mistral-7b", "llama-2-7b:llama-2-13b"]
    assert spec.adapter("mistral-7b", "gsm8k").endswith("adapters/mistral-7b/gsm8k")
