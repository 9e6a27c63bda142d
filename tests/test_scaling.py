from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch

from castlora.adapters.live import attach_lora, start_from_factors, student_factors
from castlora.alignment.positions import align_passages
from castlora.alignment.tokens import ByteTokenizer
from castlora.alignment.vocabulary import SharedVocabulary
from castlora.config import DEFAULT
from castlora.distillation.distill import Student, measure_held_out
from castlora.distillation.teacher import LiveTeacher
from castlora.maps.scaling import (
    SOLVED_SCALES,
    TRAINED_SCALES,
    best_scale,
    keep_best_scale,
    losses_by_scale,
    scale_student,
)
from castlora.plan import plan_transfer
from castlora.text.passages import Passage

RECIPE = replace(DEFAULT, context_weight=1.0, chunk_weight=0.0, batch_size=4)


@pytest.fixture
def copied(base_model, adapter):
    """A copy of an adapted model whose update has been divided by a factor, and the measure of how far it is off."""
    folder = str(base_model("llama"))
    plan = plan_transfer(str(adapter("llama")), folder, folder)
    tokenizer = ByteTokenizer.from_tokenizer(tiny.family("llama")[1])
    passages = [Passage(sentence) for sentence in tiny.sentences(8)]
    text = list(align_passages(passages, tokenizer, tokenizer, 48, 1.0))
    shared = SharedVocabulary.of(tokenizer, tokenizer, *[tiny.family("llama")[0].vocab_size] * 2)

    def make(factor: float) -> tuple:
        teacher = LiveTeacher(tiny.load_adapted(base_model("llama"), adapter("llama")), with_hidden=False)
        model = attach_lora(tiny.load(base_model("llama")), plan.target_modules, 4)
        start_from_factors(model, plan.factors)
        student = Student(model, 32, 32, with_head=False).eval()
        scale_student(student, 1 / factor)
        return student, partial(measure_held_out, teacher, examples=text, shared=shared, recipe=RECIPE)

    return make


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_scale_that_was_taken_away_is_found(copied, factor):
    student, measure = copied(factor)
    losses = losses_by_scale(student, measure, SOLVED_SCALES)
    assert tuple(losses) == SOLVED_SCALES
    assert best_scale(losses) == factor
    assert losses[factor] == pytest.approx(0, abs=1e-5)


def test_an_update_that_helps_nowhere_is_taken_back(copied, base_model, caplog):
    student, measure = copied(-1.0)
    assert keep_best_scale(student, measure, TRAINED_SCALES).scale == 0.0
    assert "No strength of the update" in caplog.text
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(tiny.logits(student.model, ids), tiny.logits(tiny.load(base_model("llama")), ids))


def test_the_kept_scale_is_in_the_factors_that_are_written(copied, adapter, base_model):
    student, measure = copied(0.5)
    choice = keep_best_scale(student, measure, (0.5, 1.0))
    assert choice.scale == 0.5 and choice.tried == [0.5, 1.0] and choice.losses[0] < choice.losses[1]
    folder = str(base_model("llama"))
    plan = plan_transfer(str(adapter("llama")), folder, folder)
    for name, written in student_factors(student.model, plan.factors).items():
        torch.testing.assert_close(written.b @ written.a, plan.factors[name].b @ plan.factors[name].a)


def test_the_search_leaves_the_update_as_it_was(copied):
    student, measure = copied(1.0)
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    logits = tiny.logits(student.model, torch.tensor([[5, 6, 7]]))
    losses_by_scale(student, measure, (0.0, 2.0))
    assert all(torch.equal(before[name], parameter) for name, parameter in student.named_parameters())
    torch.testing.assert_close(tiny.logits(student.model, torch.tensor([[5, 6, 7]])), logits)


def test_of_equal_losses_the_smallest_scale_is_best():
    assert best_scale({2.0: 0.5, 0.0: 0.7, 1.0: 0.5}) == 1.0
