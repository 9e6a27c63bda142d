from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from castlora import UserError, pipeline
from castlora.adapters.live import attach_lora
from castlora.alignment.positions import collate
from castlora.distillation import training
from castlora.distillation.rehearsal import BareTarget, measure_drift, rehearsed, write_passages
from castlora.distillation.teacher import RecordedTeacher, predict
from castlora.distillation.training import collate_lessons, lessons


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.family("llama")[1]


@pytest.fixture
def student(base_model) -> PeftModel:
    """A model with a LoRA that changes what it predicts."""
    torch.manual_seed(0)
    model = attach_lora(tiny.load(base_model("llama")), ["model.layers.0.self_attn.q_proj"], 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


class TestWriting:
    def test_passages_begin_as_texts_do_and_have_no_end_inside(self, base_model, tokenizer):
        model = tiny.load(base_model("llama"))
        written = write_passages(model, tokenizer, 70, 12, seed=0)
        assert len(written) == 70
        assert {ids[0] for ids in written} == {tokenizer.bos_token_id}
        assert max(map(len, written)) == 12
        assert not any(tokenizer.eos_token_id in ids[1:] for ids in written)

    def test_a_passage_ends_where_the_model_ends_it(self, base_model, tokenizer):
        model = tiny.load(base_model("llama"))
        seconds = Counter(token for ids in write_passages(model, tokenizer, 70, 12, seed=0) for token in ids[1:2])
        frequent, _ = seconds.most_common(1)[0]
        model.generation_config.eos_token_id = frequent
        written = write_passages(model, tokenizer, 70, 12, seed=0)
        assert 1 in map(len, written)
        assert not any(frequent in ids for ids in written)

    def test_the_seed_decides_what_is_written(self, base_model, tokenizer):
        model = tiny.load(base_model("llama"))
        first, again, other = (write_passages(model, tokenizer, 5, 12, seed) for seed in (1, 1, 2))
        assert first == again != other

    def test_a_penalty_that_a_model_was_saved_with_changes_nothing(self, base_model, tokenizer):
        model = tiny.load(base_model("llama"))
        written = write_passages(model, tokenizer, 20, 12, seed=0)
        model.generation_config.repetition_penalty = 5.0
        assert write_passages(model, tokenizer, 20, 12, seed=0) == written

    def test_without_a_token_that_begins_texts_any_token_does(self, base_model, tokenizer):
        bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
        assert bare.bos_token_id is None and bare.eos_token_id is None
        model = tiny.load(base_model("llama"))
        model.generation_config.eos_token_id = None
        assert len({ids[0] for ids in write_passages(model, bare, 70, 4, seed=0)}) > 20


class TestDrift:
    PASSAGES = tuple(rehearsed(ids) for ids in ([1, 5, 6, 7], [1, 9, 8], [1, 20, 30, 40, 50]))

    def test_an_update_that_is_switched_off_does_not_drift(self, student):
        with student.disable_adapter():
            assert measure_drift(BareTarget(student), student, self.PASSAGES) == pytest.approx(0, abs=1e-6)

    def test_it_is_the_divergence_from_the_bare_model_over_all_positions(self, student):
        nats = []
        for passage in self.PASSAGES:
            ids = torch.tensor([passage.target_ids])
            changed = student(input_ids=ids).logits[0].log_softmax(-1)
            with student.disable_adapter():
                bare = student(input_ids=ids).logits[0].log_softmax(-1)
            nats += (bare.exp() * (bare - changed)).sum(-1).tolist()
        assert len(nats) == 12
        assert measure_drift(BareTarget(student), student, self.PASSAGES) == pytest.approx(sum(nats) / 12, rel=1e-4)
        assert min(nats) >= 0 and max(nats) > 0.01

    def test_a_record_of_the_bare_target_is_the_bare_target(self, student):
        with student.disable_adapter():
            record = RecordedTeacher(student, self.PASSAGES, with_hidden=False)
        batch = collate(self.PASSAGES)
        counts = batch["weights"] > 0
        recorded, live = (bare.predict(batch).aligned(counts) for bare in (record, BareTarget(student)))
        torch.testing.assert_close(recorded, live)
        assert not torch.allclose(live, predict(student, batch, "target").aligned(counts))


class TestLessons:
    PASSAGES = tuple(rehearsed([number, number]) for number in range(10))
    OWN = (rehearsed([100]), rehearsed([101, 101, 101]))

    def test_every_fourth_passage_comes_with_the_next_of_the_target(self):
        ordered = lessons(self.PASSAGES, self.OWN)
        assert [lesson.passage for lesson in ordered] == list(self.PASSAGES)
        beside = {index: lesson.rehearsed.target_ids[0] for index, lesson in enumerate(ordered) if lesson.rehearsed}
        assert beside == {0: 100, 4: 101, 8: 100}

    def test_nothing_is_rehearsed_where_nothing_was_written(self):
        assert not any(lesson.rehearsed for lesson in lessons(self.PASSAGES, ()))

    def test_a_batch_keeps_both_kinds_apart(self):
        ordered = lessons(self.PASSAGES, self.OWN)
        both, none = collate_lessons(ordered[:5]), collate_lessons(ordered[1:4])
        assert both["passages"]["target_ids"].shape == (5, 2)
        assert both["rehearsed"]["target_ids"].tolist() == [[100, 0, 0], [101, 101, 101]]
        assert both["rehearsed"]["weights"].tolist() == [[1, 0, 0], [1, 1, 1]]
        assert none["passages"]["target_ids"].shape == (3, 2) and none["rehearsed"] == {}


def test_a_target_that_rehearses_drifts_less(quick_transfer):
    tuning = replace(tiny.SHORT, rehearsal_passages=64, learning_rate_scale=2.0)
    options = {"steps": 40, "start": "fresh"}
    free = quick_transfer("llama", "mistral", "free", tuning=replace(tuning, rehearsal_weight=0.0), **options)
    held = quick_transfer("llama", "mistral", "held", tuning=replace(tuning, rehearsal_weight=2.0), **options)
    assert 0 < held.manifest["losses"]["drift_after"] < 0.6 * free.manifest["losses"]["drift_after"]
    assert "rehearsal" not in free.log[1]
    for entry in held.log[1:]:
        assert entry["loss"] == pytest.approx(entry["kl"] + entry["chunk"] + 2 * entry["rehearsal"], rel=1e-3)


def test_a_run_measures_itself_at_every_tenth_of_its_steps(quick_transfer, monkeypatch):
    # With another scale, which is chosen when the training is over, the result would not be that of the last step.
    monkeypatch.setattr(pipeline, "TRAINED_SCALES", (1.0,))
    monkeypatch.setattr(training, "PASSAGES_PER_MEASURE", 8)
    result = quick_transfer("llama", "mistral", steps=20)
    measured = [entry["step"] for entry in result.log if "drift" in entry]
    assert measured == list(range(0, 21, 2))
    last, losses = result.log[-1], result.manifest["losses"]
    after = [losses[name] for name in ("drift_after", "kl_after", "agreement_after")]
    assert [last[name] for name in ("drift", "held_out_kl", "agreement")] == pytest.approx(after, rel=1e-4)
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "drift from the bare target on its own text, nats" in page
    assert page.count('<polyline class="line') == 7


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [(97, "reads 96 tokens; give --tuning.rehearsal-tokens 96 or less"), (1, "rehearsal_tokens is 1, and")],
)
def test_a_length_that_the_target_cannot_write_is_refused_first(quick_transfer, tmp_path, tokens, complaint):
    with pytest.raises(UserError, match=complaint):
        quick_transfer("llama", "mistral", tuning=replace(tiny.SHORT, rehearsal_tokens=tokens))
    assert not (tmp_path / "out").exists()
