import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, PreTrainedConfig, T5Config

from castlora.alignment.tokens import ByteTokenizer
from castlora.errors import UserError
from castlora.models.capture import capture
from castlora.models.loading import context_length, load_config, load_model, load_tokenizer, public_name, skeleton
from castlora.models.modules import layer_index, linear_slots, number_of_layers

every_family = pytest.mark.parametrize("name", tiny.FAMILIES)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copy(base_model, tmp_path) -> Path:
    """A copy of a tiny model to be damaged."""
    return Path(shutil.copytree(base_model("llama"), tmp_path / "damaged"))


@every_family
def test_slots_are_all_linear_modules_of_the_layers(base_model, name):
    config = load_config(str(base_model(name)))
    slots = linear_slots(tiny.load(base_model(name)), config)
    kinds = {slot.name.rsplit(".", 1)[-1] for slot in slots.values()}
    assert kinds == set(tiny.LINEAR_MODULES[name])
    assert number_of_layers(slots) == config.num_hidden_layers
    assert len(slots) == config.num_hidden_layers * (4 if name in ("gpt2", "gpt2-deep", "phi3") else 7)


@every_family
def test_slots_of_the_skeleton_are_those_of_the_model(base_model, name):
    config = load_config(str(base_model(name)))
    empty = skeleton(config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert linear_slots(empty, config) == linear_slots(tiny.load(base_model(name)), config)


@every_family
def test_slot_shapes_are_those_of_the_map_that_the_module_computes(base_model, name):
    config = load_config(str(base_model(name)))
    model = tiny.load(base_model(name))
    slots = linear_slots(model, config)
    with capture(model, slots) as activations:
        tiny.logits(model, torch.tensor([[1, 2, 3]]))
    for slot in slots.values():
        assert activations[slot.name].inputs.shape == (1, 3, slot.d_in)
        assert activations[slot.name].outputs.shape == (1, 3, slot.d_out)
        borders = [(rows.start, rows.stop) for rows in slot.rows.values()]
        assert [0, *(stop for _, stop in borders)] == [*(start for start, _ in borders), slot.d_out]


@pytest.mark.parametrize(
    ("name", "module", "sizes"),
    [
        ("gpt2", "attn.c_attn", {"q": 32, "k": 32, "v": 32}),
        ("phi3", "self_attn.qkv_proj", {"q": 32, "k": 16, "v": 16}),
        ("phi3", "mlp.gate_up_proj", {"gate": 56, "up": 56}),
    ],
)
def test_roles_of_a_fused_module_follow_one_another(base_model, name, module, sizes):
    config = load_config(str(base_model(name)))
    slot = next(slot for slot in linear_slots(skeleton(config), config).values() if slot.name.endswith(module))
    assert {role: rows.stop - rows.start for role, rows in slot.rows.items()} == sizes


@pytest.mark.parametrize(
    ("name", "fused", "reader", "silencing", "others"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj", "v", "qk"),
        ("phi3", "model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj", "v", "qk"),
    ],
)
def test_rows_of_a_role_are_the_ones_that_the_model_reads_as_that_role(
    base_model, name, fused, reader, silencing, others
):
    config = load_config(str(base_model(name)))
    for role in (silencing, *others):
        model = tiny.load(base_model(name))
        rows = linear_slots(model, config)[fused].rows[role]

        def silence(_module, _inputs, outputs, rows=rows):
            outputs[..., rows] = 0

        model.get_submodule(fused).register_forward_hook(silence)
        with capture(model, [reader]) as activations:
            tiny.logits(model, torch.tensor([[5, 6, 7]]))
        assert (activations[reader].inputs.abs().max() == 0) == (role == silencing)


def test_gate_and_up_of_phi3_are_not_swapped(base_model):
    config = load_config(str(base_model("phi3")))
    model = tiny.load(base_model("phi3"))
    name = "model.layers.0.mlp.gate_up_proj"
    rows = linear_slots(model, config)[name].rows
    with capture(model, [name, "model.layers.0.mlp.down_proj"]) as activations:
        tiny.logits(model, torch.tensor([[5, 6, 7]]))
    gate, up = (activations[name].outputs[..., rows[role]] for role in ("gate", "up"))
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(activations["model.layers.0.mlp.down_proj"].inputs, expected)


def test_layer_index():
    assert layer_index("model.layers.3.mlp.up_proj") == 3
    assert layer_index("transformer.h.11.attn.c_attn") == 11
    assert layer_index("lm_head") is None


def test_public_name_hides_where_a_folder_lies(tmp_path):
    assert public_name(str(tmp_path)) == tmp_path.name
    assert public_name("owner/model") == "owner/model"


@every_family
def test_context_length(base_model, name):
    assert context_length(load_config(str(base_model(name)))) == tiny.CONTEXT


def test_load_model_gives_an_fp32_model_for_evaluation_and_its_tokenizer(base_model):
    model, tokenizer = load_model(str(base_model("gpt2")))
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert tokenizer("the fox")["input_ids"] == tiny.byte_level(300)("the fox")["input_ids"]


def test_weights_with_nan_are_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"hold NaN or infinity in 'model\.norm\.weight'; use an intact checkpoint"):
        load_model(str(copy))


def test_weights_cut_short_are_refused(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"damaged' cannot be read .*; the folder needs complete safetensors files"):
        load_model(str(copy))


def test_pickled_weights_are_never_opened(copy):
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot be read .*; the folder needs complete safetensors files"):
        load_model(str(copy))


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 4}, {"intermediate_size": 64}], ids=["lacking", "misfit"])
def test_weights_that_do_not_fit_the_config_are_refused(copy, changes):
    edit_config(copy, **changes)
    with pytest.raises(UserError, match=r"Weights of .* (lack or misfit|cannot be read)"):
        load_model(str(copy))


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "unheard of"}'])
def test_a_config_that_transformers_does_not_know_is_refused(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"cannot read a config\.json that transformers knows"):
        load_config(str(copy))


def test_remote_code_is_neither_run_nor_offered(copy, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _question: pytest.fail("asked whether to run remote code"))
    edit_config(copy, model_type="custom", auto_map={"AutoConfig": "custom.Config"})
    (copy / "custom.py").write_text("raise RuntimeError('remote code was run')")
    with pytest.raises(UserError, match="contains custom code"):
        load_config(str(copy))


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(hidden_size=32, num_attention_heads=2, architectures=["BertForMaskedLM"]),
        T5Config(d_model=32, architectures=["T5ForConditionalGeneration"]),
    ],
    ids=["encoder", "encoder-decoder"],
)
def test_models_that_are_not_decoders_are_refused(config: PreTrainedConfig, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"\((Bert|T5)For\w+\) is not a decoder-only language model"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "owner/nowhere"])
def test_a_missing_model_is_named(name):
    with pytest.raises(UserError, match=f"Model '{name}'.*; give a model folder or a hub id"):
        load_config(name)


def test_a_model_without_tokenizer_is_refused(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"Tokenizer of .*damaged' cannot be read .*; put tokenizer\.json beside"):
        load_tokenizer(str(copy))


@pytest.mark.parametrize("content", ["5", "[]", "null"])
def test_a_damaged_generation_config_is_refused(copy, content):
    (copy / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"Weights of .*damaged' cannot be read .*; the folder needs"):
        load_model(str(copy))


@pytest.mark.parametrize("content", ["{", "[]", '{"model": null}', '{"version": "1.0", "truncation": 0}'])
def test_a_damaged_tokenizer_is_refused(copy, content):
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"Tokenizer of .*damaged' cannot be read .*; put tokenizer\.json beside"):
        load_tokenizer(str(copy))


def test_a_tokenizer_that_contradicts_itself_is_refused(copy):
    """Loading forgives a merge of tokens that the vocabulary lacks, and writing it down again does not."""
    path = copy / "tokenizer.json"
    state = json.loads(path.read_text())
    first, second = state["model"]["merges"][-1]
    del state["model"]["vocab"][first + second]
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"Tokenizer of .*damaged' (cannot be read|contradicts itself) .*out of vocab"):
        ByteTokenizer.from_tokenizer(load_tokenizer(str(copy)))


def test_a_tokenizer_whose_unknown_token_is_no_token_is_refused(copy):
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unk_token": ""}))
    with pytest.raises(UserError, match=r"Tokenizer of .*damaged' contradicts itself"):
        ByteTokenizer.from_tokenizer(load_tokenizer(str(copy)))
