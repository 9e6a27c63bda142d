from dataclasses import replace

import pytest
import tiny
import torch

from castlora.adapters.live import attach_lora
from castlora.alignment.positions import AlignedPassage, align_passages, collate
from castlora.alignment.tokens import ByteTokenizer
from castlora.alignment.vocabulary import SharedVocabulary
from castlora.config import DEFAULT, PAPER
from castlora.distillation.distill import Student, distillation_losses, read_batch
from castlora.distillation.teacher import LiveTeacher, RecordedTeacher, record_bytes, record_limit
from castlora.text.passages import Passage


def tokenizer(name: str) -> ByteTokenizer:
    return ByteTokenizer.from_tokenizer(tiny.family(name)[1])


@pytest.fixture
def passages() -> list[AlignedPassage]:
    """Prompts with answers, running text, and one text whose answer begins at two places."""
    texts = list(tiny.sentences(40))
    made = [Passage(text, 25 if number % 3 else 0) for number, text in enumerate(texts)]
    made += [Passage(texts[1], 10), Passage(texts[2], 40)]
    return list(align_passages(made, tokenizer("llama"), tokenizer("gpt2"), 48, 0.0))


@pytest.mark.parametrize("recipe", [DEFAULT, PAPER], ids=["default", "paper"])
def test_a_record_teaches_what_the_model_teaches(base_model, passages, recipe):
    model, with_hidden = tiny.load(base_model("llama")), recipe.mse_weight > 0
    target = tiny.load(base_model("gpt2"))
    student = Student(attach_lora(target, ["transformer.h.0.attn.c_attn"], 4), 32, 32, with_hidden).eval()
    sizes = (tiny.family(name)[0].vocab_size for name in ("llama", "gpt2"))
    shared = SharedVocabulary.of(tokenizer("llama"), tokenizer("gpt2"), *sizes)
    teachers = LiveTeacher(model, with_hidden), RecordedTeacher(model, passages, with_hidden)
    for start in range(0, len(passages), 6):
        batch = collate(passages[start : start + 6])
        losses = [
            distillation_losses(*read_batch(teacher, student, batch), batch, student.hidden_head, shared, recipe)
            for teacher in teachers
        ]
        assert losses[0].keys() == losses[1].keys()
        torch.testing.assert_close(*losses)
        assert all(loss > 0 for loss in losses[1].values())


def test_a_record_outlives_the_model(base_model, passages):
    model = tiny.load(base_model("llama"))
    teacher, batch = RecordedTeacher(model, passages, with_hidden=False), collate(passages[:5])
    expected = LiveTeacher(model, with_hidden=False).predict(batch)
    for parameter in model.parameters():
        parameter.data.zero_()
    counts = batch["weights"] > 0
    torch.testing.assert_close(teacher.predict(batch).aligned(counts), expected.aligned(counts))


def test_text_that_was_not_recorded_is_not_made_up(base_model, passages):
    teacher = RecordedTeacher(tiny.load(base_model("llama")), passages[:-1], with_hidden=False)
    stranger = replace(passages[0], source_ids=passages[0].source_ids[:-1])
    with pytest.raises(KeyError):
        teacher.predict(collate([stranger]))


@pytest.mark.parametrize(
    ("with_hidden", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)]
)
def test_the_memory_of_a_record_is_known_beforehand(base_model, passages, with_hidden, dtype):
    different = list({tuple(one.source_ids): one for one in passages[:-2]}.values())
    model = tiny.load(base_model("llama")).to(dtype)
    teacher = RecordedTeacher(model, different, with_hidden)
    tensors = [tensor for record in teacher.records.values() for tensor in (record.logits, record.hidden)]
    assert sum(tensor.nbytes for tensor in tensors) == record_bytes(model, different, with_hidden)


def test_a_record_may_be_as_large_as_its_model(base_model):
    model = tiny.load(base_model("llama"))
    assert record_limit(model) == 1 << 30
    model.register_buffer("ballast", torch.empty(3 << 28, dtype=torch.float32, device="meta"))
    assert record_limit(model) > 3 << 30
