"""Transfers between base models whose layers are quantized by bitsandbytes."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoConfig

from castlora import UserError, evaluate, pipeline, teach, transfer
from castlora.adapters.live import attach_lora
from castlora.cli import main
from castlora.evaluation.verification import tolerance
from castlora.models import loading
from castlora.models.loading import load_config, load_model
from castlora.models.modules import linear_slots

pytest.importorskip("bitsandbytes")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Family → folder of a tiny model whose matrices are as wide as a block of NF4."""
    folder = tmp_path_factory.mktemp("wide")

    @functools.cache
    def make(name: str) -> str:
        shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
        shape |= {"num_key_value_heads": 4} if name == "mistral" else {}
        tokenizer = tiny.byte_level(300) if name == "gpt2" else tiny.sentencepiece_type(60)
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        given = shape | special | {"vocab_size": len(tokenizer), "max_position_embeddings": tiny.CONTEXT}
        config = AutoConfig.for_model(name, **given, initializer_range=0.2)
        return str(tiny.save_model(folder / name, config, tokenizer, seed=len(name)))

    return make


@pytest.fixture
def move(base, save_adapter, tmp_path, prompts_file, checked_in_process):
    """Transfers an adapter for all linear modules of one to another."""

    def run(source: str, target: str, /, **options):
        places = save_adapter(source), target if "/" in target else base(target), str(tmp_path / "out")
        tuning = replace(tiny.SHORT, answer_tokens=6)
        options = {"steps": 3, "batch_size": 4, "tuning": tuning} | options
        return transfer(*places, prompts=str(prompts_file), **options)

    return run


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("source", "target"), [("llama", "gpt2"), ("gpt2", "mistral")])
def test_what_is_written_belongs_to_the_quantized_target(move, base, source, target, bits):
    result = move(source, target, source_bits=bits, target_bits=bits, steps=30)
    assert result.manifest["logit_difference"] <= tolerance(torch.float32, bits)
    assert (result.manifest["source_bits"], result.manifest["target_bits"]) == (bits, bits)
    assert f"--source-bits {bits} --target-bits {bits}" in result.manifest["command"]
    losses = result.manifest["losses"]
    assert losses["held_out_after"] < losses["held_out_bare"]
    quantized, _ = load_model(base(target), bits=bits)
    bare = tiny.logits(quantized, IDS)
    adapted = tiny.logits(PeftModel.from_pretrained(quantized, result.folder), IDS)
    assert (adapted - bare).abs().max() > 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_are_quantized_and_compute_nearly_the_same(base, bits):
    whole, _ = load_model(base("llama"))
    quantized, _ = load_model(base("llama"), bits=bits)
    assert quantized.get_memory_footprint() < whole.get_memory_footprint()
    expected, found = (tiny.logits(model, IDS) for model in (whole, quantized))
    assert 0 < (found - expected).norm() < 0.5 * expected.norm()


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_memory_of_weights_is_known_before_they_are_loaded(base, name, bits):
    loaded, _ = load_model(base(name), bits=bits)
    stored = loaded.get_memory_footprint()
    # It does not count the scales of NF4's blocks, nor those of rows in 8 bits.
    matrices = sum(slot.d_in * slot.d_out for slot in linear_slots(loaded, loaded.config).values())
    scales = matrices / 64 * 4 if bits == 4 else 0
    assert loading.weight_bytes(load_config(base(name)), 4, bits) == pytest.approx(stored + scales, rel=0.01)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_pass_through_quantized_layers(base, name, bits):
    found = []
    for own_bits in (None, bits):
        model, _ = load_model(base(name), bits=own_bits)
        torch.manual_seed(0)
        modules = linear_slots(tiny.load(base(name)), load_config(base(name)))
        student = attach_lora(model, modules, 4).eval()
        # Reading without gradients is what lets bitsandbytes repack weights for the processor.
        tiny.logits(student, IDS)
        student(input_ids=IDS, use_cache=False).logits.log_softmax(-1)[..., 0].mean().backward()
        first = [one.grad for key, one in student.named_parameters() if "lora_B" in key and ".0." in key]
        found.append(torch.cat([gradient.flatten() for gradient in first]))
    assert torch.cosine_similarity(*found, dim=0) > 0.7


def test_the_source_alone_can_be_quantized(move):
    result = move("llama", "gpt2", source_bits=4)
    assert (result.manifest["source_bits"], result.manifest["target_bits"]) == (4, None)


@pytest.mark.parametrize("bits", [4, 8])
def test_models_that_were_saved_quantized_are_taken(move, base, tmp_path, bits):
    saved = {}
    for name in ("llama", "gpt2"):
        model, tokenizer = load_model(base(name), bits=bits)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        saved[name] = str(tmp_path / name)
    result = move("llama", saved["gpt2"], source=saved["llama"])
    assert result.manifest["logit_difference"] <= tolerance(torch.float32, bits)


def test_weights_of_four_bits_take_turns(move):
    result = move("llama", "gpt2", source_bits=4, target_bits=4, low_memory=True)
    assert result.manifest["logit_difference"] <= 1e-4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source_bits": 8, "low_memory": True}, "--source-bits 8 cannot be had with --low-memory"),
        ({"target_bits": 8, "low_memory": True}, "--target-bits 8 cannot be had with --low-memory"),
    ],
)
def test_what_cannot_be_is_refused(quick_transfer, tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        quick_transfer("llama", "gpt2", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def save_adapter(base, tmp_path):
    """Writes an adapter for a base model."""

    def write(name: str, **options: bool) -> str:
        slots = linear_slots(tiny.load(base(name)), load_config(base(name)))
        modules = sorted({slot.split(".")[-1] for slot in slots})
        tiny.save_adapter(tmp_path / "adapter", Path(base(name)), modules, **options)
        return str(tmp_path / "adapter")

    return write


@pytest.fixture
def task(tmp_path) -> str:
    item = {"prompt": "Who? Answer:", "completion": " fox", "choices": [" fox", " hen"]}
    (tmp_path / "task.jsonl").write_text(json.dumps(item))
    return str(tmp_path / "task.jsonl")


def test_other_commands_quantize_too(base, save_adapter, task, prompts_file, tmp_path):
    adapter = save_adapter("llama")
    found, whole = (evaluate(base("llama"), task, adapter, bits=bits) for bits in (4, None))
    assert (found["bits"], whole["bits"]) == (4, None) and found["nll"] != whole["nll"]
    options = {"prompts": str(prompts_file), "tuning": replace(tiny.SHORT, answer_tokens=6)}
    taught = [
        teach(adapter, str(tmp_path / f"{bits}.jsonl"), source_bits=bits, **options).read_text() for bits in (4, None)
    ]
    assert taught[0] != taught[1]


def test_scores_are_recorded_in_the_precision_of_the_training(move, base, task, caplog):
    folder = str(move("llama", "gpt2", target_bits=4).folder)
    with pytest.raises(UserError, match="in another precision; give --bits 4, or leave out --record"):
        evaluate(base("gpt2"), task, folder, record=True)
    assert "was trained beside a target of 4 bits; --bits 4 scores it so" not in caplog.text
    evaluate(base("gpt2"), task, folder)
    assert "was trained beside a target of 4 bits; --bits 4 scores it so" in caplog.text
    assert evaluate(base("gpt2"), task, folder, record=True, bits=4)["scores"].keys() == {"bare target", "transferred"}


def test_an_adapter_that_merges_into_weights_is_refused(base, save_adapter, prompts_file, tmp_path):
    places = save_adapter("llama", use_dora=True), base("gpt2"), str(tmp_path / "out")
    with pytest.raises(UserError, match="--source-bits is for plain LoRAs"):
        transfer(*places, prompts=str(prompts_file), source_bits=4, tuning=tiny.SHORT)


def test_the_command_line_takes_four_and_eight_alone(monkeypatch, capsys):
    transferred = MagicMock()
    monkeypatch.setattr(pipeline, "transfer", transferred)
    words = ["transfer", "--adapter", "a", "--target", "t", "--out", "o", "--source-bits", "8"]
    main([*words, "--target-bits", "4"])
    given = transferred.call_args.kwargs
    assert (given["source_bits"], given["target_bits"]) == (8, 4)
    with pytest.raises(SystemExit) as caught:
        main([*words, "--target-bits", "5"])
    assert caught.value.code == 2 and "--target-bits does not accept '5'" in capsys.readouterr().err


def test_without_the_library_it_is_named(quick_transfer, monkeypatch):
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"Weights of 4 bits need bitsandbytes; pip install 'castlora\[quantized\]'"):
        quick_transfer("llama", "gpt2", target_bits=4)
