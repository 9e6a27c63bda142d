import math

import pytest
import tiny
import torch

from castlora.adapters.live import attach_lora
from castlora.evaluation import similarity
from castlora.evaluation.similarity import centred_gram, cka, measure_similarity
from castlora.model_pair import load_models
from castlora.plan import plan_transfer
from castlora.text.passages import Passage


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_rotation_scale_and_offset_change_nothing():
    x = rows(20, 6, 0)
    rotation = torch.linalg.qr(rows(6, 6, 1))[0]
    assert cka(x, 5 * x @ rotation + 3) == pytest.approx(1, abs=1e-6)


def test_it_is_symmetric_and_below_one_for_a_part_of_the_other():
    x = rows(40, 6, 0)
    assert cka(x, x[:, :2]) == pytest.approx(cka(x[:, :2], x))
    assert 0.3 < cka(x, x[:, :2]) < 0.8


def test_unrelated_activations_have_none_however_few_places_there_are():
    """The plain estimate would be near 1 for so few places in so many dimensions."""
    values = torch.tensor([cka(rows(12, 200, 2 * seed), rows(12, 200, 2 * seed + 1)) for seed in range(100)])
    assert abs(float(values.mean())) < 0.05


def test_places_that_are_all_alike_have_no_similarity():
    assert math.isnan(cka(torch.ones(6, 3), rows(6, 3, 0)))
    assert torch.isfinite(centred_gram(rows(4, 3, 0))).all()


@pytest.fixture
def measure(base_model, adapter):
    """Compares the bare models of two families, with adapters attached to both."""

    def run(source: str, target: str, count: int = 12):
        plan = plan_transfer(str(adapter(source)), str(base_model(target)), str(base_model(source)))
        models = load_models(plan)
        student = attach_lora(models.target, plan.target_modules, 8)
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        text = [Passage(sentence, 4) for sentence in tiny.sentences(count)]
        return plan, measure_similarity(models, student, plan.pairing, text, 60)

    return run


def test_a_model_is_like_itself_and_adapters_do_not_count(measure):
    plan, found = measure("llama", "llama")
    assert found.modules.keys() == {pair.target.name for pair in plan.pairing.mapped}
    assert list(found.modules.values()) == pytest.approx([1.0] * len(found.modules), abs=1e-5)
    assert [row[index] for index, row in enumerate(found.layers)] == pytest.approx([1.0] * 3, abs=1e-5)


@pytest.mark.parametrize(("source", "target"), [("llama", "mistral"), ("llama", "phi3"), ("gpt2", "llama")])
def test_every_paired_module_and_layer_is_compared(measure, source, target):
    plan, found = measure(source, target)
    assert found.modules.keys() == {pair.target.name for pair in plan.pairing.mapped}
    assert all(-1 <= value < 0.999 for value in found.modules.values())
    layers = plan.source_config.num_hidden_layers, plan.target_config.num_hidden_layers
    assert (len(found.layers[0]), len(found.layers)) == layers


def test_fewer_places_are_taken_from_all_over_the_text(measure, monkeypatch):
    monkeypatch.setattr(similarity, "_PLACES", 10)
    _, few = measure("llama", "llama", 12)
    assert few.layers[0][0] == pytest.approx(1, abs=1e-5)


def test_too_little_text_has_nothing_to_compare(measure):
    assert measure("llama", "mistral", 0)[1].layers == []
