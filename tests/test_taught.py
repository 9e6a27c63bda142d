"""Prompts answered once, for any number of targets."""

import json
from pathlib import Path

import pytest
import tiny

from castlora import UserError, teach, transfer
from castlora.cli import main
from castlora.config import Tuning
from castlora.publishing.manifest import MANIFEST_FILE
from castlora.teaching.taught import read_taught, write_taught
from castlora.text.passages import Passage

TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant]"


@pytest.fixture
def places(base_model, adapter, tmp_path) -> dict[str, str]:
    return {"adapter": str(adapter("llama")), "source": str(base_model("llama"))}


def run(places, base_model, tmp_path, out: str, **options) -> bytes:
    result = transfer(
        **places,
        target=str(base_model("mistral")),
        out=str(tmp_path / out),
        steps=3,
        batch_size=4,
        tuning=tiny.SHORT,
        **options,
    )
    return (result.folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "known", [{"prompt_format": "Who? {text} Answer:"}, {"prompts": True}], ids=["format", "prompts"]
)
def test_taught_text_gives_the_bytes_of_a_transfer_that_teaches_by_itself(
    places, base_model, text_file, prompts_file, tmp_path, known, checked_in_process, monkeypatch
):
    text = {"prompts": str(prompts_file)} if "prompts" in known else {"text": str(text_file), **known}
    taught = teach(**places, **text, out=str(tmp_path / "taught.jsonl"), tuning=tiny.SHORT)
    lines = [json.loads(line) for line in taught.read_text().splitlines()]
    keys = {"prompt", "answer", "adapter_sha256"} | (set() if "prompts" in known else {"general"})
    assert all(line.keys() == keys and line["prompt"].endswith("Answer:") for line in lines)
    by_itself = run(places, base_model, tmp_path, "by-itself", **text)
    monkeypatch.setattr("castlora.teaching.curriculum.write_answers", None)
    assert run(places, base_model, tmp_path, "taught", taught=str(taught)) == by_itself
    by_hand = tmp_path / "by-hand.jsonl"
    by_hand.write_text(
        "".join(json.dumps({name: line[name] for name in ("prompt", "answer")}) + "\n" for line in lines)
    )
    assert run(places, base_model, tmp_path, "by hand", taught=str(by_hand)) == by_itself


def test_the_answers_of_another_adapter_are_refused(places, base_model, adapter, prompts_file, tmp_path):
    taught = teach(**places, prompts=str(prompts_file), out=str(tmp_path / "taught.jsonl"), tuning=tiny.SHORT)
    other = places | {"adapter": str(adapter("llama", ("q_proj",)))}
    with pytest.raises(UserError, match="holds the answers of another adapter; give its file, or teach anew"):
        run(other, base_model, tmp_path, "out", taught=str(taught))
    assert not (tmp_path / "out").exists()


def test_the_manifest_and_the_card_name_the_file(places, base_model, text_file, tmp_path, checked_in_process):
    teach(**places, text=str(text_file), prompt_format="{text}:", out=str(tmp_path / "taught.jsonl"), tuning=tiny.SHORT)
    run(places, base_model, tmp_path, "out", taught=str(tmp_path / "taught.jsonl"))
    manifest = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())
    assert (manifest["text"]["regime"], manifest["text"]["taught"]) == ("taught text", "taught.jsonl")
    assert "--taught taught.jsonl" in manifest["command"]
    assert "taught.jsonl" in (tmp_path / "out" / "README.md").read_text()


def test_chats_keep_their_messages_so_that_each_target_is_asked_in_its_own_template(base_model, tmp_path):
    source, target = tiny.tokenizer_of(base_model("llama")), tiny.tokenizer_of(base_model("mistral"))
    source.chat_template, target.chat_template = TEMPLATE, TEMPLATE.replace("assistant", "bot")
    messages = [{"role": "user", "content": "Who?"}]
    prompt = "[user] Who?\n[assistant]"
    answered = Passage(prompt + " The fox.", len(prompt), "anything", json.dumps(messages), is_general=True)
    write_taught(tmp_path / "taught.jsonl", [answered] * 2, "0123")
    assert json.loads((tmp_path / "taught.jsonl").read_text().split("\n")[0]) == {
        "messages": messages,
        "answer": " The fox.",
        "general": True,
        "adapter_sha256": "0123",
    }
    read = read_taught(str(tmp_path / "taught.jsonl"), 9, source, target)
    assert [passage.text for passage in read] == [prompt + " The fox."] * 2
    assert read[0].target_text == "[user] Who?\n[bot] The fox."
    assert read[0].answer_start == len(prompt)
    assert read[0].is_general


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "is not a file; give the one that castlora teach wrote"),
        ("", "holds 0 lines, at least 2 are needed"),
        ('{"prompt": "a"}\n' * 2, "line 1 has no text field 'answer'"),
        ('{"answer": "a"}\n' * 2, "line 1 has no text field 'prompt'"),
        ("[]\n" * 2, "line 1 has no text field 'answer'"),
        ("{\n" * 2, "line 1 is not JSON"),
        ('{"messages": 3, "answer": "a"}\n' * 2, "line 1 has neither 'messages'"),
        (
            '{"messages": [{"role": "user", "content": "a"}], "answer": "b"}\n{"prompt": "a", "answer": "b"}',
            "has lines with 'messages' and lines with 'prompt'",
        ),
    ],
)
def test_a_file_that_is_no_taught_text_is_refused_before_anything_is_written(
    places, base_model, tmp_path, capsys, content, complaint
):
    path = tmp_path / "taught.jsonl"
    if content is not None:
        path.write_text(content)
    options = {**places, "target": str(base_model("mistral")), "taught": str(path), "out": str(tmp_path / "out")}
    options |= {"tuning.max-length": "88"}
    with pytest.raises(SystemExit) as stopped:
        main(["transfer", *(word for name, value in options.items() for word in (f"--{name}", value))])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_taught_text_stands_alone(places, base_model, tmp_path):
    path = tmp_path / "taught.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' * 2)
    with pytest.raises(UserError, match="give no other text, format or --chat with it"):
        run(places, base_model, tmp_path, "out", taught=str(path), prompt_format="{text}:")


@pytest.mark.parametrize(
    ("out", "options", "complaint"),
    [
        ("taken.jsonl", {}, "taken.jsonl' exists; give a new file"),
        ("nowhere/taught.jsonl", {}, "lies in no folder that exists"),
        ("taught.jsonl", {"tuning": Tuning(write_answers=False)}, "write_answers is false, so that there is nothing"),
        ("taught.jsonl", {"prompt_format": "no slot"}, r"has no \{text\} slot"),
        ("taught.jsonl", {"source": ""}, "names no base model"),
        ("taught.jsonl", {"seed": -1}, "seed is -1; give a whole number from 0"),
    ],
)
def test_what_cannot_be_taught_is_refused_and_nothing_is_written(
    places, text_file, base_model, tmp_path, out, options, complaint
):
    (tmp_path / "taken.jsonl").write_text("mine")
    if options.get("source") == "":
        tiny.save_adapter(tmp_path / "nameless", base_model("llama"), ("q_proj",))
        path = tmp_path / "nameless" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
        options = {"adapter": str(tmp_path / "nameless"), "source": None}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=complaint):
        teach(**{**places, "text": str(text_file), "out": str(tmp_path / out), **options})
    assert sorted(tmp_path.iterdir()) == before
    assert Path(tmp_path / "taken.jsonl").read_text() == "mine"


def test_the_command_line_teaches(places, text_file, tmp_path):
    words = {**places, "text": str(text_file), "prompt-format": "Who?\\n{text}:", "out": str(tmp_path / "t.jsonl")}
    numbers = {"tuning.filled-passages": 8, "tuning.candidates": 1, "tuning.answer-tokens": 4, "tuning.max-length": 88}
    main(["teach", *(word for name, value in (words | numbers).items() for word in (f"--{name}", str(value)))])
    first = json.loads((tmp_path / "t.jsonl").read_text().split("\n")[0])
    assert first["prompt"].startswith("Who?\n") and first["prompt"].endswith(":")
