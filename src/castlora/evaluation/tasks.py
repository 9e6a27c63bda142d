"""Task files: prompts, their right completions and, for multiple choice, the choices."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from castlora.errors import UserError
from castlora.text.chat import ask, render


@dataclass(frozen=True)
class TaskItem:
    """One question of a task file."""

    prompt: str
    completion: str
    choices: tuple[str, ...] | None = None


def load_task(path: str | Path) -> list[TaskItem]:
    """Reads a task file: JSON lines with `prompt`, `completion` and, on every line or on none, `choices`.

    Raises:
        UserError: the file is missing or empty, or a line is malformed.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read the task file ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the task file is not UTF-8; save it as UTF-8.") from error
    items: list[TaskItem] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        item = _parse_item(line, where=f"{path}, line {number}")
        if items and (item.choices is None) != (items[0].choices is None):
            raise UserError(f"{path}, line {number}: `choices` must be on every line or on none.")
        items.append(item)
    if not items:
        raise UserError(f'{path}: the task file is empty; add lines like {{"prompt": "...", "completion": "..."}}.')
    return items


def _parse_item(line: str, where: str) -> TaskItem:
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deeply nested"
        raise UserError(f"{where}: not JSON ({reason}); write one JSON object per line.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where}: not a JSON object; write one object with `prompt` and `completion` per line.")
    for field in ("prompt", "completion"):
        if field not in fields:
            raise UserError(f"{where}: `{field}` is missing; add it.")
        if not isinstance(fields[field], str) or not fields[field].strip():
            raise UserError(f"{where}: `{field}` must be a text that is not blank.")
    choices = fields.get("choices")
    if choices is None:
        return TaskItem(fields["prompt"], fields["completion"])
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c.strip() for c in choices):
        raise UserError(f"{where}: `choices` must be a list of texts that are not blank.")
    if len(set(choices)) < len(choices):
        raise UserError(f"{where}: `choices` names the same text twice; remove one.")
    if fields["completion"] not in choices:
        raise UserError(f"{where}: `choices` must contain the `completion`, spelt alike down to its spaces.")
    return TaskItem(fields["prompt"], fields["completion"], tuple(choices))


def chat_items(items: Sequence[TaskItem], tokenizer: PreTrainedTokenizerFast, template: str) -> list[TaskItem]:
    """The items of a task with their prompts as messages in a chat template.

    Raises:
        UserError: the template refuses a message.
    """
    return [replace(item, prompt=render(ask(item.prompt), tokenizer, template)) for item in items]
