import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from castlora.errors import UserError
from castlora.evaluation.accuracy import evaluate_model
from castlora.evaluation.tasks import TaskItem
from castlora.models import completions
from castlora.models.completions import encode_completion, text_loss
from castlora.scoring import evaluate

ITEMS = [
    TaskItem("Question: Who stole the ring?\nType:", " character"),
    TaskItem("Question: Where did the old fox and the hen of the miller live in the evening?\nType:", " setting"),
    TaskItem("How did the Käfer feel?\nType:", " feeling"),
    TaskItem("Who?", " the fox"),
    TaskItem("Where is the golden ring of the king?\nType:", " setting"),
]
CHOICES = (" character", " setting", " feeling", " the fox")
CHOICE_ITEMS = [TaskItem(item.prompt, item.completion, CHOICES) for item in ITEMS]


WORDS = ["Question", "Who", "Where", "the", "fox", "of", "ring", "character", "setting", "feeling", "Type", "ab"]


def bpe(specials: list[str], alphabet: list[str], space: str, **options: object) -> Tokenizer:
    """Byte-pair encoding whose merges spell the words above from left to right."""
    words = [space + word for word in WORDS]
    merges = dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word)))
    pieces = dict.fromkeys([*specials, *alphabet, *(left + right for left, right in merges)])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), **options))
    tokenizer.add_special_tokens(specials)
    return tokenizer


def sentencepiece_type(closing: str = "") -> PreTrainedTokenizerFast:
    """Dummy prefix, byte fallback, and a begin-of-text token on every text."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *string.ascii_letters, *string.punctuation]
    tokenizer = bpe(["<unk>", "<s>", "</s>"], alphabet, "▁", unk_token="<unk>", byte_fallback=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {closing}".strip(), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    """The GPT-2 form: no special token on a text."""
    tokenizer = bpe(["<|end|>"], sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


TOKENIZERS = {"sentencepiece": sentencepiece_type(), "byte-level": byte_level()}
either_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def tiny_model(tokenizer: PreTrainedTokenizerFast, kind: str = "llama", max_length: int = 96) -> PreTrainedModel:
    torch.manual_seed(0)
    shapes = {
        "llama": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48),
        "gpt2": dict(n_embd=32, n_layer=2, n_head=2),
    }
    positions = {"llama": "max_position_embeddings", "gpt2": "n_positions"}
    tokens = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        initializer_range=0.3,
        **shapes[kind],
        **{positions[kind]: max_length},
        **tokens,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def teach(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: list[TaskItem], ending: list[int]) -> None:
    """Trains until the model knows the completions, each followed by `ending`, by heart."""
    rows = [encode_completion(tokenizer, item.prompt, item.completion, 96) for item in items]
    width = max(len(row.ids) for row in rows) + len(ending)
    ids = torch.full((len(rows), width), tokenizer.eos_token_id)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        full = torch.tensor(row.ids + ending)
        ids[i, : len(full)] = full
        labels[i, row.start : len(full)] = full[row.start :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()


def reference_log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str
) -> float:
    """One text at a time, without padding; right where the completion begins with a token of its own."""
    ids = tokenizer(prompt + completion)["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(log_probs[i - 1, ids[i]] for i in range(start, len(ids))))


@either_tokenizer
@pytest.mark.parametrize("item", ITEMS)
def test_the_completion_begins_where_the_prompt_ends(tokenizer: PreTrainedTokenizerFast, item: TaskItem) -> None:
    tokens = encode_completion(tokenizer, item.prompt, item.completion, 96)
    assert tokens.ids == tokenizer(item.prompt + item.completion)["input_ids"]
    assert tokenizer.decode(tokens.ids[: tokens.start], skip_special_tokens=True) == item.prompt
    assert tokenizer.decode(tokens.ids[tokens.start :]).strip() == item.completion.strip()


@either_tokenizer
@settings(max_examples=60, deadline=None)
@given(prompt=st.text("ab é日\n", min_size=1), completion=st.text("ab é日\n", min_size=1))
def test_the_completion_holds_the_first_token_past_the_prompt(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str
) -> None:
    tokens = encode_completion(tokenizer, prompt, completion, 1000)
    before = tokenizer.decode(tokens.ids[: tokens.start], skip_special_tokens=True)
    up_to_first = tokenizer.decode(tokens.ids[: tokens.start + 1], skip_special_tokens=True)
    assert len(before) <= len(prompt)
    assert tokens.start >= 1
    assert up_to_first.endswith("�") or len(up_to_first) > len(prompt) or prompt[:1] == " "


def test_a_token_across_the_border_belongs_to_the_completion() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    (whole,) = tokenizer(" the")["input_ids"]
    tokens = encode_completion(tokenizer, " th", "e", 96)
    assert tokens.ids == [tokenizer.bos_token_id, whole]
    assert tokens.start == 1


@either_tokenizer
def test_a_long_prompt_loses_its_left_end_only(tokenizer: PreTrainedTokenizerFast) -> None:
    full = encode_completion(tokenizer, ITEMS[1].prompt, ITEMS[1].completion, 96)
    cut = encode_completion(tokenizer, ITEMS[1].prompt, ITEMS[1].completion, 12)
    specials = sum(token == tokenizer.bos_token_id for token in full.ids)
    assert len(cut.ids) == 12
    assert cut.ids[:specials] == full.ids[:specials]
    assert cut.ids[specials:] == full.ids[specials - 12 :]
    assert cut.ids[cut.start :] == full.ids[full.start :]


@either_tokenizer
def test_a_completion_without_room_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    length = len(encode_completion(tokenizer, "Who?", " the fox and the hen", 96).ids)
    for max_length in range(1, length):
        try:
            tokens = encode_completion(tokenizer, "Who?", " the fox and the hen", max_length)
        except UserError as error:
            assert "longer than" in str(error)
        else:
            assert tokens.start >= 1
            assert tokenizer.decode(tokens.ids[tokens.start :]).strip() == "the fox and the hen"
    with pytest.raises(UserError, match="longer than the 3 tokens"):
        encode_completion(tokenizer, "Who?", " the fox and the hen", 3)


@either_tokenizer
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_padding_and_batches_do_not_change_a_score(
    tokenizer: PreTrainedTokenizerFast, kind: str, batch_size: int
) -> None:
    model = tiny_model(tokenizer, kind)
    result = evaluate_model(model, tokenizer, CHOICE_ITEMS, batch_size)
    expected = np.array(
        [[reference_log_likelihood(model, tokenizer, item.prompt, choice) for choice in CHOICES] for item in ITEMS]
    )
    right = [CHOICES.index(item.completion) for item in ITEMS]
    np.testing.assert_allclose(result.nlls, -expected[range(len(ITEMS)), right], rtol=1e-4)
    assert result.predictions == [CHOICES[i] for i in expected.argmax(axis=1)]
    assert result.scores.tolist() == (expected.argmax(axis=1) == right).astype(float).tolist()
    assert result.nll == pytest.approx(result.nlls.mean())
    assert (result.metric, result.n, result.score) == ("accuracy", len(ITEMS), result.scores.mean())


def test_an_end_of_text_token_that_the_tokenizer_appends_does_not_count() -> None:
    plain, closing = sentencepiece_type(), sentencepiece_type(closing="</s>")
    assert closing("Who?")["input_ids"] == [*plain("Who?")["input_ids"], closing.eos_token_id]
    model = tiny_model(plain)
    with_choices = [evaluate_model(model, tokenizer, CHOICE_ITEMS) for tokenizer in (plain, closing)]
    without = [evaluate_model(model, tokenizer, ITEMS) for tokenizer in (plain, closing)]
    np.testing.assert_array_equal(with_choices[0].nlls, with_choices[1].nlls)
    np.testing.assert_array_equal(with_choices[0].nlls, without[1].nlls)
    assert without[0].predictions == without[1].predictions


@either_tokenizer
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_is_scored_by_exact_match(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    model = tiny_model(tokenizer, kind)
    before = evaluate_model(model, tokenizer, ITEMS)
    teach(model, tokenizer, ITEMS, ending=[tokenizer.eos_token_id])
    wrong_last = [*ITEMS[:-1], TaskItem(ITEMS[-1].prompt, " feeling")]
    after = evaluate_model(model, tokenizer, wrong_last, batch_size=3)
    assert before.score == 0
    assert after.metric == "exact_match"
    assert after.predictions == [item.completion.strip() for item in ITEMS]
    assert after.scores.tolist() == [1, 1, 1, 1, 0]
    assert after.nlls[:4].max() < 0.5 < before.nlls.min()


def test_generation_ends_at_a_newline_unless_one_is_expected() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    model = tiny_model(tokenizer)
    taught = [TaskItem("Who?", " the fox\nType"), TaskItem("Where is the ring?", " the hen\nType")]
    teach(model, tokenizer, taught, ending=[tokenizer.eos_token_id])
    items = [TaskItem("Who?", " the fox"), taught[1]]
    result = evaluate_model(model, tokenizer, items)
    assert result.predictions == ["the fox", "the hen\nType"]
    assert result.score == 1


def test_a_long_prompt_is_cut_to_leave_room_for_the_answer() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    model = tiny_model(tokenizer, "gpt2", max_length=24)
    result = evaluate_model(model, tokenizer, [TaskItem(ITEMS[0].prompt * 5, " the fox"), ITEMS[3]])
    assert result.n == 2


@pytest.mark.parametrize(("seconds", "shown"), [(0, True), (3600, False)])
def test_what_takes_long_shows_its_progress(monkeypatch, capsys, seconds: int, shown: bool) -> None:
    monkeypatch.setattr(completions, "_SECONDS_WITHOUT_PROGRESS", seconds)
    tokenizer = TOKENIZERS["byte-level"]
    evaluate_model(tiny_model(tokenizer), tokenizer, ITEMS, batch_size=2)
    said = capsys.readouterr().err
    for bar in ("scores completions", "writes answers"):
        assert (f"{bar}: " in said) == shown
    evaluate_model(tiny_model(tokenizer), tokenizer, ITEMS[:1])
    assert not capsys.readouterr().err


def test_the_training_mode_is_restored() -> None:
    model = tiny_model(TOKENIZERS["byte-level"]).train()
    evaluate_model(model, TOKENIZERS["byte-level"], CHOICE_ITEMS)
    assert model.training


def test_log_likelihoods_that_are_not_finite_are_refused() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    model = tiny_model(tokenizer)
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        evaluate_model(model, tokenizer, CHOICE_ITEMS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A base model, an adapter that changes it, and a task file."""
    tokenizer = TOKENIZERS["byte-level"]
    model = tiny_model(tokenizer)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    lines = [json.dumps({"prompt": i.prompt, "completion": i.completion, "choices": i.choices}) for i in CHOICE_ITEMS]
    (tmp_path / "task.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_evaluate_writes_what_was_scored(saved: Path) -> None:
    out = saved / "results" / "scores.json"
    record = evaluate(str(saved / "base"), str(saved / "task.jsonl"), str(saved / "adapter"), str(out))
    written = json.loads(out.read_text())
    items = written.pop("items")
    assert written == record
    assert (record["model"], record["adapter"], record["task"]) == ("base", "adapter", "task.jsonl")
    assert [set(item) for item in items] == [{"score", "nll", "prediction"}] * len(ITEMS)
    assert record["score"] == pytest.approx(np.mean([item["score"] for item in items]))
    assert str(saved) not in out.read_text()


def test_an_adapter_changes_the_score(saved: Path) -> None:
    bare = evaluate(str(saved / "base"), str(saved / "task.jsonl"))
    adapted = evaluate(str(saved / "base"), str(saved / "task.jsonl"), adapter=str(saved / "adapter"))
    assert bare["adapter"] is None
    assert bare["nll"] != adapted["nll"]
    assert bare["task_sha256"] == adapted["task_sha256"]


def test_a_folder_without_an_adapter_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        evaluate(str(saved / "base"), str(saved / "task.jsonl"), adapter=str(saved / "base"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"megatron_config": {"any": 1}, "megatron_core": "hostile_module"}, "megatron_config is set"),
        ({"peft_type": "LORA2"}, "its configuration is not one of PEFT"),
        ({"rank_pattern": 7}, "cannot be loaded as an adapter of"),
    ],
)
def test_a_hostile_configuration_is_refused(saved: Path, monkeypatch, changes, complaint) -> None:
    (saved / "hostile_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(saved)
    path = saved / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=complaint):
        evaluate(str(saved / "base"), str(saved / "task.jsonl"), adapter=str(saved / "adapter"))


def test_a_pickled_adapter_is_not_opened(saved: Path) -> None:
    (saved / "adapter" / "adapter_model.safetensors").rename(saved / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"pickled adapter_model\.bin; make a safe copy"):
        evaluate(str(saved / "base"), str(saved / "task.jsonl"), adapter=str(saved / "adapter"))


def test_an_adapter_of_another_model_is_refused(saved: Path) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    other = tiny_model(tokenizer, "gpt2")
    other.save_pretrained(saved / "other")
    tokenizer.save_pretrained(saved / "other")
    with pytest.raises(UserError, match=r"cannot be loaded as an adapter of .*other"):
        evaluate(str(saved / "other"), str(saved / "task.jsonl"), adapter=str(saved / "adapter"))


@either_tokenizer
def test_the_loss_on_text_is_the_mean_over_its_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(tokenizer)
    texts = ["Who stole the ring of the fox? the character", "the setting"]
    losses, counts = [], []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
        counts.append(ids.shape[1] - 1)
    expected = np.average(losses, weights=counts)
    assert text_loss(model, tokenizer, texts) == pytest.approx(expected, rel=1e-5)
    assert text_loss(model, tokenizer, texts, max_length=2) != pytest.approx(expected, rel=1e-3)
