"""Adapters as they lie on people's disks."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from castlora import UserError, convert, inspect
from castlora.adapters.factors import LowRank, read_factors, read_update
from castlora.adapters.files import CONFIG_FILE, WEIGHTS_FILE, open_adapter
from castlora.models import modules
from castlora.models.loading import load_config, load_model

IDS = torch.tensor([[5, 6, 7, 8, 9]])
# What PEFT 0.2 wrote, of which later versions dropped two fields and to which they added dozens.
PEFT_0_2 = {
    "base_model_name_or_path": "owner/base", "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
    "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.05, "merge_weights": False, "modules_to_save": None,
    "peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip


def factors_of(adapter: Path, base: Path) -> dict[str, LowRank]:
    return read_factors(open_adapter(str(adapter)), load_config(str(base)))


def assert_same(found: dict[str, LowRank], expected: dict[str, LowRank]) -> None:
    assert list(found) == list(expected)
    for name, lora in expected.items():
        assert torch.equal(found[name].a, lora.a) and torch.equal(found[name].b, lora.b)


@pytest.fixture
def copy(adapter, tmp_path) -> Path:
    return Path(shutil.copytree(adapter("llama", ("q_proj", "v_proj")), tmp_path / "adapter"))


def test_a_configuration_of_an_early_peft_says_the_same(copy, base_model):
    expected = factors_of(copy, base_model("llama"))
    (copy / CONFIG_FILE).write_text(json.dumps(PEFT_0_2))
    assert_same(factors_of(copy, base_model("llama")), expected)


def test_the_grouped_factors_of_an_early_peft_are_refused(base_model, tmp_path):
    """It adapted parts of a fused module by a grouped convolution, which nothing reads any more."""
    tiny.save_adapter(tmp_path, base_model("gpt2"), ["c_attn"])
    grouped = {}
    for name, tensor in load_file(tmp_path / WEIGHTS_FILE).items():
        grouped[name] = tensor.repeat(2, 1) if "lora_A" in name else tensor[: 2 * 32, :, None].contiguous()
    save_file(grouped, tmp_path / WEIGHTS_FILE)
    early = PEFT_0_2 | {"target_modules": ["c_attn"], "enable_lora": [True, False, True], "fan_in_fan_out": True}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(early))
    with pytest.raises(UserError, match=r"c_attn\.lora_A\.weight' has shape .* the base needs"):
        factors_of(tmp_path, base_model("gpt2"))


def test_of_several_adapters_the_one_at_the_top_is_read_and_others_by_their_folders(base_model, tmp_path):
    live = tiny.save_adapter(tmp_path / "one", base_model("llama"), ["q_proj"])
    assert isinstance(live, PeftModel)
    other = tiny.save_adapter(tmp_path / "two", base_model("llama"), ["q_proj"], seed=2)
    live.load_adapter(str(tmp_path / "two"), "other")
    live.save_pretrained(tmp_path / "both")
    assert other.peft_config.keys() == {"default"} and live.peft_config.keys() == {"default", "other"}
    for folder, alone in (("both", "one"), ("both/other", "two")):
        expected = factors_of(tmp_path / alone, base_model("llama"))
        assert_same(factors_of(tmp_path / folder, base_model("llama")), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["v_proj"]},
        {"exclude_modules": r".*layers\.1\..*"},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["model.layers.2.self_attn.q_proj"]},
    ],
)
def test_modules_that_are_left_out_have_no_factors(base_model, tmp_path, options):
    live = tiny.save_adapter(tmp_path, base_model("llama"), **{"target_modules": ["q_proj", "v_proj"], **options})
    adapted = {name.rpartition(".lora_A")[0] for name in live.get_base_model().state_dict() if ".lora_A" in name}
    assert 0 < len(adapted) < 6
    assert set(factors_of(tmp_path, base_model("llama"))) == adapted


@pytest.mark.parametrize("value", ["lm_head", "x" * 100_000, {"lm_head": 1}, 7])
def test_modules_to_save_are_a_list(copy, base_model, value):
    path = copy / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": value}))
    with pytest.raises(UserError, match=r"modules_to_save in adapter_config\.json is no list of names"):
        factors_of(copy, base_model("llama"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """A tiny Mixtral."""
    config, tokenizer = tiny.family("mistral")
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    experts = dict(intermediate_size=48, num_local_experts=2, max_position_embeddings=tiny.CONTEXT)
    options = {"vocab_size": config.vocab_size, "initializer_range": 0.2, **shape, **experts}
    return tiny.save_model(tmp_path_factory.mktemp("mixture") / "base", AutoConfig.for_model("mixtral", **options),
                           tokenizer)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "beyond"),
    [
        ({"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}, "mlp.experts"),
        ({"target_modules": ["q_proj", "gate"]}, "mlp.gate"),
    ],
    ids=["experts", "router"],
)
def test_what_an_adapter_changes_in_experts_is_named_and_merged(base_model, mixture, tmp_path, options, beyond):
    tiny.save_adapter(tmp_path / "adapter", mixture, **{"target_modules": ["q_proj"], **options})
    update = read_update(open_adapter(str(tmp_path / "adapter")), load_config(str(mixture)))
    assert update.beyond == (beyond,)
    assert list(update.factors) == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert f"also trains {beyond}. No map" in str(inspect(str(tmp_path / "adapter"), str(base_model("llama"))))
    with pytest.raises(UserError, match=f"also trains {beyond}"):
        convert(str(tmp_path / "adapter"), "peft", str(tmp_path / "plain"))
    convert(str(tmp_path / "adapter"), "merged", str(tmp_path / "merged"))
    expected = tiny.logits(tiny.load_adapted(mixture, tmp_path / "adapter"), IDS)
    torch.testing.assert_close(tiny.logits(tiny.load(tmp_path / "merged"), IDS), expected, rtol=1e-4, atol=1e-4)


def test_experts_are_read_as_they_were_before_they_were_fused(mixture, tmp_path):
    """As transformers 4 had them, each with three modules of its own."""
    config = json.loads((mixture / "config.json").read_text())
    width, neurons = config["hidden_size"], config["intermediate_size"]
    shapes = {"w1": (width, neurons), "w2": (neurons, width), "w3": (width, neurons)}
    tiny.save_adapter(tmp_path / "adapter", mixture, ["q_proj"])
    before = read_update(open_adapter(str(tmp_path / "adapter")), load_config(str(mixture)))
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    for layer, expert, (name, (d_in, d_out)) in itertools.product(range(2), range(2), shapes.items()):
        module = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
        tensors |= {f"{module}.lora_A.weight": torch.randn(4, d_in), f"{module}.lora_B.weight": torch.randn(d_out, 4)}
    save_file(tensors, tmp_path / "adapter" / WEIGHTS_FILE)
    written = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    written["target_modules"] = ["q_proj", *shapes]
    (tmp_path / "adapter" / CONFIG_FILE).write_text(json.dumps(written))
    update = read_update(open_adapter(str(tmp_path / "adapter")), load_config(str(mixture)))
    assert update.beyond == ("mlp.experts",) and update.factors.keys() == before.factors.keys()
    assert all(torch.equal(update.factors[name].b, lora.b) for name, lora in before.factors.items())


def test_of_a_base_model_without_known_modules_nothing_pairs(base_model, tmp_path, monkeypatch):
    base = base_model("llama")
    tiny.save_adapter(tmp_path / "adapter", base, ["q_proj"])
    monkeypatch.setattr(modules, "MODULE_ROLES", {})
    update = read_update(open_adapter(str(tmp_path / "adapter")), load_config(str(base)))
    assert update.factors == {} and update.beyond == ("self_attn.q_proj",)


def test_an_adapter_of_experts_alone_has_nothing_that_pairs(base_model, mixture, tmp_path):
    tiny.save_adapter(tmp_path, mixture, [], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(UserError, match="No module that the adapter changes has a partner"):
        inspect(str(tmp_path), str(base_model("llama")))


def test_a_base_model_in_several_files(base_model, adapter, tmp_path):
    sharded = tmp_path / "sharded"
    tiny.load(base_model("llama")).save_pretrained(sharded, max_shard_size="50KB")
    tiny.tokenizer_of(base_model("llama")).save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected = tiny.logits(tiny.load(base_model("llama")), IDS)
    assert torch.equal(tiny.logits(load_model(str(sharded))[0], IDS), expected)
    next(sharded.glob("*-00002-of-*")).unlink()
    with pytest.raises(UserError, match=r"Weights of .*sharded' cannot be read .*; the folder needs complete"):
        load_model(str(sharded))
