"""Prompts as conversations: each model is asked in the words of its own chat template."""

import copy
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from castlora.errors import UserError, first_line
from castlora.text.passages import Passage, parse_line, prompt_lines, well_formed

TEMPLATE_FILE = "chat_template.jinja"
"""Beside an adapter: the chat template to ask its base model in, where that has none of its own."""

Conversation = list[dict[str, str]]
"""Messages with `role` and `content`, the last of them the one to answer."""


def ask(message: str) -> Conversation:
    """A conversation of one message from the user."""
    return [{"role": "user", "content": message}]


def read_conversations(path: str, count: int, seed: int) -> list[Conversation]:
    """Unlabelled prompts of a chat model: JSON lines with `messages` or `prompt`, or a user's message per plain line.

    Answers that the conversations end with are left away.

    Raises:
        UserError: the file cannot be read, holds no prompt, or a line is malformed.
    """
    lines, is_json = prompt_lines(path)
    read = [parse_conversation(line, path, number) if is_json else ask(line) for number, line in enumerate(lines, 1)]
    conversations = list({json.dumps(conversation): conversation for conversation in read}.values())
    random.Random(seed).shuffle(conversations)
    return conversations[:count]


def chat_passages(
    conversations: Sequence[Conversation], source: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast
) -> list[Passage]:
    """Conversations as prompts that are still without an answer, in each model's own template.

    Args:
        conversations: what to ask
        source: tokenizer of the source model
        target: tokenizer of the target model; without a chat template it is asked in the source's

    Raises:
        UserError: the source has no chat template, or a template refuses a conversation.
    """
    template_of_target = target_template(source, target)
    passages = []
    for conversation in conversations:
        prompt = render(conversation, source, chat_template(source))
        in_target = render(conversation, target, template_of_target)
        passages.append(Passage(prompt, len(prompt.encode()), in_target, json.dumps(conversation)))
    return passages


def target_template(source: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast) -> str:
    """The template in which the target is asked: its own, or where it has none the source's."""
    return chat_template(source if target.chat_template is None else target)


def chat_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """A tokenizer's chat template.

    Raises:
        UserError: it has none.
    """
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise UserError(
            f"{tokenizer.name_or_path!r} has no chat template, which --chat needs; save one in its tokenizer, or "
            "write prompts as they are."
        ) from error


def without_special_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer for texts whose special tokens are written out, as chat templates do: it adds none of its own."""
    plain: PreTrainedTokenizerFast = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.post_processor = processors.Sequence([])
    return plain


def parse_conversation(line: str, path: str, number: int) -> Conversation:
    """The conversation of a line of JSON with `messages` or `prompt`, up to the message to answer.

    Raises:
        UserError: the line holds none.
    """
    record = parse_line(line, path, number)
    if not isinstance(record, dict):
        record = {}
    if isinstance(record.get("prompt"), str):
        return ask(well_formed(record["prompt"]))
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise UserError(
            f"{path!r} line {number} has neither 'messages', a list of objects with the texts 'role' and 'content', "
            "nor a text 'prompt'; write one of them."
        )
    asked = [{field: well_formed(message[field]) for field in ("role", "content")} for message in messages]
    while asked and asked[-1]["role"] == "assistant":
        asked.pop()
    if not asked:
        raise UserError(f"{path!r} line {number} has no message to answer; end 'messages' with one of the user.")
    return asked


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    """A conversation in a chat template, up to where the answer begins.

    Raises:
        UserError: the template refuses a message, or leaves the one to answer out.
    """
    rendered = _fill(template, conversation, tokenizer)
    if not _holds(rendered, conversation[-1]["content"]):
        # Templates of some models for images read a list of parts, and leave out a plain text without a word.
        in_parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in conversation]
        rendered = _fill(template, in_parts, tokenizer)
    if not _holds(rendered, conversation[-1]["content"]):
        raise UserError(
            f"The chat template of {tokenizer.name_or_path!r} leaves out the message to answer, "
            f"of the role {conversation[-1]['role']!r}; change the messages or the template."
        )
    return rendered


def _fill(template: str, conversation: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast) -> str:
    # Its types know no parts of messages.
    messages: Any = list(conversation)
    try:
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in conversation)
        raise UserError(
            f"The chat template of {tokenizer.name_or_path!r} refuses messages of {roles} "
            f"({first_line(error)}); change the messages or the template."
        ) from error
    return str(rendered)


def _holds(rendered: str, content: str) -> bool:
    """Whether a text has been written, by a template that may set its white space anew."""
    return "".join(content.split()) in "".join(rendered.split())


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(field), str) for field in ("role", "content"))
