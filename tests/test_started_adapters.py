"""Adapters whose start moved a part of the base model's weights into their factors."""

import json

import pytest
import tiny
import torch

from castlora import UserError, convert, inspect
from castlora.adapters.files import open_adapter

MODULES = ["q_proj", "v_proj", "down_proj"]
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def save_started(folder, base, start, **options):
    tiny.save_adapter(folder, base, MODULES)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": start, **options}))


@pytest.mark.parametrize(("name", "start"), [("llama", "pissa"), ("llama", "olora"), ("gpt2", "pissa")])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2, "c_proj": 5}}])
def test_an_adapter_that_moved_weights_into_its_start_becomes_one_of_the_base_model(
    base_model, tmp_path, name, start, options
):
    base, modules = base_model(name), MODULES if name == "llama" else ["c_attn", "c_proj"]
    live = tiny.save_adapter(tmp_path / "started", base, modules, init_lora_weights=start, **options)
    for parameter_name, parameter in live.named_parameters():
        if "lora_A" in parameter_name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    live.save_pretrained(tmp_path / "started")
    convert(str(tmp_path / "started"), "peft", str(tmp_path / "plain"), base=str(base))
    found = tiny.logits(tiny.load_adapted(base, tmp_path / "plain"), IDS)
    torch.testing.assert_close(found, tiny.logits(live, IDS), rtol=1e-3, atol=1e-3)
    assert (found - tiny.logits(tiny.load(base), IDS)).abs().max() > 0.05
    assert open_adapter(str(tmp_path / "plain")).is_plain


def test_a_start_is_not_repeated_for_dora(base_model, tmp_path):
    tiny.save_adapter(tmp_path, base_model("llama"), MODULES, init_lora_weights="pissa", use_dora=True)
    with pytest.raises(UserError, match="'pissa' changed the base model before training"):
        convert(str(tmp_path), "peft", str(tmp_path / "plain"), base=str(base_model("llama")))


@pytest.mark.parametrize(("start", "kind"), [("pissa", "PiSSA"), ("olora", "OLoRA")])
def test_where_the_start_can_be_repeated_a_conversion_is_asked_for(base_model, tmp_path, start, kind):
    save_started(tmp_path, base_model("llama"), start)
    with pytest.raises(UserError, match=f"{kind} changed the base model before .* first: castlora convert --adapter"):
        inspect(str(tmp_path), str(base_model("mistral")))


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
@pytest.mark.parametrize("form", [None, "peft", "merged"])
def test_where_it_cannot_the_reason_and_the_way_out_are_said(base_model, tmp_path, start, form):
    save_started(tmp_path / "started", base_model("llama"), start, loftq_config={"loftq_bits": 4})
    reason = rf"'{start}' changed the base model .* path_initial_model_for_weight_conversion"
    with pytest.raises(UserError, match=reason):
        if form is None:
            inspect(str(tmp_path / "started"), str(base_model("mistral")))
        else:
            convert(str(tmp_path / "started"), form, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
