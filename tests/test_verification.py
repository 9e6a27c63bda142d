import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from castlora import UserError
from castlora.adapters.factors import read_factors, write_portable
from castlora.adapters.files import open_adapter
from castlora.evaluation import verification
from castlora.evaluation.verification import check_written, live_logits, rounding_difference, tolerance
from castlora.models.loading import load_config
from castlora.models.modules import linear_slots

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.fixture
def written(base_model, tmp_path) -> tuple[Path, str, torch.Tensor]:
    """A portable adapter, its base model, and the logits of the live model."""
    base = base_model("gpt2")
    live = tiny.save_adapter(tmp_path / "original", base, ("c_attn",))
    slots = linear_slots(tiny.load(base), load_config(str(base)))
    factors = read_factors(open_adapter(str(tmp_path / "original")), load_config(str(base)))
    write_portable(tmp_path / "portable", factors, slots, 8, str(base), None)
    return tmp_path / "portable", str(base), live_logits(live, IDS, MASK)


def test_padding_has_no_logits(base_model):
    logits = live_logits(tiny.load(base_model("llama")), IDS, MASK)
    assert logits[1, 2:].abs().max() == 0
    assert (logits[MASK.bool()].abs().sum(-1) > 0).all()


def test_what_computes_the_same_passes(written, checked_in_process):
    adapter, base, live = written
    assert 0 <= check_written(adapter, base, None, IDS, MASK, live) < 1e-6


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_what_computes_something_else_does_not(written, checked_in_process, change):
    adapter, base, live = written
    live[0, 1, 2] += change * live.abs().max()
    with pytest.raises(RuntimeError, match=r"logits differ from the trained model's by (1\.00e-03|nan), above 1e-04"):
        check_written(adapter, base, None, IDS, MASK, live)


def test_a_16_bit_model_may_round_and_no_more(written, checked_in_process):
    adapter, base, live = written
    rounded = live.bfloat16()
    assert 1e-4 < check_written(adapter, base, None, IDS, MASK, rounded) < 1e-2
    rounded[0, 1, 2] += live.abs().max() / 10
    with pytest.raises(RuntimeError, match=r"logits differ from the trained model's by .*, above 3e-02"):
        check_written(adapter, base, None, IDS, MASK, rounded)


def test_a_deep_model_adds_its_roundings_up(base_model):
    model = tiny.load(base_model("llama"))
    exact = live_logits(model, IDS, MASK)
    assert rounding_difference(model, IDS, MASK, exact) < 1e-5
    assert rounding_difference(model, IDS, MASK, 2 * exact) == pytest.approx(0.5, rel=1e-3)
    model.bfloat16()
    assert 0 < rounding_difference(model, IDS, MASK, exact) < 0.1
    assert tolerance(torch.bfloat16, None, 0.02) == 0.08
    assert tolerance(torch.bfloat16, None, 0.001) == tolerance(torch.bfloat16) == tolerance(torch.bfloat16, 4)
    assert tolerance(torch.float32, None, 1e-6) == 1e-4


def test_weights_that_are_loaded_as_others_are_noticed(written, checked_in_process, monkeypatch):
    adapter, base, live = written
    kept = verification.get_peft_model_state_dict

    def rounded(*arguments, **options):
        return {name: weights.bfloat16().float() for name, weights in kept(*arguments, **options).items()}

    monkeypatch.setattr(verification, "get_peft_model_state_dict", rounded)
    with pytest.raises(RuntimeError, match=r"the model disagree on 'base_model\.model\."):
        check_written(adapter, base, None, IDS, MASK, live)


def test_a_tensor_that_does_not_reach_the_model_is_noticed(written, checked_in_process):
    adapter, base, live = written
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.transformer.h.9.attn.c_attn.lora_A.weight"] = torch.zeros(8, 32)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match=r"disagree on 'base_model\.model\.transformer\.h\.9"):
        check_written(adapter, base, None, IDS, MASK, live)


def test_a_base_model_that_has_vanished_is_named(written, tmp_path):
    adapter, _, live = written
    gone = str(tmp_path / "gone")
    with pytest.raises(UserError, match=f"^Model '{gone}' is not a folder") as raised:
        check_written(adapter, gone, None, IDS, MASK, live)
    assert "Traceback" not in str(raised.value)


def test_an_adapter_that_cannot_be_loaded_is_reported(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "ValueError: no such model\n")
    monkeypatch.setattr(verification, "subprocess", SimpleNamespace(run=lambda *_arguments, **_options: failed))
    with pytest.raises(RuntimeError, match="cannot be loaded again: ValueError: no such model"):
        check_written(tmp_path, "base", None, IDS, MASK, torch.zeros(2, 4, 3))
