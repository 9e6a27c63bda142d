import random
from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch

from castlora import stages
from castlora.adapters.live import student_factors
from castlora.alignment.positions import AlignedPassage, collate
from castlora.config import DEFAULT
from castlora.distillation.training import measuring_steps, reading_order
from castlora.errors import UserError
from castlora.model_pair import HELD_OUT_PASSAGES, align_text, load_models
from castlora.plan import plan_transfer
from castlora.stages import StartLoss, hold_teacher, passages_to_rehearse, start_student, text_of_start
from castlora.teaching import curriculum
from castlora.teaching.curriculum import (
    TextSource,
    choose_prompts,
    draw_text,
    keep_whole_answers,
    prompt_formats,
    teach_text,
)
from castlora.text.passages import GENERIC_FORMATS, SLOT, Passage

LENGTHS = random.Random(0).choices(range(5, 60), k=96)
PASSAGES = [AlignedPassage([number] * length, [0], [0], [0], [1.0]) for number, length in enumerate(LENGTHS)]
FORMAT = "Who? {text} Answer:"


def first_ids(passages: list[AlignedPassage]) -> list[int]:
    return [passage.source_ids[0] for passage in passages]


def padded_tokens(passages: list[AlignedPassage], batch_size: int) -> int:
    batches = (passages[start : start + batch_size] for start in range(0, len(passages), batch_size))
    return sum(len(batch) * max(len(passage.source_ids) for passage in batch) for batch in batches)


def test_every_passage_is_read_once_before_any_is_read_again():
    order = first_ids(reading_order(PASSAGES, 2 * 96 + 10, 8, seed=0))
    assert sorted(order[:96]) == sorted(order[96:192]) == list(range(96))
    assert order[:96] != order[96:192]
    assert len(order) == 2 * 96 + 10


def test_the_order_depends_on_the_seed_alone():
    first, again, other = (first_ids(reading_order(PASSAGES, 96, 8, seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_passages_of_like_length_stand_together():
    ordered = reading_order(PASSAGES, 96, 8, seed=0)
    assert padded_tokens(ordered, 8) < 1.25 * sum(LENGTHS) < padded_tokens(PASSAGES, 8)


def test_fewer_passages_than_a_batch_will_do():
    assert Counter(first_ids(reading_order(PASSAGES[:3], 9, 8, seed=0))) == Counter({0: 3, 1: 3, 2: 3})


def test_a_start_reads_the_first_passages_alone_with_little_padding(monkeypatch):
    monkeypatch.setattr(stages, "STATISTICS_PASSAGES", 64)
    read = text_of_start(PASSAGES)
    assert sorted(first_ids(read)) == list(range(64))
    assert padded_tokens(read, 16) < 1.25 * sum(LENGTHS[:64]) < padded_tokens(PASSAGES[:64], 16)


@pytest.mark.parametrize(
    ("steps", "batch_size", "start", "weight", "written"),
    [
        (1000, 16, "fresh", 0.1, 512),
        (50, 4, "ridge", 0.1, 50),
        (5, 2, "ridge", 0.1, 3),
        (0, 4, "ridge", 0.1, 0),
        (0, 4, "readout", 0.1, 256),
        (50, 4, "readout", 0.0, 0),
    ],
)
def test_the_target_writes_no_more_than_is_rehearsed(steps, batch_size, start, weight, written):
    recipe = replace(DEFAULT, steps=steps, batch_size=batch_size, start=start, rehearsal_weight=weight)
    assert passages_to_rehearse(recipe) == written


@pytest.mark.parametrize(
    ("steps", "batch_size", "apart"),
    [(1000, 16, 100), (300, 16, 30), (250, 4, 25), (50, 4, 16), (20, 4, 16), (3, 4, 3)],
)
def test_short_trainings_are_measured_less_often(steps, batch_size, apart):
    assert measuring_steps(replace(DEFAULT, steps=steps, batch_size=batch_size)) == apart


@pytest.fixture(scope="module")
def loaded_models(base_model, adapter):
    return load_models(plan_transfer(str(adapter("llama")), str(base_model("gpt2")), str(base_model("llama"))))


def test_a_prompt_format_yields_more_candidates_than_are_kept(loaded_models, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(tiny.sentences(400)))
    recipe = replace(DEFAULT, filled_passages=30, candidates=3, sentences=1)
    drawn = draw_text(loaded_models, TextSource(str(text)), [FORMAT], recipe, seed=0)
    assert len(drawn) == 3 * (30 + HELD_OUT_PASSAGES)
    chosen = choose_prompts(loaded_models, drawn, recipe)
    assert len(chosen) == 30 + HELD_OUT_PASSAGES
    assert set(chosen) < set(drawn)
    assert [passage for passage in drawn if passage in chosen] == chosen


@pytest.mark.parametrize(("share", "leaves_out"), [(0.95, True), (0.85, False)])
def test_answers_that_were_cut_are_left_out_where_answers_end(loaded_models, monkeypatch, share, leaves_out):
    def measured(model, tokenizer, groups, ends, longest):
        assert {prompt for group in groups for prompt in group.passages} == set(asked)
        assert ends == loaded_models.shared.source_ends and longest == DEFAULT.answer_tokens
        return share

    asked = [Passage(f"Who finds the {noun}?", 12) for noun in tiny.NOUNS]
    monkeypatch.setattr(curriculum, "share_that_ends", measured)
    whole, cut = Passage("Who? The fox.", 4), Passage("Who? The fox who", 4, is_cut=True)
    kept = keep_whole_answers(loaded_models, asked, [cut, whole], DEFAULT)
    assert kept == ([whole] if leaves_out else [cut, whole])


def test_where_no_answer_was_cut_nothing_is_asked_again(loaded_models, monkeypatch):
    monkeypatch.setattr(curriculum, "share_that_ends", lambda *_: pytest.fail("asked again"))
    answered = [Passage("Who? The fox.", 4), Passage("Who? The hen.", 4)]
    assert keep_whole_answers(loaded_models, answered, answered, DEFAULT) == answered


def test_with_one_candidate_per_prompt_nothing_is_chosen(loaded_models, text_file):
    recipe = replace(DEFAULT, filled_passages=30, candidates=1)
    drawn = draw_text(loaded_models, TextSource(str(text_file)), [FORMAT], recipe, seed=0)
    assert choose_prompts(loaded_models, drawn, recipe) == drawn


def test_without_a_format_general_text_is_put_into_generic_ones(loaded_models, text_file):
    recipe = replace(DEFAULT, filled_passages=16, candidates=2, format_candidates=0)
    formats = prompt_formats(loaded_models, TextSource(str(text_file)), recipe, seed=0)
    assert formats == GENERIC_FORMATS
    drawn = draw_text(loaded_models, TextSource(str(text_file)), formats, recipe, seed=0)
    prompts = [passage.text for passage in drawn]
    for form in GENERIC_FORMATS:
        before, after = form.split(SLOT)
        assert sum(prompt.startswith(before) and prompt.endswith(after) for prompt in prompts) >= len(prompts) // 8
    assert all(passage.answer_start == len(passage.text.encode()) for passage in drawn)
    # Prompts that are too long for these models are no candidates.
    assert 0 < len(choose_prompts(loaded_models, drawn, recipe)) < 16 + HELD_OUT_PASSAGES


@pytest.mark.parametrize(
    ("known", "formats"),
    [
        (dict(prompt_format=FORMAT), (FORMAT,)),
        (dict(chat=True), (SLOT,)),
        (dict(prompts="prompts.txt"), ()),
        (dict(prompts="prompts.txt", chat=True), ()),
    ],
)
def test_what_is_known_of_the_prompts_is_not_searched_for(known, formats):
    assert tuple(prompt_formats(None, TextSource("no-such-file.txt", **known), DEFAULT, seed=0)) == formats


def test_without_written_answers_general_text_is_read_as_it_runs_and_never_chosen_from(loaded_models, text_file):
    recipe = replace(DEFAULT, passages=30, filled_passages=10, write_answers=False)
    assert prompt_formats(loaded_models, TextSource(str(text_file)), recipe, seed=0) == ()
    drawn = draw_text(loaded_models, TextSource(str(text_file)), (), recipe, seed=0)
    assert drawn
    assert all(isinstance(passage, Passage) and passage.answer_start == 0 for passage in drawn)
    assert all(passage.is_general for passage in drawn)
    assert teach_text(loaded_models, TextSource(str(text_file)), (), recipe, seed=0) == drawn


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (TextSource("no-such-file.txt"), "no-such-file.txt"),
        (TextSource(prompt_format="Question:"), "--prompt-format has no {text} slot"),
        (TextSource(prompts="no-such-prompts.txt"), "no-such-prompts.txt"),
        (TextSource(prompts="prompts.txt", prompt_format=FORMAT), "give one of them"),
    ],
)
def test_text_that_cannot_be_had_is_named_before_a_model_is_loaded(source, complaint):
    with pytest.raises(UserError) as error:
        source.check()
    assert complaint in str(error.value)


def test_text_that_prompts_make_useless_is_pointed_out(tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("Question: why?\nAnswer:\n")
    TextSource(text="corpus.txt", prompts=str(tmp_path / "prompts.txt")).check()
    assert "'corpus.txt' is not read" in caplog.text


def test_maps_whose_fold_no_engine_accepts_are_refused_and_other_starts_are_cut(base_model, adapter):
    big = str(adapter("llama", ("q_proj", "k_proj", "v_proj"), r=64))
    plan = plan_transfer(big, str(base_model("gpt2")), str(base_model("llama")))
    with pytest.raises(
        UserError, match="need rank 192, above 128, the largest that all serving engines accept; give --start fresh"
    ):
        plan.rank(replace(DEFAULT, start="ridge", trained="maps"), None)
    assert plan.rank(replace(DEFAULT, start="ridge"), None) == 128
    assert plan.rank(replace(DEFAULT, start="fresh"), None) == 64


def test_a_start_of_too_large_a_rank_is_cut_to_the_best_of_the_rank_that_is_written(base_model, adapter, caplog):
    plan = plan_transfer(str(adapter("llama", ("up_proj",))), str(base_model("mistral")), str(base_model("llama")))
    models = load_models(plan)
    texts = [Passage(text) for text in tiny.sentences(12)]
    recipe = replace(DEFAULT, max_length=48, context_weight=1.0)
    training, _ = align_text(models, texts, recipe)
    with caplog.at_level("INFO", logger="castlora"):
        student, loss = start_student(models, plan, recipe, training, 8, seed=0)
    whole = student_factors(student.model, plan.target_modules)
    assert loss == StartLoss(0.0, 0.0)
    assert "is lost" not in caplog.text
    models = load_models(plan)
    with caplog.at_level("INFO", logger="castlora"):
        student, loss = start_student(models, plan, recipe, training, 2, seed=0)
    cut = student_factors(student.model, plan.target_modules)
    lost = kept = 0.0
    for name, lora in whole.items():
        delta = lora.b @ lora.a
        difference = (delta - cut[name].b @ cut[name].a).square().sum()
        torch.testing.assert_close(difference, torch.linalg.svdvals(delta)[2:].square().sum(), rtol=1e-2, atol=1e-6)
        lost, kept = lost + float(difference), kept + float(delta.square().sum())
    share = 100 * (lost / kept) ** 0.5
    assert share > 1
    assert loss == StartLoss(0.0, pytest.approx(share / 100, rel=1e-3))
    assert f"The update is cut from rank 4 to 2: {share:.1f} % of its norm is lost." in caplog.text


def test_the_teacher_has_what_the_adapter_trains_beyond_maps(base_model, tmp_path):
    base, ids = base_model("llama"), torch.tensor([[5, 6, 7]])
    extra = tiny.save_adapter(tmp_path, base, ("q_proj",), modules_to_save=["lm_head"])
    without = tiny.logits(extra, ids)
    with torch.no_grad():
        extra.get_base_model().lm_head.modules_to_save["default"].weight.mul_(-1)
    extra.save_pretrained(tmp_path)
    models = load_models(plan_transfer(str(tmp_path), str(base_model("gpt2")), str(base)))
    torch.testing.assert_close(tiny.logits(models.teacher, ids), -without)
    assert models.target.config.model_type == "gpt2"


@pytest.mark.parametrize(("limit", "readings"), [(1 << 30, 0), (0, 3)], ids=["remembered", "too much to remember"])
def test_held_out_text_is_read_once_where_memory_allows(loaded_models, monkeypatch, limit, readings):
    monkeypatch.setattr(stages, "record_limit", lambda _model: limit)
    passages = tiny.aligned("llama", "gpt2", 40)
    teacher, of_held_out = hold_teacher(loaded_models, passages[:32], passages[32:], replace(DEFAULT, steps=1))
    reads = []
    handle = loaded_models.source.register_forward_hook(lambda *_: reads.append("source"))
    batch = collate(passages[32:])
    counted = batch["weights"] > 0
    held_out = [of_held_out.predict(batch).aligned(counted) for _ in range(3)]
    live = teacher.predict(batch).aligned(counted)
    handle.remove()
    assert len(reads) == readings + 1
    for one in held_out:
        torch.testing.assert_close(one, live)
