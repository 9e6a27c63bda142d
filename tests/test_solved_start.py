"""Transfers whose last layer is solved for what source + LoRA predicts, with training and without."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from castlora import UserError, stages
from castlora.adapters.factors import read_factors
from castlora.adapters.files import open_adapter
from castlora.maps.scaling import SOLVED_SCALES
from castlora.models.loading import load_config


def weights(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


def test_the_last_layer_is_solved_before_the_training(quick_transfer, prompts_file, caplog):
    options = {"prompts": str(prompts_file), "steps": 8}
    with caplog.at_level("INFO", logger="castlora"):
        solved = quick_transfer("llama", "mistral", "solved", start="readout", **options)
    record = solved.manifest["last_layer"]
    assert record["module"] == "model.layers.3.mlp.down_proj"
    assert f"held-out objective {record['losses'][0]:.4f} before, {min(record['losses']):.4f} after" in caplog.text
    assert solved.manifest["losses"]["held_out_before"] == pytest.approx(min(record["losses"]))
    maps = quick_transfer("llama", "mistral", "maps", start="ridge", **options)
    assert maps.manifest["losses"]["held_out_before"] == pytest.approx(record["losses"][0])
    assert min(record["losses"]) < 0.95 * record["losses"][0]
    assert maps.manifest["last_layer"] is None


def test_without_a_step_the_solved_start_is_written(base_model, quick_transfer, prompts_file):
    """Also where the adapter leaves the last layer alone."""
    options = {"modules": ("q_proj", "v_proj"), "prompts": str(prompts_file), "steps": 0}
    result = quick_transfer("llama", "mistral", **options)
    losses = result.manifest["last_layer"]["losses"]
    assert min(losses) < 0.9 * losses[0]
    assert (result.manifest["recipe"]["start"], result.manifest["recipe"]["steps"]) == ("readout", 0)
    assert [entry["step"] for entry in result.log] == [0]
    assert result.manifest["losses"]["held_out_after"] <= result.manifest["losses"]["held_out_before"]
    assert len(result.manifest["scale"]["tried"]) == len(SOLVED_SCALES)
    factors = read_factors(open_adapter(str(result.folder)), load_config(str(base_model("mistral"))))
    updated = {name for name, factor in factors.items() if factor.b.abs().max() > 0}
    attention = {f"model.layers.{layer}.self_attn.{module}_proj" for layer in range(4) for module in "qv"}
    assert updated == attention | {"model.layers.3.mlp.down_proj"}
    assert (result.folder / "report.html").is_file()


def test_a_handful_of_prompts_can_be_solved_for(quick_transfer, prompts_file, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("\n".join(prompts_file.read_text().splitlines()[:3]))
    result = quick_transfer("llama", "mistral", prompts=str(few), steps=0, tuning=replace(tiny.SHORT, fewest_prompts=0))
    assert result.manifest["passages"] == {"training": 2, "held_out": 1, "variants": 0}
    losses = result.manifest["last_layer"]["losses"]
    assert min(losses) < losses[0]


@pytest.fixture
def unsolvable(monkeypatch):
    """Has targets look like those that norm what their last layer adds, as Gemma does."""
    monkeypatch.setattr(stages, "find_last_layer", lambda _model, _slots: None)


def test_a_target_that_cannot_be_solved_for_is_trained_from_the_maps(unsolvable, quick_transfer, caplog):
    solved, maps = (quick_transfer("llama", "mistral", start, start=start, steps=8) for start in ("readout", "ridge"))
    assert caplog.text.count("cannot be solved for: it adds or reads it in a way of its own; the start is that of") == 1
    assert solved.manifest["last_layer"] is None
    assert weights(solved.folder) == weights(maps.folder)


def test_a_target_that_cannot_be_solved_for_is_not_left_untrained(unsolvable, quick_transfer, tmp_path):
    with pytest.raises(UserError, match=r"The last layer of '.*' cannot be solved for: .* Leave out --steps 0"):
        quick_transfer("llama", "mistral", steps=0)
    assert not (tmp_path / "out").exists()


def test_a_solved_last_layer_that_rehearses_changes_less_elsewhere(quick_transfer, prompts_file):
    drifts, losses = zip(*(
        (found["drift_after"], found["kl_after"])
        for weight in (0.0, 1.0)
        for found in [
            quick_transfer(
                "llama", "mistral", f"{weight}", prompts=str(prompts_file), steps=0,
                tuning=replace(tiny.SHORT, rehearsal_weight=weight, rehearsal_passages=64),
            ).manifest["losses"]
        ]
    ), strict=True)  # fmt: skip
    assert drifts[1] < 0.8 * drifts[0] and losses[1] < 1.5 * losses[0]
