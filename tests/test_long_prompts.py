"""Prompts that the passages of a run have no room for."""

import logging
from dataclasses import replace

import pytest
import tiny

from castlora import UserError
from castlora.config import DEFAULT
from castlora.model_pair import Models, load_models
from castlora.plan import plan_transfer
from castlora.teaching.curriculum import TextSource, check_lengths, teach_text
from castlora.text.passages import Passage

RECIPE = replace(DEFAULT, max_length=40, answer_tokens=8)
SHORT, LONG = Passage("Who? a b c", 10), Passage("Who? " + "a b c " * 10, 65)


@pytest.fixture(scope="module")
def models(base_model, adapter) -> Models:
    return load_models(plan_transfer(str(adapter("llama")), str(base_model("mistral")), str(base_model("llama"))))


def tokens(models: Models, passage: Passage) -> int:
    return max(len(model.encode(passage.text).ids) for model in (models.source_bytes, models.target_bytes))


def test_what_holds_all_prompts_is_said_where_some_are_too_long(models, caplog):
    with caplog.at_level(logging.WARNING, logger="castlora"):
        check_lengths(models, [SHORT, SHORT], RECIPE)
        assert not caplog.records
        check_lengths(models, [SHORT, LONG, SHORT], RECIPE)
    needed = tokens(models, LONG) + 8
    assert caplog.messages == [
        f"1 of 3 prompts have more than 40 tokens and are left out; to keep them give --tuning.max-length {needed}."
    ]
    check_lengths(models, [LONG], replace(RECIPE, max_length=needed))


def test_a_prompt_that_only_the_target_cuts_too_finely_counts(base_model, adapter):
    models = load_models(plan_transfer(str(adapter("mistral")), str(base_model("llama")), str(base_model("mistral"))))
    passage = next(
        Passage(text, len(text))
        for text in tiny.sentences(40, seed=3)
        if len(models.source_bytes.encode(text).ids) < len(models.target_bytes.encode(text).ids)
    )
    shorter = len(models.source_bytes.encode(passage.text).ids)
    with pytest.raises(UserError, match=rf"All 1 prompts have more than {shorter} tokens"):
        check_lengths(models, [passage], replace(RECIPE, max_length=shorter))


def test_prompts_that_the_models_cannot_read_are_to_be_shorter(models):
    longest = tiny.CONTEXT - 48
    with pytest.raises(
        UserError,
        match=rf"All 1 prompts have more than {longest} tokens; the models read {tiny.CONTEXT} tokens; give shorter "
        "prompts, or --tuning.answer-tokens below 48",
    ):
        check_lengths(models, [LONG], replace(RECIPE, max_length=tiny.CONTEXT, answer_tokens=48))


def test_prompts_are_counted_before_any_is_answered(models, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{LONG.text} {number}" for number in range(4)))
    with pytest.raises(UserError, match=r"All 4 prompts have more than 40 tokens; give --tuning.max-length \d+"):
        teach_text(models, TextSource(prompts=str(prompts)), (), RECIPE, seed=0)
