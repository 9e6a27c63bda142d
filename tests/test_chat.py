"""Prompts that each model reads in its own chat template."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from castlora import UserError, teach, transfer
from castlora.alignment.positions import align_passages
from castlora.alignment.tokens import ByteTokenizer
from castlora.evaluation.tasks import TaskItem, chat_items
from castlora.models.completions import encode_completion
from castlora.models.loading import load_tokenizer
from castlora.scoring import evaluate
from castlora.teaching.curriculum import TextSource
from castlora.text.chat import TEMPLATE_FILE, ask, chat_passages, read_conversations, without_special_tokens
from castlora.text.passages import Passage

SOURCE_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TARGET_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('No system messages.') }}"
    "{% endif %}{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n' }}Answer:{% endif %}"
)
QUESTIONS = [f"Who {verb} the {noun}?" for verb in tiny.VERBS for noun in tiny.NOUNS]


def with_template(folder: Path, template: str | None, copied: Path) -> Path:
    """A copy of a tiny model whose tokenizer has a chat template."""
    shutil.copytree(folder, copied)
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(copied)
    return copied


@pytest.fixture(scope="module")
def chat_models(base_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    return {
        "llama": with_template(base_model("llama"), SOURCE_TEMPLATE, folder / "llama"),
        "gpt2": with_template(base_model("gpt2"), TARGET_TEMPLATE, folder / "gpt2"),
        "mistral": base_model("mistral"),
    }


@pytest.fixture(scope="module")
def tokenizers(chat_models):
    return tiny.tokenizer_of(chat_models["llama"]), tiny.tokenizer_of(chat_models["gpt2"])


@pytest.fixture
def file_of(tmp_path):
    def write(*records, name="prompts.jsonl") -> str:
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(record) for record in records))
        return str(path)

    return write


def test_messages_prompts_and_plain_lines_are_conversations(tmp_path, file_of):
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}
    answer = {"role": "assistant", "content": "The fox."}
    path = file_of({"messages": [system, user, answer]}, {"prompt": "Why?"}, {"messages": [user]}, {"prompt": "Who?"})
    read = read_conversations(path, 10, seed=0)
    assert sorted(read, key=str) == sorted([[system, user], ask("Why?"), ask("Who?")], key=str)
    assert read == read_conversations(path, 10, seed=0)
    assert read_conversations(path, 2, seed=0) == read[:2]
    (tmp_path / "plain.txt").write_text("Who?\n\nWhy?\n")
    assert sorted(read_conversations(str(tmp_path / "plain.txt"), 10, 0), key=str) == [ask("Who?"), ask("Why?")]


@pytest.mark.parametrize(
    "record",
    [
        {"text": "Who?"}, {"messages": "Who?"}, {"messages": [{"role": "user"}]}, ["Who?"], {"prompt": 3},
        {"messages": []}, {"messages": [{"role": "assistant", "content": "The fox."}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    ],
)  # fmt: skip
def test_malformed_conversations_are_named_with_their_line(file_of, record):
    with pytest.raises(UserError, match=r"prompts\.jsonl' line 2 has"):
        read_conversations(file_of({"prompt": "Who?"}, record), 10, seed=0)


def test_messages_without_the_flag_are_pointed_at_it(file_of):
    with pytest.raises(UserError, match="give --chat true"):
        TextSource(prompts=file_of({"messages": ask("Who?")})).check()


def test_each_model_is_asked_in_its_own_template(tokenizers):
    (passage,) = chat_passages([ask("Who?")], *tokenizers)
    assert passage.text == "<s>[user] Who?\n[assistant]"
    assert passage.target_prompt == passage.target_text == "Who?<|endoftext|>\nAnswer:"
    assert passage.answer_start == len(passage.text)


def test_a_target_without_a_template_is_asked_in_the_sources_with_its_own_special_tokens(tokenizers):
    source, target = tokenizers[0], tiny.family("gpt2")[1]
    (passage,) = chat_passages([ask("Who?")], source, target)
    assert passage.target_prompt == "<|endoftext|>[user] Who?\n[assistant]"


def test_a_source_without_a_template_is_refused(tokenizers):
    with pytest.raises(UserError, match="has no chat template"):
        chat_passages([ask("Who?")], tiny.family("llama")[1], tokenizers[1])


def test_what_a_template_refuses_is_said(tokenizers):
    system = [{"role": "system", "content": "Be brief."}, *ask("Who?")]
    with pytest.raises(UserError, match=r"refuses messages of system, user \(No system messages"):
        chat_passages([system], *tokenizers)


def test_a_template_that_reads_parts_of_messages_is_given_parts(tokenizers):
    source = copy.deepcopy(tokenizers[0])
    source.chat_template = (
        "{% for message in messages %}[{{ message.role }}] {% for part in message.content "
        "if part.type == 'text' %}{{ part.text | trim }}{% endfor %}{% endfor %}[assistant]"
    )
    (passage,) = chat_passages([ask(" Who  finds it? ")], source, tokenizers[1])
    assert passage.text == "[user] Who  finds it?[assistant]"


def test_a_template_that_leaves_the_message_out_is_refused(tokenizers):
    source = copy.deepcopy(tokenizers[0])
    source.chat_template = "{% for message in messages if message.role != 'tool' %}{{ message.content }}{% endfor %}"
    assert chat_passages([[*ask("One?"), *ask("Two?")]], source, tokenizers[1])[0].text == "One?Two?"
    with pytest.raises(UserError, match="leaves out the message to answer, of the role 'tool'"):
        chat_passages([[*ask("Who?"), {"role": "tool", "content": "The fox."}]], source, tokenizers[1])


def test_the_template_of_an_older_processor_is_read(base_model, tmp_path):
    folder = shutil.copytree(base_model("mistral"), tmp_path / "model")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": SOURCE_TEMPLATE}))
    assert load_tokenizer(str(folder)).chat_template == SOURCE_TEMPLATE
    with_template(folder, TARGET_TEMPLATE, tmp_path / "newer")
    assert load_tokenizer(str(tmp_path / "newer")).chat_template == TARGET_TEMPLATE
    (folder / "chat_template.json").write_text("[]")
    with pytest.raises(UserError, match=r"chat_template.json of '.*model' cannot be read .*copy it again"):
        load_tokenizer(str(folder))


def test_answers_align_byte_for_byte_and_prompts_not_at_all(tokenizers):
    source, target = (ByteTokenizer.from_tokenizer(tokenizer) for tokenizer in tokenizers)
    answer = " the fox near the old mill é"
    asked = chat_passages([ask(question) for question in QUESTIONS[:3]], *tokenizers)
    passages = [Passage(passage.text + answer, passage.answer_start, passage.target_prompt) for passage in asked]
    aligned = list(align_passages(passages, source, target, 90, context_weight=1.0))
    assert len(aligned) == 3
    for places in aligned:
        assert places.source_ids.count(tokenizers[0].bos_token_id) == 1
        assert places.target_ids.count(tokenizers[1].eos_token_id) == 1
        read = (
            [tokenizers[0].decode(places.source_ids[: position + 1]) for position in places.source_positions],
            [tokenizers[1].decode(places.target_ids[: position + 1]) for position in places.target_positions],
        )
        after_source = [text.partition("[assistant]")[2] for text in read[0]]
        assert after_source == [text.partition("\nAnswer:")[2] for text in read[1]]
        assert after_source[0] == "" and after_source[-1] == answer
        assert read[0][0].endswith("[assistant]") and read[1][0].endswith("\nAnswer:")
        assert places.weights == [1.0] * len(after_source)


@pytest.mark.parametrize("target", ["gpt2", "mistral"])
@pytest.mark.parametrize("given", ["prompts", "text"])
def test_a_transfer_in_chat_templates(
    chat_models, adapter, tmp_path, text_file, file_of, checked_in_process, target, given
):
    prompts = file_of(*({"messages": ask(question)} for question in QUESTIONS))
    result = transfer(
        adapter=str(adapter("llama")), source=str(chat_models["llama"]), target=str(chat_models[target]),
        out=str(tmp_path / "out"), steps=2, batch_size=4, chat=True, task=task_file(file_of),
        tuning=replace(tiny.SHORT, max_length=80, answer_tokens=6),
        **({"prompts": prompts} if given == "prompts" else {"text": str(text_file)}),
    )  # fmt: skip
    assert result.manifest["text"]["chat"] is True
    assert result.manifest["text"]["regime"] == ("unlabelled prompts" if given == "prompts" else "chat template")
    assert "--chat true" in result.manifest["command"]
    assert result.manifest["passages"]["training"] == 24
    beside = result.folder / TEMPLATE_FILE
    assert beside.exists() == (target == "mistral")
    if target == "mistral":
        assert beside.read_text() == SOURCE_TEMPLATE
    (along,) = result.manifest["tasks"]
    teacher = evaluate(str(chat_models["llama"]), task_file(file_of), str(adapter("llama")), chat=True)
    assert along["chat"] is True and along["n"] == 2
    assert along["scores"]["source + LoRA"]["nll"] == pytest.approx(teacher["nll"], rel=1e-4)
    transferred = evaluate(str(chat_models[target]), task_file(file_of), str(result.folder), chat=True)
    assert along["scores"]["transferred"]["nll"] == pytest.approx(transferred["nll"], rel=1e-3)


def test_a_task_is_asked_as_the_taught_messages_are(chat_models, adapter, tmp_path, file_of, checked_in_process):
    places = {"adapter": str(adapter("llama")), "source": str(chat_models["llama"])}
    short = replace(tiny.SHORT, max_length=80, answer_tokens=6)
    prompts = file_of(*({"messages": ask(question)} for question in QUESTIONS))
    taught = teach(**places, prompts=prompts, chat=True, out=str(tmp_path / "taught.jsonl"), tuning=short)
    result = transfer(
        **places, target=str(chat_models["mistral"]), out=str(tmp_path / "out"), taught=str(taught), steps=2,
        batch_size=4, task=task_file(file_of), tuning=short,
    )  # fmt: skip
    (along,) = result.manifest["tasks"]
    teacher = evaluate(places["source"], task_file(file_of), places["adapter"], chat=True)
    assert along["chat"] is True
    assert along["scores"]["source + LoRA"]["nll"] == pytest.approx(teacher["nll"], rel=1e-4)


def task_file(file_of) -> str:
    choices = [" the fox", " the hen"]
    return file_of(
        *({"prompt": question, "completion": choices[0], "choices": choices} for question in QUESTIONS[:2]),
        name="task.jsonl",
    )


def test_a_score_in_a_chat_template_reads_what_the_template_writes(chat_models, file_of):
    model, tokenizer = tiny.load(chat_models["llama"]), tiny.tokenizer_of(chat_models["llama"])
    scored = evaluate(str(chat_models["llama"]), task_file(file_of), chat=True)
    nlls = []
    for question in QUESTIONS[:2]:
        prompt = tokenizer.apply_chat_template(ask(question), add_generation_prompt=True)["input_ids"]
        answer = tokenizer(f"<s>[user] {question}\n[assistant] the fox", add_special_tokens=False)["input_ids"]
        assert answer[: len(prompt)] == prompt
        logits = tiny.logits(model, torch.tensor([answer]))[0].log_softmax(-1)
        nlls.append(-sum(float(logits[place - 1, answer[place]]) for place in range(len(prompt), len(answer))))
    assert scored["nll"] == pytest.approx(sum(nlls) / 2, rel=1e-4)
    assert evaluate(str(chat_models["llama"]), task_file(file_of))["nll"] != pytest.approx(scored["nll"], rel=1e-3)


def test_special_tokens_of_the_template_are_the_only_ones(tokenizers):
    item = TaskItem("Who?", " the fox")
    (asked,) = chat_items([item], tokenizers[0], SOURCE_TEMPLATE)
    ids = encode_completion(without_special_tokens(tokenizers[0]), asked.prompt, asked.completion, 90).ids
    assert ids.count(tokenizers[0].bos_token_id) == 1
    assert tokenizers[0]("Who?")["input_ids"][0] == tokenizers[0].bos_token_id


def test_a_model_without_a_template_cannot_be_scored_in_one(base_model, file_of):
    with pytest.raises(UserError, match="has no chat template"):
        evaluate(str(base_model("gpt2")), task_file(file_of), chat=True)
