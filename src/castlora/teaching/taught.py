"""Files of taught text: prompts with the answers of source + LoRA, to be read for any number of targets."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from castlora.errors import UserError
from castlora.execution.run_directory import write_whole
from castlora.text.chat import chat_passages, parse_conversation
from castlora.text.passages import Passage, parse_line, read_lines, text_field

_TAUGHT_BY, _VARIANT, _GENERAL = "adapter_sha256", "variant", "general"


def write_taught(path: Path, passages: Iterable[Passage], adapter_sha256: str) -> None:
    """Writes answered prompts as JSON lines: `prompt`, or the `messages` of a chat, `answer`, and who gave it.

    Lines with `variant` have prompts that were made of others, those with `general` prompts made of general text.
    """
    lines = []
    for passage in passages:
        answer = passage.text.encode()[passage.answer_start :].decode()
        if passage.messages is None:
            asked: dict[str, Any] = {"prompt": passage.prompt}
        else:
            asked = {"messages": json.loads(passage.messages)}
        made = {name: True for name, so in ((_VARIANT, passage.is_variant), (_GENERAL, passage.is_general)) if so}
        record = {**asked, "answer": answer, **made, _TAUGHT_BY: adapter_sha256}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def check_taught(path: str) -> None:
    """Raises a UserError if a file of taught text cannot be read."""
    _read_records(path)


def holds_messages(path: str) -> bool:
    """Whether the prompts of a file of taught text are messages, which models read in chat templates."""
    return "messages" in _read_records(path)[0]


def is_of_task(path: str) -> bool:
    """Whether the prompts of a file of taught text are the task's, and not made of general text."""
    return not any(record[_GENERAL] for record in _read_records(path))


def check_teacher(path: str, adapter_sha256: str) -> None:
    """Raises a UserError if a file of taught text says that another adapter gave its answers."""
    lines = enumerate(read_lines(Path(path)), 1)
    if any(parse_line(line, path, number).get(_TAUGHT_BY, adapter_sha256) != adapter_sha256 for number, line in lines):
        raise UserError(f"--taught {path!r} holds the answers of another adapter; give its file, or teach anew.")


def read_taught(
    path: str, count: int, source: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast
) -> list[Passage]:
    """The first `count` answered prompts of a file in its order, so that the last ones are held out.

    Args:
        path: JSON lines with `prompt` or `messages`, and `answer`
        count: most passages
        source: tokenizer of the source model
        target: tokenizer of the target model, which is asked in its own chat template

    Raises:
        UserError: the file cannot be read, a line is malformed, or a chat template refuses a conversation.
    """
    records = _read_records(path)[:count]
    chats = [record for record in records if "messages" in record]
    in_templates = iter(chat_passages([record["messages"] for record in chats], source, target) if chats else ())
    return [
        _answered(next(in_templates) if "messages" in record else _asked(record["prompt"]), record)
        for record in records
    ]


def _asked(prompt: str) -> Passage:
    return Passage(prompt, len(prompt.encode()))


def _answered(passage: Passage, record: dict[str, Any]) -> Passage:
    text = passage.text + record["answer"]
    return replace(passage, text=text, is_variant=record[_VARIANT], is_general=record[_GENERAL])


def _read_records(path: str) -> list[dict[str, Any]]:
    if not Path(path).is_file():
        raise UserError(f"--taught {path!r} is not a file; give the one that castlora teach wrote.")
    records = [_parse(line, path, number) for number, line in enumerate(read_lines(Path(path)), 1)]
    if len({"messages" in record for record in records}) > 1:
        raise UserError(f"--taught {path!r} has lines with 'messages' and lines with 'prompt'; give files of one kind.")
    if len(records) < 2:
        raise UserError(f"--taught {path!r} holds {len(records)} lines, at least 2 are needed; teach more text.")
    return records


def _parse(line: str, path: str, number: int) -> dict[str, Any]:
    answer = text_field(line, path, number, ("answer",))
    record = parse_line(line, path, number)
    known = {"answer": answer, **{name: record.get(name) is True for name in (_VARIANT, _GENERAL)}}
    if "messages" in record:
        return {"messages": parse_conversation(line, path, number), **known}
    return {"prompt": text_field(line, path, number, ("prompt",)), **known}
