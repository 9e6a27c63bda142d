import math

import pytest
import tiny
import torch
from peft import PeftModel

from castlora.selection import FirstTokens, information_gain, most_informative, predict_first_tokens

PROMPTS = [f"Who {verb} the {noun}? Answer:" for verb in tiny.VERBS for noun in tiny.NOUNS[:3]]


def first_tokens(distributions: list[list[float]], likeliest: int) -> FirstTokens:
    whole = torch.tensor(distributions)
    top = whole.topk(likeliest)
    return FirstTokens([f"prompt {row}" for row in range(len(whole))], top.indices, top.values, whole.mean(0))


def test_equal_distributions_tell_nothing():
    assert information_gain(first_tokens([[0.5, 0.3, 0.2]] * 4, 2)).abs().max() < 1e-6


def test_opposite_certainties_tell_one_bit():
    gains = information_gain(first_tokens([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], 3))
    assert gains.tolist() == pytest.approx([math.log(2)] * 2)


def test_the_gain_is_the_divergence_from_the_mean():
    distributions = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    expected = (distributions * (distributions / distributions.mean(0)).log()).sum(-1)
    torch.testing.assert_close(information_gain(first_tokens(distributions.tolist(), 7)), expected)


def test_tokens_outside_the_likeliest_count_as_one_outcome():
    distributions = [[0.6, 0.2, 0.15, 0.05], [0.6, 0.2, 0.05, 0.15]]
    whole, partial = (information_gain(first_tokens(distributions, likeliest)) for likeliest in (4, 2))
    assert whole.min() > 0.01
    assert partial.abs().max() < 1e-6


def test_the_prompts_with_an_answer_of_their_own_are_chosen_in_their_order():
    vague, certain = [0.4, 0.3, 0.3], [0.0, 0.0, 1.0]
    selection = most_informative(first_tokens([vague, certain, vague, [0.0, 1.0, 0.0], vague], 3), 2)
    assert selection.prompts == ["prompt 1", "prompt 3"]
    assert selection.information > 0.9 > selection.information_of_all > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_predictions_are_those_of_the_model_whatever_the_batch(base_model, adapter, name):
    model = PeftModel.from_pretrained(tiny.load(base_model(name)), adapter(name)).eval()
    tokenizer = tiny.tokenizer_of(base_model(name))
    found = predict_first_tokens(model, tokenizer, PROMPTS, max_prompt_tokens=60, batch_size=5)
    assert sorted(found.prompts) == sorted(PROMPTS)
    with torch.no_grad():
        alone = torch.stack(
            [model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].softmax(-1) for prompt in found.prompts]
        )
    torch.testing.assert_close(found.mean, alone.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.probabilities, alone.gather(1, found.ids), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.probabilities[:, 0], alone.amax(-1), rtol=1e-4, atol=1e-6)


def test_a_prompt_that_is_too_long_is_left_out(base_model, adapter):
    model = PeftModel.from_pretrained(tiny.load(base_model("gpt2")), adapter("gpt2")).eval()
    tokenizer = tiny.tokenizer_of(base_model("gpt2"))
    long = "Who finds the hen? " * 4
    limit = len(tokenizer(long)["input_ids"]) - 1
    assert predict_first_tokens(model, tokenizer, [*PROMPTS, long], limit, 8).prompts == sorted(
        PROMPTS, key=lambda prompt: -len(tokenizer(prompt)["input_ids"])
    )
