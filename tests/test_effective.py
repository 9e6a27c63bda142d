import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from peft import AdaLoraConfig, HiraConfig, LoHaConfig, LoKrConfig, OFTConfig, VeraConfig, get_peft_model

from castlora.adapters.effective import effective_update, low_rank
from castlora.adapters.factors import EFFECTIVE_RANK, LowRank, read_factors, read_update
from castlora.adapters.files import open_adapter
from castlora.errors import UserError
from castlora.models.loading import load_config
from castlora.models.modules import linear_slots

MODULES = ["q_proj", "v_proj", "down_proj"]
OTHER_KINDS = {
    "ADALORA": AdaLoraConfig(init_r=6, total_step=9),
    "HIRA": HiraConfig(r=4),
    "LOHA": LoHaConfig(r=3),
    "LOKR": LoKrConfig(r=3),
    "OFT": OFTConfig(oft_block_size=4),
    "VERA": VeraConfig(r=5),
}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def save_other(folder: Path, base: Path, kind: str, **options: object) -> None:
    """A PEFT adapter of another kind with random weights."""
    torch.manual_seed(3)
    config = replace(OTHER_KINDS[kind], target_modules=set(MODULES), task_type="CAUSAL_LM", **options)
    model = get_peft_model(tiny.load(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["DoRA", *OTHER_KINDS])
def test_the_factors_are_the_best_of_what_merging_adds(base_model, tmp_path, kind):
    base = base_model("llama")
    if kind == "DoRA":
        live = tiny.save_adapter(tmp_path, base, MODULES, use_dora=True)
        for name, parameter in live.named_parameters():
            if "magnitude" in name:
                parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        live.save_pretrained(tmp_path)
    else:
        save_other(tmp_path, base, kind)
    files = open_adapter(str(tmp_path))
    assert (files.kind, files.is_plain) == (kind, False)
    factors = read_factors(files, load_config(str(base)))
    assert len(factors) == 9 and {factor.rank for factor in factors.values()} == {EFFECTIVE_RANK}
    teacher = tiny.load_adapted(base, tmp_path)
    before, slots = tiny.logits(teacher, IDS), linear_slots(tiny.load(base), teacher.config)
    narrow = {name: LowRank(factor.a[:7], factor.b[:, :7]) for name, factor in factors.items()}
    update = effective_update(teacher, slots, narrow)
    assert torch.equal(tiny.logits(teacher, IDS), before)

    bare, merged = tiny.load(base), tiny.load_adapted(base, tmp_path).merge_and_unload()
    left_out = whole = 0.0
    for name, factor in update.factors.items():
        delta = merged.get_submodule(name).weight - bare.get_submodule(name).weight
        error = torch.linalg.matrix_norm(delta - factor.b @ factor.a).item()
        assert error == pytest.approx(torch.linalg.svdvals(delta)[7:].norm().item(), rel=0.02, abs=1e-5)
        left_out, whole = left_out + error**2, whole + delta.square().sum().item()
    assert update.lost == pytest.approx((left_out / whole) ** 0.5, rel=1e-3)
    assert whole > 0 and update.lost < 1


def test_an_update_of_low_rank_loses_nothing(base_model, adapter):
    teacher, base = tiny.load_adapted(base_model("gpt2"), adapter("gpt2")), tiny.load(base_model("gpt2"))
    factors = read_factors(open_adapter(str(adapter("gpt2"))), base.config)
    update = effective_update(teacher, linear_slots(base, base.config), factors)
    assert update.lost < 1e-4
    for name, factor in update.factors.items():
        torch.testing.assert_close(factor.b @ factor.a, factors[name].b @ factors[name].a, rtol=1e-3, atol=1e-4)


def test_both_factors_of_an_update_have_its_singular_values():
    delta = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    factors = low_rank(delta, 5)
    expected = torch.linalg.svdvals(delta)[:5].sqrt()
    torch.testing.assert_close(factors.a.norm(dim=1), expected)
    torch.testing.assert_close(factors.b.norm(dim=0), expected)


@pytest.mark.parametrize("kind", ["HIRA", "VERA"])
def test_what_other_kinds_train_beyond_linear_maps_is_named(base_model, tmp_path, kind):
    save_other(tmp_path, base_model("llama"), kind, modules_to_save=["lm_head"])
    update = read_update(open_adapter(str(tmp_path)), load_config(str(base_model("llama"))))
    assert update.beyond == ("lm_head",)
    assert len(update.factors) == 9


def test_damaged_weights_of_another_kind_are_recognised(base_model, tmp_path):
    save_other(tmp_path / "one", base_model("llama"), "LOHA")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    path = tmp_path / "other" / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 3', '"r": 4'))
    read_factors(open_adapter(str(tmp_path / "one")), load_config(str(base_model("llama"))))
    with pytest.raises(UserError, match=r"hada_w1_a' has shape .* the base needs"):
        read_factors(open_adapter(str(tmp_path / "other")), load_config(str(base_model("llama"))))


def test_the_update_of_a_16_bit_model_is_not_rounded(base_model, tmp_path):
    base = base_model("llama")
    tiny.save_adapter(tmp_path, base, MODULES, use_dora=True)
    factors = read_factors(open_adapter(str(tmp_path)), load_config(str(base)))
    half, rounded = (tiny.load_adapted(base, tmp_path) for _ in range(2))
    for teacher, dtype in ((half, torch.bfloat16), (rounded, torch.float32)):
        for name, parameter in teacher.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16().to(dtype)
            elif "lora_B" in name:
                # Below the last bit of most weights, and so lost where the sum is rounded.
                parameter.data *= 1e-2
    before = {name: weight.clone() for name, weight in half.state_dict().items()}
    slots = linear_slots(tiny.load(base), half.config)
    exact = effective_update(rounded, slots, factors).factors
    found = effective_update(half, slots, factors).factors
    assert all(torch.equal(weight, before[name]) for name, weight in half.state_dict().items())
    for name, lora in exact.items():
        delta = lora.b @ lora.a
        assert (found[name].b @ found[name].a - delta).norm() < 0.02 * delta.norm()
