import json
import shutil

import pytest
import tiny

from castlora import UserError, inspect
from castlora.adapters.factors import read_factors
from castlora.adapters.files import open_adapter
from castlora.alignment.tokens import ByteTokenizer
from castlora.alignment.vocabulary import SharedVocabulary
from castlora.cli import parser
from castlora.inspection import _duration, parameter_count
from castlora.models.loading import load_config
from castlora.plan import plan_transfer


def text_of(*arguments: str, **options: object) -> str:
    return str(inspect(*arguments, **options))


@pytest.fixture
def weightless(base_model, tmp_path):
    """Copies of tiny models without their weights."""

    def make(name: str) -> str:
        return shutil.copytree(base_model(name), tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))

    return make


def test_a_transfer_is_described_without_any_weights(adapter, weightless):
    text = text_of(str(adapter("gpt2-deep")), str(weightless("llama")), source=str(weightless("gpt2-deep")), steps=10)
    assert "source    gpt2            5     40" in text
    assert "target    llama           3     32" in text
    assert "20 modules of rank 4. The folded maps need rank 4, a fresh start 4;" in text
    assert "q_proj <- c_attn(q)" in text and "gate_proj <- nothing" in text
    assert "dropped (no partner in the target): transformer.h.1,3.attn.c_attn, " in text
    assert "Source modules dropped: 8. Target modules left unchanged: 3." in text
    assert text.startswith("It can be moved: 18 of 21 modules of the target have a partner in the adapter. The default")
    assert "GiB of disk while it runs" in text
    assert "Forecast for 10 steps of 16 passages on this machine: about " in text
    assert "source + LoRA reads 66048 candidate prompts and writes answers: about " in text
    shared = SharedVocabulary.of(
        *(ByteTokenizer.from_tokenizer(tiny.family(name)[1]) for name in ("gpt2-deep", "llama")), 300, 309
    )
    count = len(shared.source_ids)
    assert f"{count} tokens are spelled alike, {count / 300:.0%} of the source's and {count / 309:.0%}" in text


def test_a_start_whose_folded_rank_no_engine_takes_is_cut(base_model, tmp_path):
    tiny.save_adapter(tmp_path / "wide", base_model("llama"), tiny.LINEAR_MODULES["llama"], r=64)
    text = text_of(str(tmp_path / "wide"), str(base_model("phi3")), source=str(base_model("llama")))
    assert text.startswith("It can be moved: ")
    assert "The folded maps need rank 192" in text and "A start that needs more is cut to rank 128." in text


def test_the_command_that_moves_the_adapter_is_given(adapter, base_model, tmp_path):
    path, target, source = adapter("llama"), base_model("phi3"), base_model("llama")
    text = text_of(str(path), str(target), source=str(source))
    command = f"castlora transfer --adapter {path} --target {target} --source {source} --out NEW-FOLDER --prompts FILE"
    assert f"To move it:\n  {command}\n" in text
    parsed = parser().parse_args([word.replace("NEW-FOLDER", str(tmp_path)) for word in command.split()[1:]])
    assert parsed.transfer.prompts == "FILE"
    shorter = inspect(str(path), str(target), str(source), steps=200, batch_size=4).record["command"]
    assert shorter == command.replace("--prompts FILE", "--prompts FILE --steps 200 --batch-size 4")


def test_one_tokenizer_is_recognised(adapter, base_model):
    assert "Tokenizers: the same, 309 tokens." in text_of(str(adapter("llama")), str(base_model("phi3")))


def test_a_part_of_a_module_that_is_lost_is_named(adapter, base_model):
    text = text_of(str(adapter("phi3")), str(base_model("gpt2")))
    assert "model.layers.0-2.mlp.gate_up_proj(gate)" in text


def test_places_are_shown_in_the_command_alone(adapter, base_model):
    path = adapter("llama")
    found, command = text_of(str(path), str(base_model("mistral"))).split("To move it:")
    assert str(path.parent) not in found
    assert str(path) in command


def test_parameters_are_counted_as_transformers_counts_them(adapter, base_model):
    plan = plan_transfer(str(adapter("llama")), str(base_model("gpt2")), None)
    assert parameter_count(plan) == tuple(tiny.load(base_model(name)).num_parameters() for name in ("llama", "gpt2"))


def test_an_adapter_that_names_no_base_needs_one_from_the_user(base_model, tmp_path):
    tiny.save_adapter(tmp_path, base_model("llama"), ("q_proj",))
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base_model("llama")), ""))
    with pytest.raises(UserError, match="names no base model; name it with --source"):
        inspect(str(tmp_path), str(base_model("gpt2")))
    assert "target module <- source module" in text_of(str(tmp_path), str(base_model("gpt2")), str(base_model("llama")))


@pytest.mark.parametrize(("target", "is_alike"), [("llama", True), ("mistral", False)])
def test_a_target_of_the_same_shapes_may_take_the_adapter_as_it_is(adapter, base_model, target, is_alike):
    text = text_of(str(adapter("llama")), str(base_model(target)), source=str(base_model("llama")))
    assert ("try the adapter as it is first" in text) == is_alike


def test_the_plan_knows_which_ranks_hold_the_update(adapter, base_model):
    plan = plan_transfer(str(adapter("llama")), str(base_model("phi3")), None)
    assert plan.exact_rank == 12
    assert (
        read_factors(open_adapter(str(adapter("llama"))), load_config(str(base_model("llama")))).keys()
        == plan.factors.keys()
    )


def test_a_rank_that_no_engine_accepts_is_said_to_be_cut(adapter, base_model):
    target = str(base_model("phi3"))
    assert "is cut to rank 128" in text_of(str(adapter("llama", ("q_proj", "k_proj"), r=65)), target)
    assert "is cut to rank" not in text_of(str(adapter("llama", ("q_proj", "k_proj"), r=64)), target)


def test_what_no_map_carries_is_said_before_a_model_is_loaded(base_model, adapter):
    extra = adapter("llama", ("q_proj",), modules_to_save=("lm_head",))
    assert "also trains lm_head. No map carries that;" in text_of(str(extra), str(base_model("mistral")))
    assert "also trains" not in text_of(str(adapter("llama")), str(base_model("mistral")))


def test_quantized_weights_are_forecast_and_stand_in_the_command(adapter, base_model):
    def found(**bits):
        return inspect(str(adapter("llama")), str(base_model("mistral")), **bits)

    whole, four, eight = found(), found(source_bits=4, target_bits=4), found(target_bits=8)
    memory = [inspection.record["forecast"]["memory_bytes"] for inspection in (whole, eight, four)]
    assert memory == sorted(memory, reverse=True) and len(set(memory)) == 3
    assert four.record["forecast"]["low_memory_bytes"] < whole.record["forecast"]["low_memory_bytes"]
    assert eight.record["forecast"]["low_memory_bytes"] is None and "--low-memory" not in str(eight)
    assert four.record["command"].endswith("--source-bits 4 --target-bits 4")
    assert eight.record["command"].endswith("--target-bits 8") and "bits" not in whole.record["command"]
    dora = adapter("llama", use_dora=True)
    with pytest.raises(UserError, match="--source-bits is for plain LoRAs"):
        inspect(str(dora), str(base_model("mistral")), source_bits=4)


def test_what_each_process_holds_of_the_models_is_forecast(adapter, base_model):
    def found(**options):
        return inspect(str(adapter("llama")), str(base_model("mistral")), **options)

    memory = [found(processes=count).record["forecast"]["memory_bytes"] for count in (1, 2, 4)]
    assert memory == sorted(memory, reverse=True) and len(set(memory)) == 3
    told = found(processes=4)
    assert "in each of 4 processes that hold the models together" in str(told)
    of_layers = [found(processes=count).record["forecast"]["low_memory_bytes"] for count in (2, 4)]
    assert memory[1] > of_layers[0] > of_layers[1] and memory[2] > of_layers[1]
    assert told.record["command"].startswith("torchrun --nproc-per-node 4 -m -- castlora transfer")
    assert told.record["command"].endswith("--sharded true") and "--sharded" not in found().record["command"]
    refused = {
        "--sharded takes weights in full precision": {"processes": 2, "source_bits": 4},
        "processes is 0; give": {"processes": 0},
        "batch_size is 0; give a number above 0": {"batch_size": 0},
        "steps is -5; give 0 or more": {"steps": -5},
        "each process rehearses in every step, so give a multiple of 12": {"processes": 3},
    }
    for complaint, options in refused.items():
        with pytest.raises(UserError, match=complaint):
            found(**options)


@pytest.mark.parametrize("available", [True, False])
def test_a_missing_package_is_named_beside_the_command(adapter, base_model, monkeypatch, available):
    monkeypatch.setattr("castlora.inspection.is_bitsandbytes_available", lambda: available)
    told = str(inspect(str(adapter("llama")), str(base_model("mistral")), target_bits=4))
    assert ("needs bitsandbytes, which is missing here: pip install 'castlora[quantized]'" in told) != available
    assert "bitsandbytes" not in str(inspect(str(adapter("llama")), str(base_model("mistral"))))


def test_programs_find_in_the_record_what_the_text_says(adapter, base_model):
    found = inspect(str(adapter("phi3")), str(base_model("gpt2")), steps=7, batch_size=3)
    record = json.loads(json.dumps(found.record))
    assert (record["source"]["family"], record["target"]["family"]) == ("phi3", "gpt2")
    assert {entry["target"] for entry in record["pairing"] if not entry["sources"]} == set(record["unchanged"])
    assert "model.layers.2.mlp.gate_up_proj(gate)" in record["dropped"]
    assert record["adapter"]["rank_of_folded_maps"] >= record["adapter"]["rank_of_fresh_start"] == 4
    assert set(record["adapter"]["ranks"].values()) == {4} and record["adapter"]["beyond_maps"] == []
    assert (record["forecast"]["steps"], record["forecast"]["batch_size"]) == (7, 3)
    assert record["forecast"]["seconds"] > 0 and record["forecast"]["memory_bytes"] > 0
    assert record["forecast"]["writing_seconds"] > 0 and "the target writes 70 passages to rehearse" in str(found)
    assert record["forecast"]["searching_seconds"] > 0 and "it is first asked in 400 formats: about " in str(found)
    assert record["command"] in str(found)
    untrained = inspect(str(adapter("phi3")), str(base_model("gpt2")), steps=0)
    assert untrained.record["forecast"]["seconds"] > 0 and "Forecast for the start without a step" in str(untrained)
    assert "the target writes 320 passages to rehearse" in str(untrained)
    same = inspect(str(adapter("llama")), str(base_model("phi3"))).record["tokenizers"]
    assert same == {"same": True, "source_tokens": 309, "target_tokens": 309, "spelled_alike": 309}


def test_durations_are_written_as_people_say_them():
    times = (0.01, 1.4, 2.0, 89.0, 90.0, 5400.0)
    assert [_duration(seconds) for seconds in times] == [
        "a second", "a second", "2 seconds", "89 seconds", "2 minutes", "1.5 hours",
    ]  # fmt: skip
