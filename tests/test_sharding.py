"""Models of which each of several processes holds a part behave as those that each holds in full."""

import json

import pytest
import tiny
import torch
from in_processes import learn_in_parts, read_in_parts
from preloaded import finish, launched, run_castlora
from safetensors.torch import load_file

from castlora import UserError, fit, teach, transfer, transfer_to_each
from castlora.alignment import positions
from castlora.alignment.positions import share_of_passages
from castlora.config import TextTuning, Tuning
from castlora.execution.processes import Process
from castlora.models.loading import load_sharded, load_spread, sharded_bytes

SHORT = Tuning(max_length=60)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "count"), [("llama", 2), ("gpt2", 3)])
def test_a_model_in_parts_says_what_the_whole_one_says_to_one_process_and_to_all(base_model, tmp_path, family, count):
    out = tmp_path / "said.safetensors"
    finish(launched(tmp_path / "heard", count, read_in_parts, base_model(family), out))
    said, model, ids = load_file(out), tiny.load(base_model(family)), torch.arange(5, 13)[None]
    for name in ("all", "main", "again"):
        torch.testing.assert_close(said[name], tiny.logits(model, ids), msg=name)
    assert torch.equal(said["generated"], model.generate(input_ids=ids, max_new_tokens=3, min_length=11))
    held, whole = said["held"].tolist(), int(said["whole"])
    # A weight is cut along its first axis, of which a part may have one row more.
    assert len(held) == count and sum(held) == whole and max(held) < 1.2 * whole / count
    in_one = max(held) + model.num_parameters() - whole
    layer = whole / model.config.num_hidden_layers
    assert sharded_bytes(model.config, 1, count) == pytest.approx(in_one + layer, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_in_parts_can_be_computed_again_for_the_way_back(base_model, tmp_path, family):
    out = tmp_path / "learned.safetensors"
    finish(launched(tmp_path / "heard", 2, learn_in_parts, base_model(family), out))
    found = load_file(out)
    kept = {name.removeprefix("kept "): gradient for name, gradient in found.items() if name.startswith("kept ")}
    all_kept = kept.pop("bytes")
    assert len(kept) > 10 and any(gradient.abs().max() > 0 for gradient in kept.values())
    assert all(torch.equal(found[f"recomputed {name}"], gradient) for name, gradient in kept.items())
    assert found["recomputed bytes"] < 0.5 * all_kept


@pytest.fixture(scope="module")
def settings(base_model, adapter, prompts_file) -> list[str]:
    """Of a short transfer, as the command line has them."""
    places = {"adapter": adapter("llama"), "target": base_model("gpt2"), "prompts": prompts_file}
    numbers = {"steps": 12, "batch-size": 8, "start": "readout", "tuning.max-length": 60, "tuning.answer-tokens": 6}
    numbers |= {"tuning.rehearsal-passages": 8, "tuning.rehearsal-tokens": 12}
    return [word for key, value in (places | numbers).items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def moved(settings, tmp_path_factory):
    """What two processes write with models in full, in parts, and in parts whose activations are computed again."""
    folder = tmp_path_factory.mktemp("moved")
    for sharded, low_memory in (("false", "false"), ("true", "false"), ("true", "true")):
        out = folder / f"{sharded} {low_memory}"
        options = ["--out", out, "--sharded", sharded, "--low-memory", low_memory]
        finish(launched(folder / f"said {out.name}", 2, run_castlora, "transfer", *settings, *options))
    return [folder / name for name in ("false false", "true false", "true true")]


@pytest.mark.slow
def test_a_transfer_writes_the_same_bytes(moved):
    assert len({(folder / "adapter_model.safetensors").read_bytes() for folder in moved}) == 1
    manifests = [json.loads((folder / "castlora.json").read_text()) for folder in moved]
    assert [manifest["sharded"] for manifest in manifests] == [False, True, True]
    assert manifests[0]["losses"] == manifests[1]["losses"] == manifests[2]["losses"]
    assert "--sharded true" in manifests[1]["command"] and "--sharded" not in manifests[0]["command"]
    # Checked with another copy of the target, loaded as one that no accelerator holds.
    assert 0 <= manifests[1]["logit_difference"] < 1e-4


@pytest.mark.slow
def test_a_source_in_parts_answers_once_for_several_targets_in_parts(moved, settings, base_model, tmp_path):
    out = tmp_path / "out"
    more = ["--target", base_model("mistral"), "--out", out, "--sharded", "true"]
    finish(launched(tmp_path / "said", 2, run_castlora, "transfer", *settings, *more))
    weights = [folder / "adapter_model.safetensors" for folder in (out / "gpt2", moved[0])]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert (out / "mistral" / "castlora.json").exists() and (out / "comparison.html").exists()
    adapter, _, prompts = map(str, settings[1:6:2])
    again = teach(
        adapter, str(tmp_path / "taught.jsonl"), prompts=prompts, tuning=TextTuning(max_length=60, answer_tokens=6)
    )
    assert (out / "taught.jsonl").read_bytes() == again.read_bytes()


@pytest.mark.slow
def test_a_bridge_has_the_same_maps(base_model, text_file, tmp_path):
    words = ["fit", "--source", base_model("llama"), "--target", base_model("mistral"), "--text", text_file]
    words += ["--passages", "40", "--roles", '["q","v"]']
    for sharded in ("false", "true"):
        options = ["--out", tmp_path / sharded, "--sharded", sharded]
        finish(launched(tmp_path / f"said {sharded}", 2, run_castlora, *words, *options))
    whole, in_parts = (tiny.maps_in(tmp_path / sharded) for sharded in ("false", "true"))
    assert whole and whole.keys() == in_parts.keys()
    assert all(torch.equal(whole[name], in_parts[name]) for name in whole)


@pytest.mark.parametrize("count", range(1, 5))
def test_processes_read_as_many_batches_as_each_other_and_no_passage_twice(monkeypatch, count):
    passages = tiny.aligned("llama", "gpt2", 40)
    for read in range(1, 41):
        shares = []
        for index in range(count):
            here = Process(index, count, torch.device("cpu"))
            monkeypatch.setattr(positions, "this_process", lambda here=here: here)
            shares.append(share_of_passages(passages[:read], 8))
        assert len({-(-len(share) // 8) for share in shares}) == 1
        counted = [passage for share in shares for passage in share if sum(passage.weights)]
        assert len(counted) == read and all(passage in counted for passage in passages[:read])


def test_a_spread_model_is_the_model(base_model):
    ids = torch.arange(5, 13)[None]
    spread, whole = load_spread(str(base_model("llama"))), tiny.load(base_model("llama"))
    assert torch.equal(tiny.logits(spread, ids), tiny.logits(whole, ids))


@pytest.mark.parametrize(
    ("options", "count", "complaint"),
    [
        ({}, 1, "--sharded splits models among processes, and there is one; start several with torchrun"),
        ({"target_bits": 4}, 2, "--sharded takes weights in full precision; leave out --source-bits and --target-bits"),
        ({"batch_size": 12}, 2, "batch_size is 12; with --sharded each process rehearses in every step, so give a mul"),
    ],
)
def test_what_cannot_be_done_in_parts_is_refused(base_model, adapter, tmp_path, monkeypatch, options, count, complaint):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    with pytest.raises(UserError, match=complaint):
        transfer(
            str(adapter("llama")), str(base_model("gpt2")), str(tmp_path / "out"), sharded=True, tuning=SHORT, **options
        )
    assert not (tmp_path / "out").exists()


def test_adapters_that_merge_into_weights_cannot_be_moved_in_parts(base_model, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--sharded is for plain LoRAs, and this adapter merges into the weights"):
        transfer(
            str(adapter("llama", use_dora=True)),
            str(base_model("gpt2")),
            str(tmp_path / "out"),
            sharded=True,
            tuning=SHORT,
        )


def test_several_targets_and_a_lone_fit_cannot_be_had_in_parts_of_one(base_model, adapter, prompts_file, tmp_path):
    targets = [str(base_model("gpt2")), str(base_model("mistral"))]
    with pytest.raises(UserError, match="--sharded splits models among processes"):
        transfer_to_each(str(adapter("llama")), targets, str(tmp_path / "out"), sharded=True, tuning=SHORT)
    with pytest.raises(UserError, match="--sharded splits models among processes"):
        teach(str(adapter("llama")), str(tmp_path / "out.jsonl"), prompts=str(prompts_file), sharded=True)
    with pytest.raises(UserError, match="--sharded splits models among processes"):
        fit(*targets, str(tmp_path / "out"), sharded=True)
    with pytest.raises(UserError, match="--sharded leaves --low-memory nothing to do in a fit; leave out one of them"):
        fit(*targets, str(tmp_path / "out"), sharded=True, low_memory=True)
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_saved_quantized_cannot_be_sharded(base_model, tmp_path):
    config = json.loads((base_model("llama") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="was saved quantized and cannot be sharded; leave out --sharded"):
        load_sharded(str(tmp_path), None, torch.device("cpu"))
