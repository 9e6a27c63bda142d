"""An adapter in other forms computes the same."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from castlora import UserError, convert
from castlora.adapters.conversion import GGUF_SCRIPT
from castlora.adapters.factors import read_factors
from castlora.adapters.files import CONFIG_FILE, WEIGHTS_FILE, open_adapter
from castlora.adapters.mlx import MLX_WEIGHTS_FILE
from castlora.adapters.unpickling import PICKLED_FILE
from castlora.cli import main
from castlora.models.loading import load_config
from castlora.text.chat import TEMPLATE_FILE

IDS = torch.tensor([[5, 6, 7, 8, 9]])
UNLIKE = {"rank_pattern": (("q_proj", 2),), "alpha_pattern": (("v_proj", 3),), "use_rslora": True}


@pytest.fixture
def source(adapter):
    def make(name: str, modules=None, **options) -> str:
        return str(adapter(name, modules, **options))

    return make


def logits_with(base: Path, adapter: Path | str) -> torch.Tensor:
    return tiny.logits(PeftModel.from_pretrained(tiny.load(base), str(adapter)).eval(), IDS)


@pytest.mark.parametrize(("name", "modules"), [("llama", None), ("gpt2", None), ("phi3", ("qkv_proj",))])
def test_to_mlx_and_back_computes_the_same(base_model, source, tmp_path, name, modules):
    adapter = source(name, modules)
    convert(adapter, "mlx", str(tmp_path / "mlx"), base=str(base_model(name)))
    config = json.loads((tmp_path / "mlx" / CONFIG_FILE).read_text())
    assert (config["fine_tune_type"], config["lora_parameters"]["scale"]) == ("lora", 1.0)
    convert(str(tmp_path / "mlx"), "peft", str(tmp_path / "peft"))
    expected, found = (logits_with(base_model(name), path) for path in (adapter, tmp_path / "peft"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - tiny.logits(tiny.load(base_model(name)), IDS)).abs().max() > 1e-2


def test_mlx_has_one_rank_all_layers_and_names_inside_a_layer(base_model, source, tmp_path):
    adapter = source("llama", ("q_proj", "v_proj"), layers_to_transform=(2,))
    convert(adapter, "mlx", str(tmp_path / "mlx"), base=str(base_model("llama")))
    config = json.loads((tmp_path / "mlx" / CONFIG_FILE).read_text())
    assert config["num_layers"] == 3
    assert config["lora_parameters"]["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]
    tensors = load_file(tmp_path / "mlx" / MLX_WEIGHTS_FILE)
    assert len(tensors) == 3 * 2 * 2
    assert {tensor.shape[1] for key, tensor in tensors.items() if key.endswith("lora_a")} == {
        config["lora_parameters"]["rank"]
    }
    adapted = {key.split(".")[2] for key, tensor in tensors.items() if key.endswith("lora_b") and tensor.any()}
    assert adapted == {"2"}


def test_gpt2_layers_have_the_name_that_mlx_gives_them(base_model, source, tmp_path):
    convert(source("gpt2"), "mlx", str(tmp_path / "mlx"), base=str(base_model("gpt2")))
    keys = load_file(tmp_path / "mlx" / MLX_WEIGHTS_FILE)
    assert "model.h.0.attn.c_attn.lora_a" in keys
    assert all(key.startswith("model.h.") for key in keys)


def test_a_trained_scale_of_mlx_is_folded_in(base_model, source, tmp_path):
    convert(source("llama"), "mlx", str(tmp_path / "mlx"), base=str(base_model("llama")))
    config = json.loads((tmp_path / "mlx" / CONFIG_FILE).read_text())
    config["lora_parameters"]["scale"] = 20.0
    (tmp_path / "mlx" / CONFIG_FILE).write_text(json.dumps(config))
    tensors = load_file(tmp_path / "mlx" / MLX_WEIGHTS_FILE)
    save_file(
        {key: tensor / 20 if key.endswith("lora_b") else tensor for key, tensor in tensors.items()},
        tmp_path / "mlx" / MLX_WEIGHTS_FILE,
    )
    convert(str(tmp_path / "mlx"), "peft", str(tmp_path / "peft"))
    torch.testing.assert_close(
        logits_with(base_model("llama"), tmp_path / "peft"),
        logits_with(base_model("llama"), source("llama")),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_unlike_ranks_and_scales_become_one(base_model, tmp_path):
    options = {name: dict(value) if isinstance(value, tuple) else value for name, value in UNLIKE.items()}
    tiny.save_adapter(tmp_path / "unlike", base_model("llama"), ("q_proj", "v_proj", "down_proj"), **options)
    convert(str(tmp_path / "unlike"), "peft", str(tmp_path / "plain"), base=str(base_model("llama")))
    config = json.loads((tmp_path / "plain" / CONFIG_FILE).read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert not config["rank_pattern"] and not config["use_rslora"]
    expected, found = (logits_with(base_model("llama"), tmp_path / name) for name in ("unlike", "plain"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_merged_model_needs_no_adapter(base_model, source, tmp_path, options):
    adapter = source("mistral", ("q_proj", "down_proj"), **options)
    convert(adapter, "merged", str(tmp_path / "merged"), base=str(base_model("mistral")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    expected = logits_with(base_model("mistral"), adapter)
    torch.testing.assert_close(tiny.logits(merged, IDS), expected, rtol=1e-4, atol=1e-4)
    assert tiny.tokenizer_of(tmp_path / "merged")("Who?") == tiny.tokenizer_of(base_model("mistral"))("Who?")


@pytest.mark.parametrize("modules", [["lm_head"], ["wte"], ["lm_head", "wte"]])
def test_a_merged_model_keeps_apart_what_an_adapter_changed_in_tied_embeddings(base_model, tmp_path, modules):
    base = base_model("gpt2")
    assert load_config(str(base)).tie_word_embeddings
    live = tiny.save_adapter(tmp_path / "adapter", base, ["c_attn", *modules])
    for name, parameter in live.named_parameters():
        if "lora_embedding_A" in name:
            parameter.data.normal_(std=0.1)
    live.save_pretrained(tmp_path / "adapter")
    convert(str(tmp_path / "adapter"), "merged", str(tmp_path / "merged"), base=str(base))
    expected = logits_with(base, tmp_path / "adapter")
    torch.testing.assert_close(tiny.logits(tiny.load(tmp_path / "merged"), IDS), expected, rtol=1e-4, atol=1e-4)


def test_a_merged_model_has_the_precision_of_its_base(base_model, source, tmp_path):
    half = tmp_path / "half"
    tiny.load(base_model("llama")).to(torch.bfloat16).save_pretrained(half)
    tiny.tokenizer_of(base_model("llama")).save_pretrained(half)
    convert(source("llama"), "merged", str(tmp_path / "merged"), base=str(half))
    assert load_config(str(tmp_path / "merged")).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_a_chat_template_beside_the_adapter_comes_along(base_model, source, tmp_path):
    shutil.copytree(source("llama"), tmp_path / "adapter")
    (tmp_path / "adapter" / TEMPLATE_FILE).write_text("{{ messages[0].content }}")
    for form in ("peft", "mlx", "merged"):
        convert(str(tmp_path / "adapter"), form, str(tmp_path / form), base=str(base_model("llama")))
        assert (tmp_path / form / TEMPLATE_FILE).read_text() == "{{ messages[0].content }}"


def test_llama_cpp_is_asked_for_a_file(base_model, source, tmp_path):
    sources = tmp_path / "llama.cpp"
    sources.mkdir()
    (sources / GGUF_SCRIPT).write_text(
        "import json, sys\nopen(sys.argv[sys.argv.index('--outfile') + 1], 'w').write(json.dumps(sys.argv))\n"
    )
    adapter = source("llama")
    convert(adapter, "gguf", str(tmp_path / "out.gguf"), base=str(base_model("llama")), llama_cpp=str(sources))
    asked = json.loads((tmp_path / "out.gguf").read_text())
    assert asked[-1] == adapter
    assert asked[asked.index("--base") + 1] == str(base_model("llama"))
    assert asked[asked.index("--outtype") + 1] == "f32"


def bad_mlx(tmp_path, base_model, source, change) -> str:
    folder = tmp_path / "mlx"
    convert(source("llama"), "mlx", str(folder), base=str(base_model("llama")))
    change(folder)
    return str(folder)


def edit(**fields):
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(config | fields))

    return change


def tensors(change_tensors):
    def change(folder: Path) -> None:
        found = load_file(folder / MLX_WEIGHTS_FILE)
        change_tensors(found)
        save_file(found, folder / MLX_WEIGHTS_FILE)

    return change


Q = "model.layers.1.self_attn.q_proj.lora_a"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (edit(fine_tune_type="dora"), "fine_tune_type is 'dora'"),
        (edit(lora_parameters={"rank": 8, "alpha": 16}), "no number 'scale'"),
        (edit(lora_parameters=[1]), "no number 'scale'"),
        (edit(model=None), "give it with --base"),
        (lambda folder: (folder / MLX_WEIGHTS_FILE).write_bytes(b"{}"), "cannot be read"),
        (lambda folder: (folder / MLX_WEIGHTS_FILE).unlink(), "cannot be read"),
        (tensors(lambda found: found.pop(Q)), "do not fit"),
        (tensors(lambda found: found.update({Q: found[Q][:-1].clone()})), "do not fit"),
        (tensors(lambda found: found.update({Q: found[Q] * torch.nan})), "NaN"),
        (tensors(lambda found: found.update({"lm_head.lora_a": torch.ones(2, 2)})), "holds 'lm_head.lora_a'"),
        (tensors(lambda found: found.clear()), "holds no factor"),
    ],
    ids=range(11),
)
def test_bad_mlx_adapters_are_named_and_nothing_is_written(base_model, source, tmp_path, change, complaint):
    folder = bad_mlx(tmp_path, base_model, source, change)
    with pytest.raises(UserError, match=complaint):
        convert(folder, "peft", str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["mlx"]


def test_an_mlx_adapter_given_to_anything_else_is_told_what_to_do(base_model, source, tmp_path):
    folder = bad_mlx(tmp_path, base_model, source, edit())
    with pytest.raises(UserError, match="castlora convert"):
        open_adapter(folder)
    with pytest.raises(UserError, match="--to peft first"):
        convert(folder, "merged", str(tmp_path / "out"))


def test_a_rank_that_engines_do_not_accept_is_not_cut_in_silence(base_model, source, tmp_path):
    adapter, base = source("llama", ("q_proj",), r=256), str(base_model("llama"))
    with pytest.raises(
        UserError, match="has rank 256, above 128, the largest that all serving engines accept; give --to merged"
    ):
        convert(adapter, "peft", str(tmp_path / "out"), base=base)
    assert not list(tmp_path.iterdir())
    convert(adapter, "merged", str(tmp_path / "out"), base=base)


@pytest.mark.parametrize("form", ["peft", "mlx"])
def test_other_kinds_of_adapters_can_only_be_merged(base_model, source, tmp_path, form):
    with pytest.raises(UserError, match="kind DoRA, which has no exact low-rank form; give --to merged"):
        convert(source("llama", use_dora=True), form, str(tmp_path / "out"), base=str(base_model("llama")))


@pytest.mark.parametrize("form", ["peft", "mlx", "gguf", "merged"])
def test_what_is_trained_beyond_maps_can_only_be_merged(base_model, source, tmp_path, form):
    folder, base = source("llama", modules_to_save=("lm_head",)), str(base_model("llama"))
    (tmp_path / GGUF_SCRIPT).write_text("raise AssertionError")
    llama_cpp = str(tmp_path) if form == "gguf" else None
    if form == "merged":
        convert(folder, form, str(tmp_path / "out"), base=base)
        expected = tiny.logits(tiny.load_adapted(Path(base), Path(folder)), IDS)
        torch.testing.assert_close(tiny.logits(tiny.load(tmp_path / "out"), IDS), expected, rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(UserError, match=r"also trains lm_head, .* convert --to merged"):
        convert(folder, form, str(tmp_path / "out"), base=base, llama_cpp=llama_cpp)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--to", "peft", "--out", "taken"], "--out 'taken' exists"),
        (["--to", "gguf", "--out", "new.gguf"], "--llama-cpp names the folder"),
        (["--to", "mlx", "--out", "new", "--llama-cpp", "."], "--llama-cpp names the folder"),
        (["--to", "gguf", "--out", "new.gguf", "--llama-cpp", "taken"], f"has no {GGUF_SCRIPT}"),
        (["--to", "gguf", "--out", "new.gguf", "--llama-cpp", "failing"], "ImportError: no gguf"),
        (["--to", "pickle", "--out", "new"], "does not accept 'pickle'"),
    ],
)
def test_bad_conversions_end_with_one_sentence(base_model, source, tmp_path, monkeypatch, capsys, options, complaint):
    monkeypatch.chdir(tmp_path)
    for name, text in (("taken", "mine"), ("failing", "raise ImportError('no gguf')")):
        Path(name).mkdir()
        (Path(name) / ("notes.txt" if name == "taken" else GGUF_SCRIPT)).write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--adapter", source("llama"), "--base", str(base_model("llama")), *options])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["failing", "taken"]


def test_a_converted_adapter_can_be_read_again(base_model, source, tmp_path):
    convert(source("llama"), "peft", str(tmp_path / "plain"), base=str(base_model("llama")))
    config = load_config(str(base_model("llama")))
    before, after = (read_factors(open_adapter(name), config) for name in (source("llama"), str(tmp_path / "plain")))
    assert before.keys() == after.keys()
    for name, lora in before.items():
        torch.testing.assert_close(after[name].b @ after[name].a, lora.b @ lora.a)


def pickle_weights(adapter: Path, content) -> Path:
    torch.save(content, adapter / PICKLED_FILE)
    (adapter / WEIGHTS_FILE).unlink(missing_ok=True)
    return adapter


@pytest.fixture
def copy(source, tmp_path) -> Path:
    return Path(shutil.copytree(source("llama"), tmp_path / "old"))


def test_a_pickled_adapter_becomes_a_safe_one(copy, tmp_path):
    tensors = load_file(copy / WEIGHTS_FILE)
    pickle_weights(copy, {name: tensor.T.contiguous().T for name, tensor in tensors.items()})
    main(["convert", "--adapter", str(copy), "--to", "safetensors", "--out", str(tmp_path / "new")])
    written = load_file(tmp_path / "new" / WEIGHTS_FILE)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "new" / CONFIG_FILE).read_bytes() == (copy / CONFIG_FILE).read_bytes()
    assert open_adapter(str(tmp_path / "new")).is_plain


class RunsCode:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("kind", ["code", "list", "number", "noise"])
def test_a_pickle_of_anything_but_tensors_is_refused_and_nothing_in_it_runs(copy, tmp_path, kind):
    witness = tmp_path / "witness"
    contents = {"code": RunsCode(witness), "list": [torch.ones(2)], "number": {"lora_A": 3}, "noise": {}}
    pickle_weights(copy, contents[kind])
    if kind == "noise":
        (copy / PICKLED_FILE).write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(UserError, match=r"adapter_model\.bin' holds more than") as raised:
        convert(str(copy), "safetensors", str(tmp_path / "new"))
    assert str(raised.value).isprintable()
    assert not witness.exists() and not (tmp_path / "new").exists()


def test_without_a_pickle_there_is_nothing_to_make_safe(copy, tmp_path):
    with pytest.raises(UserError, match=r"has no adapter_model\.bin; --to safetensors is for folders"):
        convert(str(copy), "safetensors", str(tmp_path / "new"))
