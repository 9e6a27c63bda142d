from dataclasses import replace

import pytest
import tiny
import torch

from castlora.adapters.live import attach_lora
from castlora.alignment.positions import align_passages, collate
from castlora.alignment.tokens import ByteTokenizer
from castlora.alignment.vocabulary import SharedVocabulary
from castlora.config import PAPER
from castlora.distillation import distill
from castlora.distillation.distill import (
    HeldOut,
    Student,
    check_objective,
    distillation_losses,
    measure_held_out,
    read_batch,
    shared_mass,
    total_loss,
)
from castlora.distillation.teacher import LiveTeacher, predict
from castlora.distillation.training import peak_learning_rate
from castlora.errors import UserError
from castlora.text.passages import Passage

ALL_PARTS = replace(PAPER, temperature=1.0, chunk_weight=0.5)
KL_ONLY = replace(PAPER, temperature=1.0, mse_weight=0.0)


def tokenizer(name: str) -> ByteTokenizer:
    return ByteTokenizer.from_tokenizer(tiny.family(name)[1])


def vocabulary(source: str, target: str) -> SharedVocabulary:
    sizes = [tiny.family(name)[0].vocab_size for name in (source, target)]
    return SharedVocabulary.of(tokenizer(source), tokenizer(target), *sizes)


def aligned(source: str, target: str, count: int = 6):
    passages = [Passage(sentence, 20 * (number % 2)) for number, sentence in enumerate(tiny.sentences(count))]
    return list(align_passages(passages, tokenizer(source), tokenizer(target), 48, 0.1))


def losses_on(teacher, pupil, batch, shared, recipe):
    live = LiveTeacher(teacher, pupil.hidden_head is not None)
    return distillation_losses(*read_batch(live, pupil, batch), batch, pupil.hidden_head, shared, recipe)


@pytest.fixture
def student(base_model):
    def make(name: str, teacher_hidden_size: int = 32, with_head: bool = False) -> Student:
        model = tiny.load(base_model(name))
        modules = [f"{tiny.LINEAR_MODULES[name][0]}"]
        return Student(attach_lora(model, modules, 4), model.config.hidden_size, teacher_hidden_size, with_head).eval()

    return make


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_identical_models_have_no_divergence(base_model, student, name):
    teacher, batch = tiny.load(base_model(name)), collate(aligned(name, name))
    losses = losses_on(teacher, student(name), batch, vocabulary(name, name), KL_ONLY)
    assert losses.keys() == {"kl"}
    assert abs(losses["kl"].item()) < 1e-6


def test_the_divergence_over_a_partial_vocabulary_is_zero_for_identical_models(base_model, student):
    teacher, batch = tiny.load(base_model("llama")), collate(aligned("llama", "llama"))
    ids, classes = torch.arange(200), torch.arange(309) % 100
    partial = SharedVocabulary(ids, ids, classes, classes, is_whole=False)
    losses = losses_on(teacher, student("llama"), batch, partial, ALL_PARTS)
    assert losses.keys() == {"kl", "chunk"}
    assert all(abs(loss.item()) < 1e-6 for loss in losses.values())


def test_all_parts_across_tokenizers(base_model, student):
    teacher, batch = tiny.load(base_model("llama")), collate(aligned("llama", "gpt2"))
    pupil = student("gpt2", with_head=True)
    losses = losses_on(teacher, pupil, batch, vocabulary("llama", "gpt2"), ALL_PARTS)
    assert losses.keys() == {"kl", "mse", "chunk"}
    assert all(loss.item() > 0 for loss in losses.values())
    expected = losses["kl"] + losses["mse"] + 0.5 * losses["chunk"]
    torch.testing.assert_close(total_loss(losses, ALL_PARTS), expected)
    total_loss(losses, ALL_PARTS).backward()
    assert {name for name, parameter in pupil.named_parameters() if parameter.grad is not None} == set(
        pupil.trainable()
    )
    assert "hidden_head.weight" in pupil.trainable()


@pytest.mark.parametrize(("source", "target"), [("llama", "gpt2"), ("gpt2", "phi3")])
def test_logits_of_prompts_are_left_out_without_a_change_of_the_losses(base_model, student, source, target):
    teacher = tiny.load(base_model(source))
    pupil = student(target, teacher.config.hidden_size, with_head=True)
    shared = vocabulary(source, target)
    whole = collate(aligned(source, target))
    is_answer = whole["target_positions"] > 12
    losses = []
    for least_weight in (0.0, 1e-12):
        batch = {**whole, "weights": whole["weights"].where(is_answer, least_weight * whole["weights"])}
        kept = predict(pupil.model, batch, "target").logits.shape[1]
        assert (
            kept < batch["target_ids"].shape[1] - 12 if least_weight == 0 else kept > batch["target_ids"].shape[1] - 3
        )
        losses.append(losses_on(teacher, pupil, batch, shared, ALL_PARTS))
    torch.testing.assert_close(*losses)
    assert all(loss > 0 for loss in losses[0].values())


def test_losses_of_one_passage_do_not_depend_on_its_padding(base_model, student):
    teacher, pupil = tiny.load(base_model("llama")), student("gpt2", with_head=True)
    passages = sorted(aligned("llama", "gpt2", 20), key=lambda passage: len(passage.source_ids))
    shared = vocabulary("llama", "gpt2")
    both = passages[0], passages[-1]
    counted = {"kl": [sum(one.weights) for one in both], "mse": [len(one.weights) for one in both]}
    alone = [losses_on(teacher, pupil, collate([passage]), shared, ALL_PARTS) for passage in both]
    together = losses_on(teacher, pupil, collate(both), shared, ALL_PARTS)
    for part, weights in counted.items():
        mean = sum(weight * one[part] for weight, one in zip(weights, alone, strict=True)) / sum(weights)
        torch.testing.assert_close(together[part], mean)


def test_hidden_states_are_compared_inside_prompts_where_predictions_are_not(base_model, student):
    teacher, pupil = tiny.load(base_model("llama")), student("gpt2", with_head=True)
    passages = [Passage(sentence, len(sentence) - 6) for sentence in tiny.sentences(4)]
    prompts = list(align_passages(passages, tokenizer("llama"), tokenizer("gpt2"), 48, context_weight=0.0))
    batch = collate(prompts)
    taught, learned = read_batch(LiveTeacher(teacher, with_hidden=True), pupil, batch)
    losses = distillation_losses(taught, learned, batch, pupil.hidden_head, vocabulary("llama", "gpt2"), ALL_PARTS)
    errors = []
    for row, one in enumerate(prompts):
        assert min(one.weights) == 0
        guessed = pupil.hidden_head(learned.hidden[row, one.target_positions])
        expected = taught.hidden[row, one.source_positions]
        errors.append((guessed - expected).square().sum(-1) / expected.square().sum(-1))
    torch.testing.assert_close(losses["mse"], torch.cat(errors).mean())
    assert learned.logits.shape[1] < learned.hidden.shape[1]


def test_temperature_keeps_the_scale_of_gradients(base_model, student):
    teacher, batch = tiny.load(base_model("phi3")), collate(aligned("phi3", "llama"))
    shared = vocabulary("phi3", "llama")
    pupil = student("llama")
    losses = [
        losses_on(teacher, pupil, batch, shared, replace(KL_ONLY, temperature=t))["kl"].item() for t in (100.0, 200.0)
    ]
    assert 0.95 < losses[0] / losses[1] < 1.05


def test_held_out_measures_of_identical_models(base_model, student):
    teacher = LiveTeacher(tiny.load(base_model("llama")), with_hidden=False)
    measured = measure_held_out(teacher, student("llama"), aligned("llama", "llama"), vocabulary("llama", "llama"),
                                replace(KL_ONLY, batch_size=2))  # fmt: skip
    assert isinstance(measured, HeldOut)
    assert abs(measured.kl) < 1e-6 and abs(measured.loss) < 1e-6
    assert measured.agreement == 1.0


def test_held_out_measures_of_different_models(base_model, student):
    teacher = LiveTeacher(tiny.load(base_model("llama")), with_hidden=False)
    measured = measure_held_out(teacher, student("gpt2"), aligned("llama", "gpt2"),
                                vocabulary("llama", "gpt2"), replace(KL_ONLY, batch_size=4))  # fmt: skip
    assert measured.kl > 0.1
    assert 0 <= measured.agreement < 1


def test_shared_mass_is_a_share(base_model, monkeypatch):
    model, passages = tiny.load(base_model("llama")), aligned("llama", "gpt2")
    shared = vocabulary("llama", "gpt2")
    mass = shared_mass(model, passages, "source", shared.source_ids)
    batch = collate(passages)
    probabilities = tiny.logits(model, batch["source_ids"]).softmax(-1)[..., shared.source_ids].sum(-1)
    expected = torch.cat([
        probabilities[row, one.source_positions] for row, one in enumerate(passages)
    ]).mean()  # fmt: skip
    assert mass == pytest.approx(float(expected), rel=1e-4)
    assert shared_mass(model, passages, "source", torch.arange(309)) == pytest.approx(1, rel=1e-4)
    with monkeypatch.context() as small:
        small.setattr(distill, "_HELD_OUT_BATCH", 2)
        read = []
        small.setattr(distill, "predict", lambda *given: read.append(len(given[1]["weights"])) or predict(*given))
        assert shared_mass(model, passages, "source", shared.source_ids) == pytest.approx(mass, rel=1e-4)
    assert max(read) == 2 and sum(read) == len(passages)


def test_an_objective_that_compares_nothing_is_refused():
    only_chunks = replace(KL_ONLY, kl_weight=0.0, chunk_weight=1.0)
    check_objective(vocabulary("llama", "gpt2"), only_chunks)
    with pytest.raises(UserError, match="chunk_weight compares different tokenizers, and these models have the same"):
        check_objective(vocabulary("llama", "phi3"), only_chunks)


def test_wider_models_and_smaller_batches_take_smaller_steps():
    rate = peak_learning_rate(KL_ONLY, 256)
    assert rate == KL_ONLY.learning_rate_scale / 256 and KL_ONLY.batch_size == 16
    assert peak_learning_rate(KL_ONLY, 1024) == pytest.approx(rate / 4)
    assert peak_learning_rate(replace(KL_ONLY, batch_size=4), 256) == pytest.approx(rate / 2)
    assert peak_learning_rate(KL_ONLY, 64) == peak_learning_rate(KL_ONLY, 32) < 4 * rate
