import logging

import pytest
import tiny
import torch
from peft import PeftModel

from castlora.models import completions
from castlora.models.completions import batches_by_length
from castlora.teaching.answers import prompt_batches, write_answers
from castlora.text.passages import Passage

PROMPTS = ["Who?", "Who finds the hen near the old mill?", "Which fox hides behind the house? Answer:", "Où?"]


@pytest.fixture(scope="module")
def write(base_model, adapter):
    loaded = {}

    def run(name: str, prompts=PROMPTS, seed=0, batch_size=2, eos=True, ends=None, **lengths) -> list[Passage]:
        if name not in loaded:
            loaded[name] = PeftModel.from_pretrained(tiny.load(base_model(name)), adapter(name)).eval()
        tokenizer = tiny.tokenizer_of(base_model(name))
        if not eos:
            tokenizer.eos_token = None
        given = [tokenizer.eos_token_id] if eos else []
        limits = {"max_new_tokens": 8, "max_prompt_tokens": 60} | lengths
        asked = [Passage(prompt, len(prompt.encode())) for prompt in prompts]
        sampling = {"batch_size": batch_size, "seed": seed, **limits}
        return list(write_answers(loaded[name], tokenizer, asked, given if ends is None else ends, **sampling))

    return run


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_passage_is_a_prompt_and_its_answer(write, name):
    passages = write(name)
    assert [passage.text.encode()[: passage.answer_start].decode() for passage in passages] == sorted(
        PROMPTS, key=lambda prompt: -len(tiny.family(name)[1](prompt)["input_ids"])
    )
    # Some answers are lost: a random model writes bytes that are no characters, or ends the text at once.
    assert sum(passage.answer_start < len(passage.text.encode()) for passage in passages) >= 2


def test_the_same_seed_writes_the_same_answers(write):
    assert write("llama", seed=5) == write("llama", seed=5) != write("llama", seed=6)


def test_prompts_that_are_too_long_are_left_out(write):
    lengths = {prompt: len(tiny.byte_level(300)(prompt)["input_ids"]) for prompt in PROMPTS}
    limit = sorted(lengths.values())[1]
    written = [
        passage.text.encode()[: passage.answer_start].decode() for passage in write("gpt2", max_prompt_tokens=limit)
    ]
    assert sorted(written) == sorted(prompt for prompt, length in lengths.items() if length <= limit)
    assert write("gpt2", max_prompt_tokens=0) == []


def test_nothing_warns_of_prompts_that_no_model_reads(base_model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = tiny.tokenizer_of(base_model("gpt2"))
    tokenizer.model_max_length = 4
    asked = [Passage(prompt, len(prompt.encode())) for prompt in PROMPTS]
    (batch,) = prompt_batches(tokenizer, asked, 4, 8, torch.device("cpu"))
    assert 0 < len(batch.ids) < len(PROMPTS) and caplog.text == ""


def test_answers_have_at_most_the_given_number_of_tokens(write):
    for passage in write("gpt2", max_new_tokens=3):
        answer = passage.text.encode()[passage.answer_start :]
        # Bytes that are no character become a mark of three bytes, and the longest tokens have nine.
        assert 0 < len(answer) <= 27


def test_a_prompt_that_does_not_come_back_whole_gets_its_answer_all_the_same(write):
    prompts = [f"Who says </s> {noun}?" for noun in tiny.NOUNS]
    passages = write("llama", prompts=prompts)
    assert all(passage.text[: passage.answer_start] in prompts for passage in passages)
    assert any(len(passage.text) > passage.answer_start for passage in passages)


def test_a_tokenizer_without_an_end_token_will_do(write):
    assert len(write("llama", eos=False)) == len(PROMPTS)


def test_what_ends_an_answer_is_no_part_of_it(write):
    tokenizer = tiny.family("gpt2")[1]
    letters = [token for token in range(len(tokenizer)) if "e" in tokenizer.decode([token])]
    ended = write("gpt2", ends=letters, max_new_tokens=20)
    answers = [passage.text.encode()[passage.answer_start :].decode() for passage in ended]
    assert not any("e" in answer for answer in answers) and any(answers)
    assert any("e" in passage.text[passage.answer_start :] for passage in write("gpt2", ends=[], max_new_tokens=20))


def test_an_answer_without_an_end_is_cut(write):
    tokenizer = tiny.family("gpt2")[1]
    letters = [token for token in range(len(tokenizer)) if "e" in tokenizer.decode([token])]
    assert all(passage.is_cut for passage in write("gpt2", ends=[], max_new_tokens=20))
    assert not any(passage.is_cut for passage in write("gpt2", ends=letters, max_new_tokens=60))


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([3, 9, 4, 9], [[1, 3], [2, 0]]),
        ([5000, 10, 4000, 4000], [[0], [2, 3], [1]]),
        ([9000, 20_000], [[1], [0]]),
        ([0, 0, 0], [[0, 1], [2]]),
        ([], []),
    ],
    ids=["as many as asked", "fewer long ones", "none is too long for a batch of its own", "empty", "nothing"],
)
def test_batches_hold_what_fits_beside_a_model(lengths, expected):
    assert list(batches_by_length(lengths, 2)) == expected


def test_what_is_sampled_depends_on_the_batches_alone(write, monkeypatch):
    one_by_one = write("llama", batch_size=1)
    assert write("llama", batch_size=4) != one_by_one
    monkeypatch.setattr(completions, "_BATCH_TOKENS", 1)
    assert write("llama", batch_size=4) == one_by_one
