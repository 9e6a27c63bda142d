import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from castlora.teaching.selection import (
    FirstTokens,
    information_gain,
    most_informative,
    mutual_information,
    predict_first_tokens,
)
from castlora.text.passages import Passage

QUESTIONS = [f"Who {verb} the {noun}? Answer:" for verb in tiny.VERBS for noun in tiny.NOUNS[:3]]
PROMPTS = [Passage(question, len(question)) for question in QUESTIONS]


def first_tokens(distributions: Tensor, likeliest: int) -> FirstTokens:
    top = distributions.topk(likeliest)
    prompts = [Passage(f"prompt {row}", 8) for row in range(len(distributions))]
    return FirstTokens(prompts, top.indices, top.values, distributions.mean(0))


def random_distributions(prompts: int, outcomes: int, seed: int = 0, sharpness: float = 2.0) -> Tensor:
    logits = torch.randn(prompts, outcomes, generator=torch.Generator().manual_seed(seed))
    return (sharpness * logits).softmax(-1)


def test_distributions_keep_all_probability():
    whole = random_distributions(20, 300)
    for likeliest in (300, 64, 3):
        table = first_tokens(whole, likeliest).distributions()
        torch.testing.assert_close(table.sum(-1), torch.ones(20))
        assert table.min() >= 0


def test_a_small_vocabulary_is_kept_as_it_is():
    whole = random_distributions(6, 5)
    order = whole.mean(0).topk(5).indices
    table = first_tokens(whole, 5).distributions()
    torch.testing.assert_close(table[:, :5], whole[:, order])
    assert table[:, 5].abs().max() < 1e-6


def test_tokens_that_are_not_likely_count_as_the_rest():
    whole = torch.tensor([[0.6, 0.2, 0.15, 0.05], [0.6, 0.2, 0.05, 0.15]])
    assert mutual_information(first_tokens(whole, 4).distributions()) > 0.01
    assert mutual_information(first_tokens(whole, 2).distributions()) < 1e-6


def test_the_gain_is_the_divergence_from_the_mean():
    whole = random_distributions(5, 7)
    mean = whole.mean(0)
    expected = (whole * (whole / mean).log()).sum(-1)
    torch.testing.assert_close(information_gain(whole, mean), expected)


def test_equal_distributions_tell_nothing_and_opposite_certainties_one_bit():
    assert mutual_information(torch.tensor([[0.5, 0.3, 0.2]] * 4)) == pytest.approx(0, abs=1e-6)
    assert mutual_information(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])) == pytest.approx(math.log(2))


def test_prompts_with_an_answer_of_their_own_are_chosen():
    vague, second, third = [0.4, 0.3, 0.3], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    assert most_informative(torch.tensor([vague, third, vague, second, vague]), 2).tolist() == [1, 3]


def test_an_answer_that_many_prompts_get_does_not_drown_a_rare_one():
    common, rare = [0.98, 0.01, 0.01], [0.02, 0.49, 0.49]
    distributions = torch.tensor([common] * 50 + [rare] * 4 + [common] * 50)
    chosen = most_informative(distributions, 8).tolist()
    assert set(range(50, 54)) < set(chosen)


def test_frequent_answers_are_balanced_where_the_gain_under_the_first_mean_is_not():
    # The rare answer gains more under the mean of all prompts, and choosing by that gain alone would take nothing else.
    distributions = torch.tensor([[0.95, 0.05]] * 80 + [[0.05, 0.95]] * 20)
    gains = information_gain(distributions, distributions.mean(0))
    assert gains[80:].min() > gains[:80].max()
    chosen = most_informative(distributions, 20)
    assert 5 <= int((chosen >= 80).sum()) <= 15
    assert mutual_information(distributions[chosen]) > 0.9 * mutual_information(
        torch.tensor([[0.95, 0.05], [0.05, 0.95]])
    )


@given(seed=st.integers(0, 1000), count=st.integers(10, 40))
def test_the_choice_tells_more_than_chance_and_than_the_gain_alone(seed, count):
    distributions = random_distributions(60, 4, seed)
    chosen = most_informative(distributions, count)
    assert len(set(chosen.tolist())) == count
    assert chosen.tolist() == sorted(chosen.tolist())
    by_gain = information_gain(distributions, distributions.mean(0)).argsort(descending=True)[:count]
    information = mutual_information(distributions[chosen])
    assert information > mutual_information(distributions)
    assert information > 0.97 * mutual_information(distributions[by_gain])


def test_all_prompts_may_be_chosen():
    assert most_informative(random_distributions(9, 4), 9).tolist() == list(range(9))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_predictions_are_those_of_the_model_whatever_the_batch(base_model, adapter, name):
    model = PeftModel.from_pretrained(tiny.load(base_model(name)), adapter(name)).eval()
    tokenizer = tiny.tokenizer_of(base_model(name))
    found = predict_first_tokens(model, tokenizer, PROMPTS, max_prompt_tokens=60, batch_size=5)
    assert set(found.prompts) == set(PROMPTS) and len(found.prompts) == len(PROMPTS)
    with torch.no_grad():
        alone = torch.stack(
            [model(**tokenizer(prompt.text, return_tensors="pt")).logits[0, -1].softmax(-1) for prompt in found.prompts]
        )
    torch.testing.assert_close(found.mean, alone.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.probabilities, alone.gather(1, found.ids), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.probabilities[:, 0], alone.amax(-1), rtol=1e-4, atol=1e-6)


def test_a_prompt_that_is_too_long_is_left_out(base_model, adapter):
    model = PeftModel.from_pretrained(tiny.load(base_model("gpt2")), adapter("gpt2")).eval()
    tokenizer = tiny.tokenizer_of(base_model("gpt2"))
    long = "Who finds the hen? " * 4
    limit = len(tokenizer(long)["input_ids"]) - 1
    prompts = [*PROMPTS, Passage(long, len(long))]
    assert predict_first_tokens(model, tokenizer, prompts, limit, 8).prompts == sorted(
        PROMPTS, key=lambda prompt: -len(tokenizer(prompt.text)["input_ids"])
    )
