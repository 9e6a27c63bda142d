import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from castlora.adapters import patterns
from castlora.adapters.factors import (
    PORTABLE_RANKS,
    LowRank,
    pad_rank,
    portable_rank,
    read_factors,
    read_update,
    target_suffixes,
    write_portable,
)
from castlora.adapters.files import CONFIG_FILE, WEIGHTS_FILE, open_adapter
from castlora.adapters.live import load_adapter
from castlora.errors import UserError
from castlora.models.loading import load_config, skeleton
from castlora.models.modules import linear_slots

IDS = torch.tensor([[5, 6, 7, 8, 9]])
every_family = pytest.mark.parametrize("name", tiny.FAMILIES)


def slots_of(base: Path):
    config = load_config(str(base))
    return linear_slots(skeleton(config), config)


def factors_of(adapter: Path, base: Path) -> dict[str, LowRank]:
    return read_factors(open_adapter(str(adapter)), load_config(str(base)))


def edit_config(adapter: Path, **changes: object) -> None:
    path = adapter / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_others_may_read_the_weights_as_they_may_other_files(adapter, base_model, tmp_path):
    base = base_model("llama")
    write_portable(tmp_path, factors_of(adapter("llama"), base), slots_of(base), 8, str(base), None)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in (CONFIG_FILE, "adapter_model.safetensors")}
    assert len(set(modes.values())) == 1, modes


@pytest.fixture
def copy(adapter, tmp_path) -> Path:
    """A copy of a LoRA for the tiny Llama to be damaged."""
    return Path(shutil.copytree(adapter("llama", ("q_proj", "v_proj")), tmp_path / "damaged"))


OPTIONS = {
    "plain": {},
    "another scale": {"lora_alpha": 3},
    "rsLoRA": {"use_rslora": True},
    "ranks that differ": {"rank_pattern": {"q_proj": 2, "c_fc": 7, r"layers\.1\..*[vo]_proj": 3, "down_proj": 1}},
    "scales that differ": {"alpha_pattern": {"v_proj": 5, "c_proj": 9, "o_proj": 1}, "use_rslora": True},
}


@every_family
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_factors_are_the_update_that_peft_applies(base_model, tmp_path, name, options):
    live = tiny.save_adapter(tmp_path, base_model(name), tiny.LINEAR_MODULES[name], **options)
    factors = factors_of(tmp_path, base_model(name))
    slots = slots_of(base_model(name))
    assert list(factors) == list(slots)
    for module, factor in factors.items():
        layer = live.get_base_model().get_submodule(module)
        delta = layer.get_delta_weight("default")
        expected = delta.T if slots[module].is_conv1d else delta
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(factor.b @ factor.a, expected)


def test_factors_of_an_adapter_on_some_modules_and_layers_only(base_model, tmp_path):
    tiny.save_adapter(tmp_path, base_model("llama"), ("q_proj", "v_proj"), layers_to_transform=[0, 2])
    factors = factors_of(tmp_path, base_model("llama"))
    modules = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 2) for name in ("q_proj", "v_proj")]
    assert list(factors) == modules


@pytest.mark.parametrize("modules", ["all-linear", r".*\.mlp\.(up|down)_proj"])
def test_modules_are_selected_the_way_peft_does(base_model, tmp_path, modules):
    live = tiny.save_adapter(tmp_path, base_model("llama"), modules)
    assert len(factors_of(tmp_path, base_model("llama"))) == sum("lora_A" in key for key in live.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_read_as_fp32(copy, base_model, dtype):
    exact = factors_of(copy, base_model("llama"))
    tensors = {key: value.to(dtype) for key, value in load_file(copy / WEIGHTS_FILE).items()}
    save_file(tensors, copy / WEIGHTS_FILE)
    rounded = factors_of(copy, base_model("llama"))
    for name, factor in rounded.items():
        assert (factor.a.dtype, factor.b.dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close(factor.a, exact[name].a.to(dtype).float(), rtol=0, atol=0)
        torch.testing.assert_close(factor.b, 4 * (exact[name].b / 4).to(dtype).float(), rtol=0, atol=0)


@every_family
def test_written_adapter_computes_in_peft_what_the_original_does(base_model, tmp_path, name):
    base = base_model(name)
    original = tiny.save_adapter(tmp_path / "original", base, tiny.LINEAR_MODULES[name])
    factors = factors_of(tmp_path / "original", base)
    write_portable(tmp_path / "portable", factors, slots_of(base), 8, str(base), None)
    written = PeftModel.from_pretrained(tiny.load(base), tmp_path / "portable").eval()
    expected = tiny.logits(original, IDS)
    assert (expected - tiny.logits(tiny.load(base), IDS)).abs().max() > 0.1
    torch.testing.assert_close(tiny.logits(written, IDS), expected, rtol=1e-4, atol=1e-4)


@every_family
def test_written_adapter_keeps_the_portable_contract(base_model, tmp_path, name):
    slots = slots_of(base_model(name))
    modules = [slot for slot in slots if slots[slot].roles[0] == "q"]
    factors = {module: LowRank(torch.ones(3, slots[module].d_in), torch.ones(slots[module].d_out, 3))
               for module in modules[1:]}  # fmt: skip
    write_portable(tmp_path, factors, slots, 16, "owner/base", "abc123")

    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 16, 0.0)
    assert isinstance(config["lora_alpha"], int)
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", "abc123")
    beside = [slot for slot in slots if slots[slot].roles in (("k",), ("v",))]
    assert config["target_modules"] == sorted({name.rsplit(".", 1)[-1] for name in [*modules, *beside]})
    assert config["fan_in_fan_out"] is name.startswith("gpt2")
    assert config["bias"] == "none"
    assert not any(config[field] for field in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
                                               "modules_to_save", "layers_to_transform"))  # fmt: skip

    tensors = load_file(tmp_path / WEIGHTS_FILE)
    written = [*modules, *beside]
    assert set(tensors) == {f"base_model.model.{m}.lora_{side}.weight" for m in written for side in "AB"}
    for key, tensor in tensors.items():
        module = key.removeprefix("base_model.model.").rsplit(".", 2)[0]
        a_shape, b_shape = (16, slots[module].d_in), (slots[module].d_out, 16)
        assert tensor.shape == (a_shape if "lora_A" in key else b_shape)
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        filled = tensor[:3] if "lora_A" in key else tensor[:, :3]
        assert (filled == (module in modules[1:])).all()
        assert tensor.sum() == filled.sum()


def test_written_bytes_do_not_depend_on_the_hash_seed(base_model, adapter, tmp_path):
    base, source = base_model("llama"), adapter("llama")
    script = """
import sys
from castlora.adapters.files import open_adapter
from castlora.adapters.factors import read_factors, write_portable
from castlora.models.loading import load_config, skeleton
from castlora.models.modules import linear_slots
from pathlib import Path
adapter, base, folder = sys.argv[1:]
config = load_config(base)
factors = read_factors(open_adapter(adapter), config)
write_portable(Path(folder), factors, linear_slots(skeleton(config), config), 8, base, None)
"""
    write_portable(tmp_path / "here", factors_of(source, base), slots_of(base), 8, str(base), None)
    command = [sys.executable, "-c", script, str(source), str(base), str(tmp_path / "there")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "1234"})
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_suffixes_select_the_adapted_types_and_no_others(base_model):
    slots = slots_of(base_model("gpt2"))
    attention = [name for name in slots if ".attn." in name]
    assert target_suffixes(attention, slots) == ["attn.c_proj", "c_attn"]
    assert target_suffixes(slots, slots) == ["c_attn", "c_fc", "c_proj"]
    assert target_suffixes(["model.layers.1.self_attn.q_proj"], slots_of(base_model("llama"))) == ["q_proj"]


@given(rank=st.integers(1, 6), padding=st.integers(0, 5))
def test_padding_leaves_the_update_as_it_is(rank, padding):
    factors = LowRank(torch.randn(rank, 7), torch.randn(5, rank))
    padded = pad_rank(factors, rank + padding)
    assert padded.rank == rank + padding
    torch.testing.assert_close(padded.b @ padded.a, factors.b @ factors.a)


@given(st.integers(1, PORTABLE_RANKS[-1]))
def test_portable_rank_is_the_next_one(rank):
    assert portable_rank(rank) == min(accepted for accepted in PORTABLE_RANKS if accepted >= rank)


def test_a_rank_that_no_engine_accepts_is_refused():
    with pytest.raises(UserError, match="Rank 129 is above 128"):
        portable_rank(129)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_bdlora", {"nblocks": 2}),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("megatron_config", {"any": 1}),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(copy, field, value):
    edit_config(copy, **{field: value})
    with pytest.raises(UserError, match=rf"damaged': {field}=.* cannot be carried yet; retrain as a plain LoRA"):
        open_adapter(str(copy))


def test_a_module_that_a_configuration_names_is_not_imported(copy, tmp_path, monkeypatch):
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    edit_config(copy, megatron_config={"any": 1}, megatron_core="hostile_module")
    with pytest.raises(UserError, match="megatron_config="):
        open_adapter(str(copy))


def test_every_field_of_a_plain_configuration_is_accepted(copy):
    edit_config(copy, modules_to_save=[], rank_pattern={}, bias="none", lora_dropout=0.1)
    assert open_adapter(str(copy)).config.r == 4


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "LORA2", None])
def test_other_kinds_of_adapter_are_refused(copy, peft_type):
    edit_config(copy, peft_type=peft_type)
    with pytest.raises(
        UserError, match=rf"damaged': peft_type is {peft_type!r}; castlora carries adapters that change"
    ):
        open_adapter(str(copy))


@pytest.mark.parametrize("content", ["{", "7", "[1]", "\udcff"])
def test_a_corrupt_configuration_is_refused(copy, content):
    (copy / CONFIG_FILE).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"adapter_config\.json of .*damaged' is not a PEFT configuration"):
        open_adapter(str(copy))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", [f"module_{number}" for number in range(10**6)]),
        ("rank_pattern", {f"module_{number}": 4 for number in range(5000)}),
        ("layers_to_transform", list(range(5000))),
    ],
)
def test_more_entries_than_a_model_has_modules_are_refused_at_once(copy, field, value):
    path = copy / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=rf": {field} has {len(value)} entries, more than the 4000 that are read"):
        open_adapter(str(copy))


ENDLESS = r"(.*.*.*.*)*(.*.*)*[_a-z.0-9]*!"


@pytest.mark.parametrize(
    ("field", "value"),
    [("target_modules", ENDLESS), ("rank_pattern", {ENDLESS: 8}), ("modules_to_save", ["lm_head", ENDLESS])],
)
def test_a_regular_expression_without_end_is_refused(copy, base_model, field, value, monkeypatch):
    edit_config(copy, **{field: value})
    monkeypatch.setattr(patterns, "_SECONDS", 1)
    with pytest.raises(UserError, match=rf"expressions in {field} cannot be matched within 1 seconds"):
        factors_of(copy, base_model("llama"))
    with pytest.raises(UserError, match=rf"expressions in {field} cannot be"):
        load_adapter(tiny.load(base_model("llama")), str(copy), "llama")


def test_all_regular_expressions_are_tried_in_one_process(copy, base_model, monkeypatch):
    started = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *given, **options: (started.append(given), run(*given, **options)))
    edit_config(copy, rank_pattern={rf"layers\.{number}\..*q_proj": 4 for number in range(500)})
    assert len(factors_of(copy, base_model("llama"))) == 6
    assert len(started) == 1


def test_a_folder_without_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no adapter_config\.json; give the folder that PEFT saved"):
        open_adapter(str(tmp_path))


def test_of_several_adapters_in_a_folder_one_is_to_be_named(tmp_path, copy):
    folder = copy.parent / "many"
    for name in ("first", "second"):
        shutil.copytree(copy, folder / name)
    with pytest.raises(UserError, match="holds adapters in folders \\('first', 'second'\\); name the folder of one"):
        open_adapter(str(folder))
    assert open_adapter(str(folder / "second")).config.r == 4


@pytest.mark.parametrize("name", ["/nowhere/adapter", "./nowhere", "nowhere", "owner/nowhere"])
def test_a_missing_adapter_is_named(name):
    with pytest.raises(UserError, match=f"Adapter '{name}' is (not a folder|neither a folder here nor reachable)"):
        open_adapter(name)


def test_pickled_weights_are_never_opened(copy):
    (copy / WEIGHTS_FILE).rename(copy / "adapter_model.bin")
    with pytest.raises(
        UserError, match=r"only a pickled adapter_model\.bin; make a safe copy of it first: castlora convert"
    ):
        open_adapter(str(copy))


def test_absent_weights_are_missed(copy):
    (copy / WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        open_adapter(str(copy))


def test_weights_cut_short_are_refused(copy, base_model):
    (copy / WEIGHTS_FILE).write_bytes((copy / WEIGHTS_FILE).read_bytes()[:700])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors of .*damaged' is damaged or cut short"):
        factors_of(copy, base_model("llama"))


def test_weights_with_nan_are_refused(copy, base_model):
    tensors = load_file(copy / WEIGHTS_FILE)
    key = next(key for key in tensors if "layers.1" in key)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, copy / WEIGHTS_FILE)
    with pytest.raises(UserError, match=rf"holds NaN or infinity in '{key}'; use an intact adapter"):
        factors_of(copy, base_model("llama"))


@pytest.mark.parametrize("other", ["mistral", "gpt2", "phi3"])
def test_the_wrong_base_model_is_recognised(copy, base_model, other):
    with pytest.raises(
        UserError, match=r"does not fit its base model.*; name the base it was trained on with --source"
    ):
        factors_of(copy, base_model(other))


def test_a_misfit_in_shape_names_the_tensor(copy, base_model):
    edit_config(copy, r=8)
    with pytest.raises(UserError, match=r"q_proj\.lora_A\.weight' has shape \(4, 32\), the base needs \(8, 32\)"):
        factors_of(copy, base_model("llama"))


@pytest.mark.parametrize("changes", [{"r": "8"}, {"r": 0}, {"lora_alpha": None}, {"target_modules": "(("}])
def test_senseless_values_are_refused(copy, base_model, changes):
    edit_config(copy, **changes)
    with pytest.raises(UserError, match="does not fit its base model"):
        factors_of(copy, base_model("llama"))


BEYOND_MAPS = {
    "output head": ("llama", {"target_modules": ["q_proj", "lm_head"]}, ("lm_head",)),
    "embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, ("model.embed_tokens",)),
    "DoRA": ("llama", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}, ("lm_head",)),
    "whole modules": (
        "llama", {"modules_to_save": ["lm_head", "embed_tokens", "up_proj"]},
        ("lm_head", "mlp.up_proj", "model.embed_tokens"),
    ),
    "biases of LoRA": ("llama", {"lora_bias": True}, ("self_attn.q_proj.bias",)),
    "biases of adapted modules": ("gpt2", {"bias": "lora_only"}, ("attn.c_attn.bias",)),
    "all biases": (
        "gpt2", {"bias": "all"},
        ("attn.c_attn.bias", "attn.c_proj.bias", "ln_1.bias", "ln_2.bias", "mlp.c_fc.bias", "mlp.c_proj.bias",
         "transformer.ln_f.bias"),
    ),
    "tokens": ("gpt2", {"trainable_token_indices": {"wte": [1, 2]}}, ("transformer.wte",)),
    "parameters": ("llama", {"target_parameters": ["mlp.up_proj.weight"]}, ("mlp.up_proj",)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "options", "beyond"), BEYOND_MAPS.values(), ids=BEYOND_MAPS)
def test_what_is_trained_beyond_the_maps_of_layers_is_named(base_model, tmp_path, name, options, beyond):
    first = "q_proj" if name == "llama" else "c_attn"
    tiny.save_adapter(tmp_path, base_model(name), **{"target_modules": [first], **options})
    update = read_update(open_adapter(str(tmp_path)), load_config(str(base_model(name))))
    assert update.beyond == beyond
    assert len(update.factors) == 3
    assert {module.rsplit(".", 1)[-1] for module in update.factors} == {first}
    with pytest.raises(UserError, match=rf"also trains {beyond[0]}, which is no linear map"):
        factors_of(tmp_path, base_model(name))


def test_an_adapter_of_linear_maps_trains_nothing_beyond(base_model, adapter):
    config = load_config(str(base_model("llama")))
    assert read_update(open_adapter(str(adapter("llama"))), config).beyond == ()
