import json
from pathlib import Path

import pytest

from castlora.errors import UserError
from castlora.evaluation.tasks import TaskItem, load_task

GOOD = {"prompt": "Two and two?", "completion": " four", "choices": [" three", " four"]}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_reads_items_and_skips_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "task.jsonl", GOOD, "", {**GOOD, "id": 7})
    assert load_task(path) == [TaskItem("Two and two?", " four", (" three", " four"))] * 2


def test_only_line_ends_separate_items(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    item = {"prompt": "Two\u2028and\x85two?", "completion": " four"}
    path.write_text((json.dumps(item, ensure_ascii=False) + "\r\n") * 2, encoding="utf-8", newline="")
    assert load_task(path) == [TaskItem("Two\u2028and\x85two?", " four")] * 2


def test_choices_are_optional(tmp_path: Path) -> None:
    path = write(tmp_path / "task.jsonl", {"prompt": "Two and two?", "completion": " four"})
    assert load_task(path) == [TaskItem("Two and two?", " four")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ('["prompt"]', "not a JSON object"),
        ({"completion": " four"}, "`prompt` is missing"),
        ({"prompt": "Two and two?"}, "`completion` is missing"),
        ({**GOOD, "prompt": 4}, "`prompt` must be a text"),
        ({**GOOD, "completion": " "}, "`completion` must be a text"),
        ({**GOOD, "choices": []}, "`choices` must be a list"),
        ({**GOOD, "choices": " four"}, "`choices` must be a list"),
        ({**GOOD, "choices": [" four", 4]}, "`choices` must be a list"),
        ({**GOOD, "choices": [" four", " three", " four"]}, "the same text twice"),
        ({**GOOD, "choices": ["four", " three"]}, "must contain the `completion`"),
        ({"prompt": "Two and two?", "completion": " four"}, "on every line or on none"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "task.jsonl", GOOD, row)
    with pytest.raises(UserError, match=message) as caught:
        load_task(path)
    assert "task.jsonl, line 2" in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"task\.jsonl: the task file is empty"):
        load_task(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.jsonl: cannot read"):
        load_task(tmp_path / "task.jsonl")


def test_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_task(path)
