"""Models that cannot tell the end of a text from tokens that they never met."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model

from castlora import model_pair
from castlora.adapters.factors import LowRank
from castlora.config import TextTuning
from castlora.evaluation.accuracy import evaluate_model
from castlora.evaluation.tasks import TaskItem
from castlora.models.endings import end_tokens_of
from castlora.models.loading import load_config
from castlora.pipeline import TransferResult, transfer
from castlora.teaching.teach import teach

UNMET = [5, 9, 300]
END = 2


def forget(model: torch.nn.Module) -> None:
    """Makes the end of a text one of several tokens whose rows of the head are nearly the same."""
    head = model.get_output_embeddings().weight
    noise = torch.randn(len(UNMET), head.shape[1], generator=torch.Generator().manual_seed(0))
    # Longer, so that the end itself is never the likeliest.
    head.data[UNMET] = 1.02 * head.data[END] + 0.05 * head.data.std() * noise


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_model_that_knows_its_tokens_ends_a_text_with_one(base_model, name):
    end = tiny.tokenizer_of(base_model(name)).eos_token_id
    assert end_tokens_of(tiny.load(base_model(name)), end) == (end,)


def test_tokens_that_are_predicted_alike_are_found(base_model):
    model = tiny.load(base_model("llama"))
    forget(model)
    assert end_tokens_of(model, END) == (END, *UNMET)
    assert end_tokens_of(model.to(torch.bfloat16), END) == (END, *UNMET)


def test_an_adapter_that_trains_the_head_tells_them_apart(base_model):
    model = tiny.load(base_model("llama"))
    forget(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert len(end_tokens_of(adapted, END)) == 4
    with torch.no_grad():
        adapted.get_output_embeddings().weight[END] += torch.randn(32, generator=torch.Generator().manual_seed(1))
    assert end_tokens_of(adapted, END) == (END,)


def test_a_tokenizer_without_an_end_or_with_one_that_is_not_predicted(base_model):
    model = tiny.load(base_model("llama"))
    assert end_tokens_of(model, None) == end_tokens_of(model, model.config.vocab_size) == ()


@pytest.fixture
def forgetful_base(base_model, tmp_path):
    """Name of a family → a model of it that cannot tell the end of a text from other tokens."""

    def make(name: str) -> Path:
        folder = tmp_path / f"forgetful-{name}"
        model = tiny.load(base_model(name))
        forget(model)
        model.save_pretrained(folder)
        tiny.tokenizer_of(base_model(name)).save_pretrained(folder)
        return folder

    return make


def adapter_that_ends(base: Path, folder: Path) -> str:
    """An adapter for a Llama that ends most answers at once."""
    model = tiny.load(base)
    adapted = tiny.save_adapter(folder, base, ["down_proj"])
    config = load_config(str(base))
    last = adapted.get_submodule(f"base_model.model.model.layers.{config.num_hidden_layers - 1}.mlp.down_proj")
    toward_end = model.get_output_embeddings().weight[END] * model.model.norm.weight
    update = LowRank(torch.ones(1, config.intermediate_size), toward_end.unsqueeze(-1))
    with torch.no_grad():
        last.lora_A.default.weight[:1], last.lora_B.default.weight[:, :1] = update.a, 40 * update.b
    adapted.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def forgetful_adapter(forgetful_base, tmp_path):
    """An adapter that ends most answers at once, for a base model that cannot tell the end from other tokens."""
    return adapter_that_ends(forgetful_base("llama"), tmp_path / "adapter")


def test_what_the_source_cannot_tell_from_the_end_is_the_end_of_an_answer(
    forgetful_adapter, prompts_file, tmp_path, caplog, monkeypatch
):
    def empty_answers(out: str) -> int:
        as_given = TextTuning(fewest_prompts=0)
        taught = teach(forgetful_adapter, str(tmp_path / out), prompts=str(prompts_file), tuning=as_given)
        return sum(json.loads(line)["answer"] == "" for line in taught.read_text().splitlines())

    with caplog.at_level("INFO", logger="castlora"):
        found = empty_answers("found.jsonl")
    assert "The source predicts 3 tokens as it predicts '</s>', which ends its texts" in caplog.text
    monkeypatch.setattr(model_pair, "end_tokens_of", lambda _model, end: (end,))
    assert found > 2 * empty_answers("overlooked.jsonl") > 0


def test_a_target_learns_to_end_where_the_source_does(forgetful_adapter, prompts_file, quick_transfer):
    result = quick_transfer(
        "llama", "mistral", adapter=forgetful_adapter, prompts=str(prompts_file), start="readout", steps=40
    )
    assert result.manifest["shared_vocabulary"]["source_ends"] == 4
    samples = json.loads((result.folder / "report.json").read_text())["samples"]
    assert ("", "") in [(sample["expected"], sample["outputs"]["transferred"]) for sample in samples]
    assert "" not in {sample["outputs"]["bare target"] for sample in samples}


@pytest.mark.parametrize("target", ["mistral", "llama"])
def test_a_target_that_cannot_tell_its_end_ends_with_any_of_those_tokens(
    target, base_model, forgetful_base, prompts_file, checked_in_process, monkeypatch, tmp_path, caplog
):
    adapter, base = adapter_that_ends(base_model("llama"), tmp_path / "adapter"), str(forgetful_base(target))

    def transferred(out: str) -> TransferResult:
        return transfer(
            adapter, base, str(tmp_path / out), prompts=str(prompts_file), start="readout", steps=40, batch_size=4,
            tuning=tiny.SHORT,
        )  # fmt: skip

    with caplog.at_level("INFO", logger="castlora"):
        found = transferred("found")
    assert "The target predicts 3 tokens as it predicts '</s>', which ends its texts" in caplog.text
    assert found.manifest["shared_vocabulary"]["target_ends"] == [END, *UNMET]
    assert "predicts 3 tokens as it predicts the one that ends its texts" in (found.folder / "README.md").read_text()
    monkeypatch.setattr(model_pair, "end_tokens_of", lambda _model, end: (end,))
    overlooked = transferred("overlooked")
    assert found.manifest["answers"]["same_after"] > overlooked.manifest["answers"]["same_after"]
    assert found.manifest["losses"]["kl_after"] < overlooked.manifest["losses"]["kl_after"]
    assert "predicts the one that ends" not in (overlooked.folder / "README.md").read_text()


def test_a_text_that_is_scored_ends_with_what_the_model_cannot_tell_from_its_end(base_model, forgetful_base, tmp_path):
    model = tiny.load(forgetful_base("llama"))
    tokenizer = tiny.tokenizer_of(base_model("llama"))
    model = PeftModelForCausalLM.from_pretrained(
        model, adapter_that_ends(forgetful_base("llama"), tmp_path / "adapter")
    )
    item = TaskItem("Question: who?\nType:", " a b c", None)
    (prediction,) = evaluate_model(model, tokenizer, [item]).predictions
    assert prediction == ""
