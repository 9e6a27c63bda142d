"""Text that a transfer learns from: corpora, prompt formats, prompts and written answers."""

import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError

from castlora.errors import ResumableError, UserError, first_line

HUB_DEFAULT = "allenai/c4"
SLOT = "{text}"
GENERIC_FORMATS = (
    "{text}\n",
    "Q: {text}\nA:",
    "Question: {text}\nAnswer:",
    "Input: {text}\nOutput:",
    "Text: {text}\nLabel:",
    "User: {text}\nAssistant:",
    "### Instruction:\n{text}\n\n### Response:\n",
)
"""Ways in which adapters are commonly asked; where the adapter's own is not known, these stand in for it."""
_HUB_CONFIGS = {"allenai/c4": "en"}
# More is read than is drawn, so that a few long documents do not make up the whole text.
_READ_PER_DRAWN = 4
_SENTENCES_FOR_FORMATS = 50_000
_JOINED_SHARE = 0.5
_TEXT_FIELDS = ("text", "content", "prompt")


@dataclass(frozen=True)
class Passage:
    """A piece of text, and where in it an answer begins."""

    text: str
    answer_start: int = 0
    """Bytes before the answer; 0 for plain text, all of which counts."""
    target_prompt: str | None = None
    """What the target reads before the answer, where chat templates have each model asked in its own words. Both
    prompts then have their special tokens written out."""
    messages: str | None = None
    """The conversation behind the prompt, as JSON, where it comes from one."""
    is_variant: bool = False
    """Whether its prompt was made of one that was given; such a passage is never held out."""
    is_general: bool = False
    """Whether it is general text, or its prompt was made of it, which asks for a part of what the adapter can do."""
    is_cut: bool = False
    """Whether its answer went on to the greatest length without an end."""

    @property
    def prompt(self) -> str:
        """What stands before the answer, as the source reads it."""
        return self.text.encode()[: self.answer_start].decode()

    @property
    def is_chat(self) -> bool:
        """Whether its prompts come from chat templates."""
        return self.target_prompt is not None

    @property
    def target_text(self) -> str:
        """The whole text as the target reads it."""
        if self.target_prompt is None:
            return self.text
        return self.target_prompt + self.text.encode()[self.answer_start :].decode()


def read_documents(path_or_id: str) -> Iterator[str]:
    """Documents of a local file (.txt, .jsonl, either gzipped) or a streamed hub data set.

    A plain text file is one document per blank-line-separated paragraph; a JSON-lines file needs
    a `text` field.

    Raises:
        UserError: the source cannot be read or holds no text.
    """
    if Path(path_or_id).exists():
        documents = _read_file(Path(path_or_id))
    elif _may_be_hub_id(path_or_id):
        documents = _stream_hub(path_or_id)
    else:
        raise UserError(f"--text {path_or_id!r} does not exist; give a .txt or .jsonl file, or a data set id.")
    first = next(documents, None)
    if first is None:
        raise UserError(f"--text {path_or_id!r} holds no text; give a file with at least one paragraph.")
    yield first
    yield from documents


def cut_passages(documents: Iterable[str], count: int, max_bytes: int, seed: int) -> list[Passage]:
    """Up to `count` passages of running text of at most `max_bytes` bytes, in random order."""
    pieces = (piece for document in documents for piece in _pieces(document, max_bytes))
    return [Passage(piece) for piece in _draw(islice(pieces, _READ_PER_DRAWN * count), count, seed)]


def passages_sha256(passages: Iterable[Passage]) -> str:
    """Digest of the text of passages."""
    return hashlib.sha256(json.dumps([passage.text for passage in passages]).encode()).hexdigest()


def draw_fillings(documents: Iterable[str], count: int, seed: int) -> list[str]:
    """Sentences of general text for the slot of a prompt format.

    Half of them are questions, as far as the text has them: general text has few, and many skills are about what is
    asked.

    Args:
        documents: general text
        count: how many, at most all sentences of the text
        seed: of the draw
    """
    sentences = (sentence for document in documents for sentence in _sentences(document))
    read = list(dict.fromkeys(islice(sentences, _READ_PER_DRAWN * count)))
    questions = [sentence for sentence in read if sentence.endswith("?")]
    others = [sentence for sentence in read if not sentence.endswith("?")]
    asked = max(count // 2, count - len(others))
    fillings = _draw(questions, asked, seed)
    fillings += _draw(others, count - len(fillings), seed)
    random.Random(seed).shuffle(fillings)
    return fillings


def join_sentences(sentences: Sequence[str], most: int, seed: int) -> list[str]:
    """Sentences of which half have others in front of them, as a word problem has before its question.

    They come from anywhere in the text: what they say together matters less than that a skill meets long prompts.

    Args:
        sentences: the last sentences of the results, in their order
        most: sentences in a result, at most
        seed: of the draw
    """
    others = [sentence for sentence in sentences if not sentence.endswith("?")]
    if most == 1 or not others:
        return list(sentences)
    chance = random.Random(seed)
    in_front = [chance.choice(range(1, most)) if chance.random() < _JOINED_SHARE else 0 for _ in sentences]
    return [" ".join([*chance.choices(others, k=count), last]) for count, last in zip(in_front, sentences, strict=True)]


def candidate_formats(documents: Iterable[str], count: int) -> list[str]:
    """Prompt formats made of general text, for adapters whose own format is not known.

    Each asks after the text, on a line of its own, by the beginning of a sentence, as `This is`, or by a heading, as
    `Topic:`: those that are frequent in the text, and the generic formats.

    Args:
        documents: general text
        count: formats, at most as many as the text has
    """
    openings, headings = Counter[str](), Counter[str]()
    sentences = (sentence for document in documents for sentence in _sentences(document))
    for sentence in islice(sentences, _SENTENCES_FOR_FORMATS):
        words = sentence.split()
        beginnings = [words[:length] for length in (1, 2) if words[0][0].isupper()]
        openings.update(" ".join(words) for words in beginnings if all(map(_is_word, words)))
        headings.update(word for word in words if word[0].isupper() and word.endswith(":") and _is_word(word[:-1]))
    half = (count - len(GENERIC_FORMATS)) // 2
    endings = [ending for counter in (openings, headings) for ending, _ in counter.most_common(half)]
    return list(dict.fromkeys([*GENERIC_FORMATS, *(f"{SLOT}\n{ending}" for ending in endings)]))


def fill_formats(fillings: Iterable[str], formats: Sequence[str]) -> list[str]:
    """One prompt per filling; the formats take turns."""
    return [form.replace(SLOT, filling) for filling, form in zip(fillings, cycle(formats), strict=False)]


def check_prompt_format(prompt_format: str) -> None:
    """Raises a UserError if the format has no slot."""
    if SLOT not in prompt_format:
        raise UserError(f"--prompt-format has no {SLOT} slot; write for example 'Question: {SLOT}\\nAnswer:'.")


def read_prompts(path: str, count: int, seed: int) -> list[str]:
    """Unlabelled prompts: JSON lines with `prompt`, or one prompt per line of plain text.

    Raises:
        UserError: the file cannot be read or holds no prompt.
    """
    lines, is_json = prompt_lines(path)
    prompts = [text_field(line, path, number, ("prompt",)) if is_json else line for number, line in enumerate(lines, 1)]
    prompts = list(dict.fromkeys(prompt for prompt in prompts if prompt.strip()))
    if not prompts:
        raise UserError(f"--prompts {path!r} holds no prompt; give at least one line.")
    random.Random(seed).shuffle(prompts)
    return prompts[:count]


def prompt_lines(path: str) -> tuple[list[str], bool]:
    """The lines of a file of prompts that are not blank, and whether they are JSON.

    Raises:
        UserError: the file cannot be read or is empty.
    """
    if not Path(path).is_file():
        raise UserError(f"--prompts {path!r} is not a file; give JSON lines with a 'prompt' field, or plain lines.")
    lines = list(read_lines(Path(path)))
    if not lines:
        raise UserError(f"--prompts {path!r} holds no prompt; give at least one line.")
    return lines, any(suffix in {".jsonl", ".json"} for suffix in Path(path).suffixes)


def parse_line(line: str, path: str, number: int) -> Any:
    """The JSON value of a line.

    Raises:
        UserError: it is none.
    """
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deeply nested"
        raise UserError(f"{path!r} line {number} is not JSON ({reason}); write one object per line.") from error


def well_formed(text: str) -> str:
    """A text from JSON without halves of surrogate pairs, which JSON can escape and no tokenizer can read."""
    return text.encode(errors="replace").decode()


def read_lines(path: Path, keep_blank: bool = False) -> Iterator[str]:
    """The lines of a file, gzipped or not.

    Raises:
        UserError: it cannot be read as UTF-8.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                if keep_blank or line.strip():
                    yield line.rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read as UTF-8 text ({first_line(error)}); check the file.") from error


def text_field(line: str, path: str, number: int, names: tuple[str, ...]) -> str:
    """The first of some text fields that a line of JSON has.

    Raises:
        UserError: it has none.
    """
    record = parse_line(line, path, number)
    for name in names:
        if isinstance(record, dict) and isinstance(record.get(name), str):
            return well_formed(record[name])
    if isinstance(record, dict) and "prompt" in names and "messages" in record:
        raise UserError(f"{path!r} line {number} has 'messages' instead of a text 'prompt'; give --chat true.")
    raise UserError(f"{path!r} line {number} has no text field {names[0]!r}; write one object per line with it.")


def _read_file(path: Path) -> Iterator[str]:
    suffixes = path.suffixes
    if ".jsonl" in suffixes or ".json" in suffixes:
        for number, line in enumerate(read_lines(path), 1):
            text = text_field(line, str(path), number, _TEXT_FIELDS)
            if text.strip():
                yield text
        return
    paragraph: list[str] = []
    for line in read_lines(path, keep_blank=True):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


def _may_be_hub_id(name: str) -> bool:
    is_path = name.startswith((".", "/", "~")) or name.endswith((".txt", ".md", ".jsonl", ".gz"))
    return name.count("/") == 1 and not is_path


def _stream_hub(data_set: str) -> Iterator[str]:
    try:
        stream = load_dataset(data_set, _HUB_CONFIGS.get(data_set), split="train", streaming=True)
        # Shards are read in a fixed order, so that the same seed draws the same text again.
        for record in stream:
            yield record["text"]
    except (DatasetNotFoundError, OSError, ValueError, KeyError) as error:
        raise ResumableError(
            f"--text {data_set!r} cannot be streamed from the hub ({type(error).__name__}); "
            "give a local .txt or .jsonl file instead."
        ) from error


def _draw(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """Up to `count` different ones of the texts, in random order."""
    different = list(dict.fromkeys(texts))
    return random.Random(seed).sample(different, min(count, len(different)))


def _pieces(document: str, max_bytes: int) -> Iterator[str]:
    """Consecutive pieces of a document, cut at spaces; a rest under a quarter of the length is dropped."""
    start = 0
    while start < len(document):
        end = min(start + max_bytes, len(document))
        while len(document[start:end].encode()) > max_bytes:
            end -= 1 + (len(document[start:end].encode()) - max_bytes) // 4
        if end < len(document):
            space = document.rfind(" ", start + 1, end)
            end = space if space > start else end
        piece = document[start:end]
        if piece.strip() and len(piece.strip()) >= min(max_bytes // 4, len(document.strip())):
            yield piece.strip()
        start = end


def _is_word(word: str) -> bool:
    return word.replace("'", "").isalpha()


def _sentences(document: str) -> Iterator[str]:
    """Sentences of 4 to 40 words, on one line."""
    for sentence in document.replace("\n", " ").replace("? ", "?\n").replace(". ", ".\n").split("\n"):
        words = sentence.split()
        if 4 <= len(words) <= 40:
            yield " ".join(words)
