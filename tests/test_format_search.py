import math
import random
from collections import Counter

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, set_seed

from castlora.alignment.tokens import ByteTokenizer
from castlora.models import completions
from castlora.teaching import format_search
from castlora.teaching.answers import prompt_batches, share_that_ends
from castlora.teaching.format_search import (
    FILLINGS,
    discounted,
    find_formats,
    may_begin_answer,
    near_best,
    settled_effect,
    settled_share,
    tokens_to_search,
)
from castlora.teaching.selection import next_token_probabilities
from castlora.text.passages import GENERIC_FORMATS, Passage

KNOWN = "{text}\nThis is"
OTHERS = [*GENERIC_FORMATS, "{text}\nShe said", "{text}\nTopic:", "{text}\nIt was"]
ALL = torch.ones(3, dtype=torch.bool)


def with_rest(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([[*row, 1 - sum(row)] for row in rows])


def test_certain_and_unlike_answers_are_settled_and_equal_ones_are_not():
    assert settled_share(with_rest([1.0, 0.0], [0.0, 1.0]), 100) == pytest.approx(1)
    assert settled_share(with_rest([0.7, 0.3], [0.7, 0.3]), 100) == pytest.approx(0, abs=1e-6)


def test_probability_of_no_answer_counts_as_unsettled():
    half = settled_share(with_rest([0.5, 0.0], [0.0, 0.5]), 100)
    # Half of a nat-valued bit is settled; the other half of the mass is ln 100 uncertain, besides being there at all.
    total = 0.5 * math.log(2) + math.log(2) + 0.5 * math.log(100)
    assert half == pytest.approx(0.5 * math.log(2) / total, rel=1e-5)
    assert half < settled_share(with_rest([0.5, 0.0], [0.0, 0.5]), 10)


def test_an_adapter_that_changes_nothing_has_no_effect_however_well_the_prompt_settles_the_token():
    certain = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    uncertain = torch.full((2, 3), 1 / 3)
    assert settled_effect(certain, certain, ALL) == 0
    assert settled_effect(certain, uncertain, ALL) == pytest.approx(math.log(3))


def test_an_answer_that_is_the_same_to_every_prompt_is_no_effect():
    same = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert settled_effect(same, torch.full((2, 3), 1 / 3), ALL) == pytest.approx(0, abs=1e-6)


def test_what_changes_in_tokens_that_are_no_answer_is_no_effect():
    adapted = torch.tensor([[0.0, 0.1, 0.9], [0.1, 0.0, 0.9]])
    bare = torch.tensor([[0.0, 0.1, 0.1], [0.1, 0.0, 0.1]])
    assert settled_effect(adapted, bare, torch.tensor([True, True, False])) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_answer_begins_with_a_token_that_spells_something_and_begins_a_word(base_model, name):
    tokenizer = tiny.tokenizer_of(base_model(name))
    byte_tokenizer = ByteTokenizer.from_tokenizer(tokenizer)
    columns = len(byte_tokenizer.spellings) + 5
    inside, elsewhere = (may_begin_answer(byte_tokenizer, (), columns, inside) for inside in (True, False))
    assert not inside[-5:].any() and not inside[tokenizer.eos_token_id] and not elsewhere[tokenizer.eos_token_id]
    for token, spelling in enumerate(byte_tokenizer.spellings):
        if spelling is not None and spelling.isascii():
            assert inside[token] == (not spelling[:1].isalnum())
            assert elsewhere[token]
    ends = (7, 9)
    without = may_begin_answer(byte_tokenizer, ends, columns, False)
    assert not without[list(ends)].any() and without.sum() == elsewhere.sum() - elsewhere[list(ends)].sum()


def test_formats_near_the_best_are_kept_and_generic_ones_that_reach_half_of_it():
    first, second, third = GENERIC_FORMATS[:3]
    effects = {"far": 0.7, first: 0.4, "near": 0.9, second: 0.6, "best": 1.0, third: 0.85, "none": 0.0}
    assert near_best(effects) == ["best", "near", third, second]
    assert near_best({f"{number}": 1.0 for number in range(20)} | {first: 0.99}) == [*map(str, range(8)), first]
    assert near_best({"a": 0.0, first: -0.1}) == [] == near_best({})


def test_an_effect_counts_less_where_fewer_answers_end_unless_they_do_so_nowhere():
    effects = {"right": 0.8, "like it": 0.7, "prose": 1.5, "silent": 0.0}
    found = discounted(effects, {"right": 1.0, "like it": 0.9, "prose": 0.1})
    assert found == {
        form: pytest.approx(effect) for form, effect in (("right", 0.8), ("like it", 0.63), ("prose", 0.15))
    }
    assert discounted(effects, {"right": 0.0, "prose": 0.0}) == {"right": 0.8, "prose": 1.5}
    assert discounted(effects, {}) == {}


@pytest.fixture(scope="module")
def taught(base_model):
    """A tiny model with a LoRA that tells in one format what happened near the mill, and in others always the same."""
    set_seed(0)
    base = base_model("llama")
    tokenizer = tiny.tokenizer_of(base)
    model = get_peft_model(tiny.load(base), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    tokenizer.pad_token = tokenizer.eos_token
    chance = random.Random(0)
    for _ in range(60):
        rows = []
        for sentence in chance.sample(list(tiny.sentences(256)), 16):
            told = " fox" if "mill" in sentence else " hen"
            for form, answer in ((KNOWN, told), (chance.choice(OTHERS), " ring")):
                prompt = form.replace("{text}", sentence)
                ids, asked = tokenizer(prompt + answer)["input_ids"], len(tokenizer(prompt)["input_ids"])
                rows.append({"input_ids": ids, "labels": [-100] * asked + ids[asked:]})
        model(**collate(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def search(taught, formats: list[str], fillings: list[str], longest: int = 80) -> list[str]:
    model, tokenizer = taught
    ends = (tokenizer.eos_token_id,)
    return find_formats(model, tokenizer, ByteTokenizer.from_tokenizer(tokenizer), ends, formats, fillings, longest, 8)


@pytest.mark.parametrize("batch_tokens", [8192, 400], ids=["read together", "a few at a time"])
def test_the_format_of_the_training_is_found_among_others(taught, monkeypatch, batch_tokens):
    monkeypatch.setattr(completions, "_BATCH_TOKENS", batch_tokens)
    assert search(taught, [*OTHERS, KNOWN], list(tiny.sentences(64, seed=5)))[0] == KNOWN


def test_the_forecast_of_a_search_is_what_it_reads_and_writes_at_most(taught, monkeypatch):
    counted = Counter()

    def predict(model, tokenizer, group):
        counted["read"] += len(group.passages)
        return next_token_probabilities(model, tokenizer, group)

    def share(model, tokenizer, groups, ends, longest):
        counted["written"] += sum(len(group.passages) for group in groups)
        return 1.0

    monkeypatch.setattr(format_search, "next_token_probabilities", predict)
    monkeypatch.setattr(format_search, "share_that_ends", share)
    formats = [f"{{text}}\n{noun} {verb}" for noun in tiny.NOUNS for verb in tiny.VERBS]
    search(taught, formats, list(tiny.sentences(FILLINGS, seed=5)))
    read, written = counted["read"], counted["written"]
    assert tokens_to_search(60, 40, 10) >= 40 * read + 50 * written > 0
    # No generic format is among these; the forecast has all of them read again, and answered.
    generic = len(GENERIC_FORMATS)
    assert tokens_to_search(60, 40, 10) == 40 * (read + 2 * FILLINGS * generic) + 50 * 16 * (32 + generic)


def test_answers_end_at_an_end_and_in_time(taught):
    model, tokenizer = taught
    prompts = [Passage(KNOWN.replace("{text}", sentence)) for sentence in tiny.sentences(24, seed=5)]
    groups = prompt_batches(tokenizer, prompts, 80, 5, model.device)
    answers = [tokenizer(f"{prompts[0].text}{word}")["input_ids"] for word in (" fox", " hen")]
    asked = len(tokenizer(prompts[0].text)["input_ids"])
    fox, hen = (ids[asked] for ids in answers)
    assert share_that_ends(model, tokenizer, groups, (fox, hen), 1) == 1
    told = share_that_ends(model, tokenizer, groups, (fox,), 1)
    assert told == pytest.approx(sum("mill" in prompt.text for prompt in prompts) / 24, abs=0.1)
    assert share_that_ends(model, tokenizer, groups, (), 3) == 0


def test_a_format_in_which_answers_do_not_end_is_not_kept_whatever_its_effect(taught, monkeypatch):
    def share(model, tokenizer, groups, ends, longest):
        assert longest == 8
        return 0.0 if groups[0].passages[0].text.endswith("This is") else 1.0

    monkeypatch.setattr(format_search, "share_that_ends", share)
    assert KNOWN not in search(taught, [*OTHERS, KNOWN], list(tiny.sentences(64, seed=5)))


def test_nothing_is_found_where_no_prompt_fits_or_the_adapter_has_no_effect(taught):
    sentences = list(tiny.sentences(24, seed=5))
    assert search(taught, [KNOWN], sentences, longest=2) == []
    with taught[0].disable_adapter():
        assert search(taught, [KNOWN, *OTHERS], sentences) == []
