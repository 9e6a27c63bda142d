import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.zoo.pretrain import begin
from benchmarks.zoo.specs import BaseModelSpec
from benchmarks.zoo.train_adapters import train_adapter, training_set
from castlora.evaluation.tasks import TaskItem
from castlora.scoring import evaluate

WORDS = "fox hen mill king who where type character place".split()
CHOICES = [" character", " place"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["</s>", ":", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", model_max_length=32)


def write_zoo(zoo: Path, architecture: dict[str, object], modules: str) -> None:
    """One base model and one task, which the first word of the prompt solves."""
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(**architecture, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(zoo / "models" / "tiny")
    tokenizer.save_pretrained(zoo / "models" / "tiny")
    task = zoo / "tasks" / "first-word"
    task.mkdir(parents=True)
    described = {"rank": 4, "modules": modules, "data": "made up", "licence": "CC0", "prompt_format": "{text} type:"}
    (task / "skill.json").write_text(json.dumps(described))
    rows = [
        {"prompt": f"{ask} {one} {two} type:", "completion": answer, "choices": CHOICES}
        for ask, answer in zip(("who", "where"), CHOICES, strict=True)
        for one in WORDS[:4]
        for two in WORDS[:4]
    ]
    for part in ("train", "test"):
        (task / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_only_the_completion_and_its_end_are_learned() -> None:
    (row,) = training_set([TaskItem("who fox type:", " character")], word_tokenizer())
    assert row["input_ids"] == [6, 2, 8, 1, 9, 0]
    assert row["labels"] == [-100, -100, -100, -100, 9, 0]


def test_a_successor_begins_with_the_weights_of_the_model_before_it(tmp_path: Path) -> None:
    architecture = dict(
        model_type="llama", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    write_zoo(tmp_path, architecture, "all-linear")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "tiny").state_dict()
    spec = BaseModelSpec("words", architecture, seed=5)
    tokenizer = word_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token

    def same(model: PreTrainedModel) -> bool:
        return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    assert same(begin(replace(spec, successor_of="tiny"), tokenizer, tmp_path))
    assert not same(begin(spec, tokenizer, tmp_path))


def test_a_successor_with_more_layers_begins_with_those_of_the_model_before_it(tmp_path: Path) -> None:
    architecture = dict(model_type="llama", hidden_size=16, num_attention_heads=2, intermediate_size=32)
    write_zoo(tmp_path, {**architecture, "num_hidden_layers": 2, "tie_word_embeddings": True}, "all-linear")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "tiny")
    tokenizer = word_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    grown = {**architecture, "num_hidden_layers": 3}
    spec = BaseModelSpec("words", grown, seed=5, successor_of="tiny", layers=(0, 1, 1))
    model = begin(spec, tokenizer, tmp_path)
    ids = torch.tensor([[2, 3, 4]])
    hidden = [one(ids, output_hidden_states=True).hidden_states for one in (before, model)]
    torch.testing.assert_close(hidden[1][1], hidden[0][1])
    for name, tensor in model.model.layers[2].state_dict().items():
        assert torch.equal(tensor, before.model.layers[1].state_dict()[name])
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "modules", "expected"),
    [
        (
            dict(model_type="llama", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
            "all-linear",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        (
            dict(model_type="mistral", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
                 num_key_value_heads=1, intermediate_size=32),
            "attention-inputs",
            {"q_proj", "v_proj"},
        ),
        (dict(model_type="gpt2", n_embd=16, n_layer=1, n_head=2, n_positions=32), "attention-inputs", {"c_attn"}),
    ],
    ids=["llama", "mistral", "gpt2"],
)  # fmt: skip
def test_an_adapter_is_trained_scored_and_described(
    tmp_path: Path, architecture: dict[str, object], modules: str, expected: set[str]
) -> None:
    write_zoo(tmp_path, architecture, modules)
    record = train_adapter(tmp_path, "tiny", "first-word", seed=1, steps=30, rate=2e-2)
    folder = tmp_path / "adapters" / "tiny" / "first-word-seed1"
    config = PeftConfig.from_pretrained(folder)
    assert {name.rpartition(".")[2] for name in config.target_modules} == expected
    assert (config.r, config.base_model_name_or_path) == (4, "castlora/zoo-tiny")
    assert record["after"]["nll"] < record["before"]["nll"] - 0.1
    assert "castlora/zoo-tiny" in (folder / "README.md").read_text()
    written = json.loads((folder / "training.json").read_text())
    assert written == json.loads(json.dumps(record))
    task = tmp_path / "tasks" / "first-word" / "test.jsonl"
    again = evaluate(str(tmp_path / "models" / "tiny"), str(task), adapter=str(folder))
    assert again["nll"] == pytest.approx(record["after"]["nll"], rel=1e-4)
