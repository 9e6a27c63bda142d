"""What a run reads: text is drawn, put into prompt formats, chosen, and answered by source + LoRA."""

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from castlora.alignment.positions import bytes_per_token
from castlora.config import Recipe
from castlora.errors import UserError
from castlora.execution.parts import NOTHING_KEPT, Parts
from castlora.execution.run_directory import fingerprint
from castlora.model_pair import HELD_OUT_PASSAGES, BaseModels, Models, held_out_count
from castlora.models.loading import context_length
from castlora.teaching.answers import prompt_batches, share_that_ends, write_answers
from castlora.teaching.format_search import FILLINGS, find_formats
from castlora.teaching.selection import most_informative, mutual_information, predict_first_tokens
from castlora.teaching.taught import check_taught, is_of_task, read_taught
from castlora.teaching.variants import vary_prompts
from castlora.text.chat import Conversation, ask, chat_passages, read_conversations
from castlora.text.passages import (
    GENERIC_FORMATS,
    HUB_DEFAULT,
    SLOT,
    Passage,
    candidate_formats,
    check_prompt_format,
    cut_passages,
    draw_fillings,
    fill_formats,
    join_sentences,
    read_documents,
    read_prompts,
)

logger = logging.getLogger("castlora")

_SAMPLE_FOR_LENGTH = 64
_SAMPLE_FOR_ENDS = 64
_ANSWERS_END = 0.9
"""Share of likeliest answers from which on they are taken to come to an end."""
_PROMPT_BATCH = 64


@dataclass(frozen=True)
class TextSource:
    """Where the text comes from, as the user named it."""

    text: str | None = None
    prompt_format: str | None = None
    prompts: str | None = None
    chat: bool = False
    """Whether prompts are messages, which both models read in their own chat templates."""
    taught: str | None = None
    """File of prompts that are answered already."""

    @property
    def regime(self) -> str:
        """What is known about the task: nothing, the format of its prompts, or prompts themselves."""
        if self.taught is not None:
            return "taught text"
        if self.prompts is not None:
            return "unlabelled prompts"
        if self.prompt_format is not None:
            return "prompt format"
        return "chat template" if self.chat else "general text"

    @property
    def general(self) -> str | None:
        """The general text that is read: a file or a hub data set; None where prompts or taught text stand for it."""
        return None if self.prompts or self.taught else self.text or HUB_DEFAULT

    @property
    def known_formats(self) -> Sequence[str]:
        """What general text is put into, as far as that is known; a chat template needs nothing around the text."""
        if self.prompts is not None or self.taught is not None:
            return ()
        if self.prompt_format is not None:
            return (self.prompt_format,)
        return (SLOT,) if self.chat else ()

    def has_prompts(self) -> bool:
        """Whether prompts of the task are read, as they are or answered already.

        Raises:
            UserError: a file of answered prompts cannot be read.
        """
        if self.taught is None:
            return self.prompts is not None
        return is_of_task(self.taught)

    def fingerprints(self) -> dict[str, str]:
        """Of the files that are read, by the options that name them."""
        named = {"--text": self.general, "--prompts": self.prompts, "--taught": self.taught}
        return {option: fingerprint(Path(name)) for option, name in named.items() if name and Path(name).is_file()}

    def check(self) -> None:
        """Raises a UserError if the text cannot be read, before anything slow begins."""
        if self.taught is not None:
            if self.text or self.prompts or self.prompt_format or self.chat:
                raise UserError("--taught holds prompts and answers; give no other text, format or --chat with it.")
            check_taught(self.taught)
            return
        if self.prompts is not None and self.prompt_format is not None:
            raise UserError("--prompts and --prompt-format are two sources of prompts; give one of them.")
        if self.prompts is not None and self.text is not None:
            logger.warning("--text %r is not read: --prompts are given.", self.text)
        if self.prompt_format is not None:
            check_prompt_format(self.prompt_format)
        if self.prompts is not None and self.chat:
            read_conversations(self.prompts, 1, seed=0)
        elif self.prompts is not None:
            read_prompts(self.prompts, 1, seed=0)
        else:
            next(read_documents(self.text or HUB_DEFAULT))


def prompt_formats(
    models: Models, text: TextSource, recipe: Recipe, seed: int, parts: Parts = NOTHING_KEPT
) -> Sequence[str]:
    """What general text is put into; nothing where prompts are given or text is read as it runs.

    Where the format of the adapter's prompts is not known, those that it listens to are found by asking it.

    Raises:
        UserError: the text cannot be read.
    """
    if text.known_formats or text.prompts or text.taught or not recipe.write_answers:
        return text.known_formats
    if recipe.format_candidates == 0:
        return GENERIC_FORMATS
    general = text.text or HUB_DEFAULT
    found = find_formats(
        models.teacher,
        models.source_tokenizer,
        models.source_bytes,
        models.shared.source_ends,
        candidate_formats(read_documents(general), recipe.format_candidates),
        draw_fillings(read_documents(general), FILLINGS, seed),
        _longest_prompt(models, recipe),
        recipe.answer_tokens,
        parts,
    )
    return found or GENERIC_FORMATS


def draw_text(models: BaseModels, text: TextSource, formats: Sequence[str], recipe: Recipe, seed: int) -> list[Passage]:
    """The passages of a run: plain text, or prompts that are still without an answer.

    Args:
        models: both models
        text: where the text comes from
        formats: what general text is put into; none to read it as it runs
        recipe: how much text
        seed: of the draw

    Raises:
        UserError: the text cannot be read or is too little.
    """
    count = recipe.passages + HELD_OUT_PASSAGES
    if text.prompts is not None and text.chat:
        passages = _in_templates(models, read_conversations(text.prompts, count, seed))
    elif text.prompts is not None:
        passages = _unanswered(read_prompts(text.prompts, count, seed))
    elif formats:
        candidates = _kept_prompts(recipe) * recipe.candidates
        sentences = draw_fillings(read_documents(text.text or HUB_DEFAULT), candidates, seed)
        prompts = fill_formats(join_sentences(sentences, recipe.sentences, seed), formats)
        passages = _in_templates(models, [ask(prompt) for prompt in prompts]) if text.chat else _unanswered(prompts)
    else:
        max_bytes = _passage_bytes(models, text.text or HUB_DEFAULT, recipe.max_length)
        passages = cut_passages(read_documents(text.text or HUB_DEFAULT), count, max_bytes, seed)
    if len(passages) < 2:
        raise UserError(f"The text yields {len(passages)} passages, at least 2 are needed; give more text.")
    return passages if text.general is None else [replace(passage, is_general=True) for passage in passages]


def teach_text(
    models: Models,
    text: TextSource,
    formats: Sequence[str],
    recipe: Recipe,
    seed: int,
    parts: Parts = NOTHING_KEPT,
) -> list[Passage]:
    """The text of a run with all that source + LoRA has to say to it: passages are drawn, chosen and answered.

    Raises:
        UserError: the text cannot be read or is too little.
    """
    if text.taught is not None:
        count = max(recipe.passages, recipe.filled_passages) + HELD_OUT_PASSAGES
        return read_taught(text.taught, count, models.source_tokenizer, models.target_tokenizer)
    drawn = draw_text(models, text, formats, recipe, seed)
    logger.info("Text: %s, %d passages", text.regime, len(drawn))
    if text.prompts is not None and recipe.write_answers:
        check_lengths(models, drawn, recipe)
    chosen = choose_prompts(models, drawn, recipe, parts) if formats else drawn
    answered = answer_prompts(models, chosen, recipe, seed, parts)
    if formats:
        return keep_whole_answers(models, drawn, answered, recipe, parts)
    if text.prompts is None:
        return answered
    # The last passages are held out.
    variants = draw_variants(models, answered, recipe, seed)
    return [*answer_prompts(models, variants, recipe, seed, parts.under("variants")), *answered]


def check_lengths(models: Models, prompts: Sequence[Passage], recipe: Recipe) -> None:
    """Says how many prompts are left out because they are too long, and what would hold them.

    Raises:
        UserError: all of them are too long.
    """
    limit = _longest_prompt(models, recipe)
    adds_special_tokens = not prompts[0].is_chat
    in_source = models.source_bytes.encode_batch(
        [prompt.text for prompt in prompts], add_special_tokens=adds_special_tokens
    )
    in_target = models.target_bytes.encode_batch(
        [prompt.target_prompt or prompt.text for prompt in prompts], add_special_tokens=adds_special_tokens
    )
    lengths = [max(len(one.ids), len(other.ids)) for one, other in zip(in_source, in_target, strict=True)]
    too_long = sum(length > limit for length in lengths)
    if not too_long:
        return
    readable = min(context_length(models.source.config), context_length(models.target.config))
    if limit < recipe.max_length:
        shorter = f"give shorter prompts, or --tuning.answer-tokens below {recipe.answer_tokens}"
        advice = f"the models read {readable} tokens; {shorter}"
    else:
        advice = f"give --tuning.max-length {min(max(lengths) + recipe.answer_tokens, readable)}"
    if too_long == len(prompts):
        raise UserError(f"All {too_long} prompts have more than {limit} tokens; {advice}.")
    logger.warning(
        "%d of %d prompts have more than %d tokens and are left out; to keep them %s.",
        too_long, len(prompts), limit, advice,
    )  # fmt: skip


def choose_prompts(
    models: Models, passages: Sequence[Passage], recipe: Recipe, parts: Parts = NOTHING_KEPT
) -> list[Passage]:
    """Of more prompts than are to be kept, those that tell most about the skill."""
    if len(passages) <= _kept_prompts(recipe):
        return list(passages)
    first_tokens = predict_first_tokens(
        models.teacher,
        models.source_tokenizer,
        passages,
        _longest_prompt(models, recipe),
        _PROMPT_BATCH,
        parts,
    )
    distributions = first_tokens.distributions()
    indices = most_informative(distributions, min(_kept_prompts(recipe), len(distributions)))
    logger.info(
        "Kept %d of %d prompts: their answers tell %.2f nats about the prompt, those to all prompts %.2f",
        len(indices), len(distributions), mutual_information(distributions[indices]), mutual_information(distributions),
    )  # fmt: skip
    chosen = {first_tokens.prompts[index] for index in indices.tolist()}
    return [passage for passage in passages if passage in chosen]


def draw_variants(models: Models, given: Sequence[Passage], recipe: Recipe, seed: int) -> list[Passage]:
    """What is missing of the fewest prompts, made of those that are not held out; still without an answer.

    Args:
        models: both models
        given: answered prompts, of which the last will be held out
        recipe: how much text
        seed: of the draw
    """
    held_out = held_out_count(len(given))
    missing = min(recipe.fewest_prompts, recipe.passages) - (len(given) - held_out)
    if missing <= 0 or not recipe.write_answers:
        return []
    chats = [json.loads(passage.messages) for passage in given if passage.messages is not None]
    asked = [chat[-1]["content"] for chat in chats] or [passage.prompt for passage in given]
    variants = vary_prompts(asked[:-held_out], missing, seed, kept_out=asked[-held_out:])
    logger.info(
        "%d prompts to learn from are few; %d variants of them are answered too.",
        len(given) - held_out, len(variants),
    )  # fmt: skip
    if chats:
        in_chats = ([*chats[of.origin][:-1], {**chats[of.origin][-1], "content": of.text}] for of in variants)
        passages = _in_templates(models, list(in_chats))
    else:
        passages = _unanswered([variant.text for variant in variants])
    return [replace(passage, is_variant=True) for passage in passages]


def answer_prompts(
    models: Models, passages: Sequence[Passage], recipe: Recipe, seed: int, parts: Parts = NOTHING_KEPT
) -> list[Passage]:
    """Prompts with the answers that source + LoRA writes, in shuffled order; plain text as it is."""
    prompts = [passage for passage in passages if passage.answer_start]
    if not prompts or not recipe.write_answers:
        return list(passages)
    answered = write_answers(
        models.teacher,
        models.source_tokenizer,
        prompts,
        models.shared.source_ends,
        max_new_tokens=recipe.answer_tokens,
        max_prompt_tokens=_longest_prompt(models, recipe),
        batch_size=_PROMPT_BATCH,
        seed=seed,
        parts=parts,
    )
    shuffled = list(answered)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def keep_whole_answers(
    models: Models, asked: Sequence[Passage], answered: Sequence[Passage], recipe: Recipe, parts: Parts = NOTHING_KEPT
) -> list[Passage]:
    """Leaves out answers that were cut at their greatest length, where answers of the adapter come to an end.

    To some prompts it has no answer and goes on as text does. These begin unlike all others, so that they are among the
    first to be chosen, and have more tokens than answers have.

    Args:
        models: both models
        asked: prompts before the choice
        answered: those that were chosen, with their answers
        recipe: how long answers are
        parts: keeps how many answers end
    """
    whole = [passage for passage in answered if not passage.is_cut]
    if len(whole) == len(answered):
        return whole
    sample = asked[:_SAMPLE_FOR_ENDS]
    groups = prompt_batches(
        models.source_tokenizer, sample, _longest_prompt(models, recipe), _PROMPT_BATCH, models.source.device
    )
    ends = partial(
        share_that_ends,
        models.teacher,
        models.source_tokenizer,
        groups,
        models.shared.source_ends,
        recipe.answer_tokens,
    )
    if not groups or parts.json("answers-end", [passage.text for passage in sample], ends) < _ANSWERS_END:
        return list(answered)
    logger.info("Left out %d of %d answers that did not come to an end.", len(answered) - len(whole), len(answered))
    return whole


def _unanswered(prompts: Sequence[str]) -> list[Passage]:
    return [Passage(prompt, len(prompt.encode())) for prompt in prompts]


def _in_templates(models: BaseModels, conversations: Sequence[Conversation]) -> list[Passage]:
    return chat_passages(conversations, models.source_tokenizer, models.target_tokenizer)


def _kept_prompts(recipe: Recipe) -> int:
    """Prompts made of general text that a run uses, the held-out ones included."""
    return recipe.filled_passages + HELD_OUT_PASSAGES


def _longest_prompt(models: Models, recipe: Recipe) -> int:
    """Tokens of the longest prompt that leaves room for an answer."""
    return min(recipe.max_length, context_length(models.source.config) - recipe.answer_tokens)


def _passage_bytes(models: BaseModels, text: str, max_length: int) -> int:
    """Bytes of text that fill `max_length` tokens of the tokenizer that needs more of them."""
    sample = cut_passages(read_documents(text), _SAMPLE_FOR_LENGTH, 4 * max_length, seed=0)
    densest = min(bytes_per_token(sample, tokenizer) for tokenizer in (models.source_bytes, models.target_bytes))
    return max(16, int(densest * (max_length - 2)))
