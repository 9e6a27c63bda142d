"""Adapters that were trained with another tokenizer than their base model's: a template, another end, more tokens."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from castlora import UserError, convert, evaluate, inspect, transfer
from castlora.adapters.vocabulary import tokenizer_of, with_vocabulary_of
from castlora.model_pair import load_models
from castlora.models.loading import load_config
from castlora.plan import plan_transfer

TEMPLATE = "{% for message in messages %}Who? {{ message.content }}{% endfor %}"
TURN, END = "<|turn|>", "<|end|>"


@pytest.fixture(params=[["embed_tokens", "lm_head"], None], ids=["trained", "saved"])
def extended_adapter(base_model, tmp_path, request) -> Path:
    """An adapter with two tokens more than its base model, one of which ends its answers; PEFT saves their rows."""
    base, folder = base_model("llama"), tmp_path / "adapter"
    model, tokenizer = tiny.load(base), tiny.tokenizer_of(base)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN, END], "eos_token": END})
    tokenizer.chat_template = TURN + TEMPLATE
    model.resize_token_embeddings(len(tokenizer))
    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": request.param}
    adapted = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if any(part in name for part in ("lora_B", "lm_head", "embed_tokens")):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def resized(base: Path, adapter: Path) -> PeftModel:
    """The adapter as PEFT loads it onto its base model with the tokens added."""
    model = tiny.load(base)
    model.resize_token_embeddings(len(tiny.tokenizer_of(adapter)))
    return PeftModel.from_pretrained(model, adapter).eval()


def test_source_and_adapter_predict_what_they_did_in_training(extended_adapter, base_model):
    models = load_models(plan_transfer(str(extended_adapter), str(base_model("gpt2")), None))
    tokenizer = models.source_tokenizer
    ids = tokenizer(f"{TURN}a b c{END}", return_tensors="pt")["input_ids"]
    assert {tokenizer.convert_tokens_to_ids(token) for token in (TURN, END)} <= set(ids[0].tolist())
    expected = resized(base_model("llama"), extended_adapter)(input_ids=ids).logits
    torch.testing.assert_close(models.teacher(input_ids=ids).logits, expected)
    assert models.shared.source_ends == (tokenizer.convert_tokens_to_ids(END),)
    end = models.shared.source_classes[models.shared.source_ends[0]]
    assert models.shared.target_classes[models.target_tokenizer.eos_token_id] == end


def test_a_conversation_is_moved_in_the_template_of_the_adapter(
    extended_adapter, base_model, prompts_file, tmp_path, checked_in_process, caplog
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": line}) for line in prompts_file.read_text().splitlines()))
    with caplog.at_level("INFO", logger="castlora"):
        result = transfer(
            str(extended_adapter), str(base_model("gpt2")), str(tmp_path / "moved"), prompts=str(prompts), chat=True,
            steps=2, batch_size=4, tuning=tiny.SHORT,
        )  # fmt: skip
    size = len(tiny.tokenizer_of(base_model("llama")))
    assert f"The adapter was trained with {size + 2} tokens, its base model has {size}" in caplog.text
    assert (result.folder / "chat_template.jinja").read_text() == TURN + TEMPLATE
    samples = json.loads((result.folder / "report.json").read_text())["samples"]
    assert samples and all(sample["prompt"].startswith(f"{TURN}Who? ") for sample in samples)


def test_a_score_is_of_the_adapter_with_its_own_tokenizer(extended_adapter, base_model, tmp_path):
    task = tmp_path / "task.jsonl"
    items = [{"prompt": f"a {word}", "completion": " b", "choices": [" b", " c d"]} for word in ("b", "c", "d")]
    task.write_text("\n".join(map(json.dumps, items)))
    base = str(base_model("llama"))
    tokenizer = tiny.tokenizer_of(extended_adapter)
    model = resized(base_model("llama"), extended_adapter)
    nlls = []
    for item in items:
        prompt = tokenizer(f"{TURN}Who? {item['prompt']}", add_special_tokens=False)["input_ids"]
        whole = tokenizer(f"{TURN}Who? {item['prompt']}{item['completion']}", add_special_tokens=False)["input_ids"]
        log_probabilities = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        answer = range(len(prompt), len(whole))
        nlls.append(-sum(float(log_probabilities[place - 1, whole[place]]) for place in answer))
    adapter = str(extended_adapter)
    assert evaluate(base, str(task), adapter, chat=True)["nll"] == pytest.approx(sum(nlls) / 3, abs=1e-4)
    compared = evaluate(base, str(task), adapter, chat=True, retrained=adapter)["scores"]
    assert compared["retrained"]["nll"] == pytest.approx(sum(nlls) / 3, abs=1e-4)


def test_inspect_counts_the_tokens_of_the_adapter(extended_adapter, base_model):
    found = inspect(str(extended_adapter), str(base_model("llama")))
    assert not found.record["tokenizers"]["same"]
    (extended_adapter / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"Tokenizer of '.*adapter' cannot be read"):
        inspect(str(extended_adapter), str(base_model("llama")))


@pytest.mark.parametrize("missing", ["tokenizer.json", "tokenizer_config.json"])
def test_more_tokens_than_the_base_model_has_need_a_tokenizer(missing, extended_adapter, base_model):
    (extended_adapter / missing).unlink()
    with pytest.raises(UserError, match="or put the tokenizer it was trained with into its folder"):
        plan_transfer(str(extended_adapter), str(base_model("gpt2")), None)


def test_an_adapter_without_tokenizer_is_asked_in_the_template_beside_it(base_model, tmp_path):
    base, config = tiny.tokenizer_of(base_model("llama")), load_config(str(base_model("llama")))
    assert tokenizer_of(tmp_path, base, config).chat_template is None
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert tokenizer_of(tmp_path, base, config).chat_template == TEMPLATE
    assert base.chat_template is None
    base.chat_template = "its own"
    assert tokenizer_of(tmp_path, base, config).chat_template == "its own"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    base.chat_template = None
    with pytest.raises(UserError, match=r"chat_template.jinja' cannot be read \(.*\); copy it again"):
        tokenizer_of(tmp_path, base, config)


def test_a_tokenizer_without_template_is_asked_in_that_of_the_base_model(base_model, tmp_path):
    tiny.tokenizer_of(base_model("llama")).save_pretrained(tmp_path)
    base = tiny.tokenizer_of(base_model("llama"))
    base.chat_template = TEMPLATE
    assert tokenizer_of(tmp_path, base, load_config(str(base_model("llama")))).chat_template == TEMPLATE


def test_a_template_that_writes_tokens_without_an_embedding_is_refused(base_model, adapter, tmp_path):
    base = base_model("llama")
    folder = Path(shutil.copytree(adapter("llama", ("q_proj",)), tmp_path / "adapter"))
    tokenizer = tiny.tokenizer_of(base)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(folder)
    assert len(load_models(plan_transfer(str(folder), str(base_model("gpt2")), None)).source_tokenizer) == 310
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN]})
    tokenizer.chat_template = TURN + TEMPLATE
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"writes '<\|turn\|>', for which neither the adapter nor its base model has"):
        load_models(plan_transfer(str(folder), str(base_model("gpt2")), None))


@pytest.mark.parametrize("shape", [(), (400,), (100, 32), (0, 32)])
def test_rows_that_extend_no_vocabulary_are_those_of_another_base_model(shape, base_model, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter("llama", ("q_proj",)), tmp_path / "adapter"))
    tiny.tokenizer_of(base_model("llama")).save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(shape)}, folder / "adapter_model.safetensors")
    config = load_config(str(base_model("llama")))
    assert with_vocabulary_of(folder, config) is config
    with pytest.raises(UserError, match="does not fit its base model"):
        plan_transfer(str(folder), str(base_model("gpt2")), None)


def test_a_tokenizer_alone_changes_no_number_of_tokens(base_model, adapter, tmp_path):
    config = load_config(str(base_model("llama")))
    folder = Path(shutil.copytree(adapter("llama", ("q_proj",)), tmp_path / "adapter"))
    assert with_vocabulary_of(folder, config) is config
    tiny.tokenizer_of(base_model("gpt2")).save_pretrained(folder)
    assert with_vocabulary_of(folder, config) is config


def test_a_merged_model_has_the_tokens_of_the_adapter(extended_adapter, base_model, tmp_path):
    convert(str(extended_adapter), "merged", str(tmp_path / "merged"))
    tokenizer = tiny.tokenizer_of(tmp_path / "merged")
    assert tokenizer.eos_token == END and tokenizer.chat_template == TURN + TEMPLATE
    ids = tokenizer(f"{TURN}a b c{END}", return_tensors="pt")["input_ids"]
    merged = tiny.load(tmp_path / "merged")(input_ids=ids).logits
    expected = resized(base_model("llama"), extended_adapter)(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_goes_along_where_an_adapter_is_converted(base_model, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter("llama", ("q_proj",)), tmp_path / "adapter"))
    tiny.tokenizer_of(base_model("llama")).save_pretrained(folder)
    convert(str(folder), "peft", str(tmp_path / "converted"))
    assert (tmp_path / "converted" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
