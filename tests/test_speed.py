import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from castlora.alignment.positions import collate
from castlora.bench.speed import models, run
from castlora.bench.speed.folding import fold_all
from castlora.bench.speed.growth import Size, sizes_of
from castlora.bench.speed.limits import Use, linear_weights
from castlora.bench.speed.measures import TEXTS, THINNED, SpeedSettings, served_models
from castlora.bench.speed.models import PairShape, Shape, Subject
from castlora.bench.speed.page import page
from castlora.bench.speed.run import MEASURES, run_speed
from castlora.bench.speed.steps import rehearse, teacher_and_student, time_steps
from castlora.bench.speed.timing import Clock, Ratio, Side, interleaved
from castlora.cli import main
from castlora.config import DEFAULT
from castlora.demonstration.bundle import SOURCE, TARGET, demo_models_path
from castlora.distillation.distill import distillation_losses, read_batch
from castlora.distillation.teacher import RecordedTeacher
from castlora.models.loading import skeleton

CPU = torch.device("cpu")
TINY = PairShape(Shape("llama", 16, 2, 2, 2, 24, 64), Shape("mistral", 24, 3, 2, 1, 32, 80))
SHAPES = dict(models.SHAPES)
SETTINGS = SpeedSettings(
    "zoo", seed=0, repeats=2, rank=2, length=12, batch_size=2, passages=4, doublings=2, threads=1
)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    monkeypatch.setitem(models.SHAPES, "zoo", TINY)
    monkeypatch.setattr(Size, "shape", tiny_size)
    monkeypatch.setattr(run, "best_device", lambda: CPU)


@pytest.fixture
def subject() -> Subject:
    return Subject.build(TINY, 2, 0, CPU)


def tiny_size(size: Size) -> PairShape:
    return PairShape(*(replace(one, layers=size.layers, width=size.width) for one in (TINY.source, TINY.target)))


@pytest.fixture
def folded_here(monkeypatch):
    """Folds in this process, at a tiny size in the place of 7B models."""
    monkeypatch.setitem(models.SHAPES, "7b", TINY)

    class Here:
        def __init__(self, **_options: object) -> None: ...
        def __enter__(self) -> "Here":
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, work: Callable[..., Any], *arguments: Any) -> Any:
            done = work(*arguments)
            return type("Done", (), {"result": staticmethod(lambda: done)})

    for measure in ("folding", "translating"):
        monkeypatch.setattr(f"castlora.bench.speed.{measure}.ProcessPoolExecutor", Here)


@pytest.mark.slow
def test_every_measure_leaves_comparable_numbers_and_the_page_shows_them(folded_here, tmp_path):
    run_speed(tmp_path / "out", SETTINGS)
    record = json.loads((tmp_path / "out" / "speed.json").read_text())
    for ratio in record["ratios"]:
        own, other = ratio["sides"]
        assert own["tokens"] == other["tokens"] > 0
        assert len(own["seconds"]) == len(other["seconds"]) >= SETTINGS.repeats
        assert min(own["seconds"] + other["seconds"]) > 0
        assert ratio["quartiles"][0] <= ratio["ratio"] <= ratio["quartiles"][1]
        assert (ratio["is_met"] is None) == (ratio["target"] is None)
    names = {(ratio["measure"], ratio["name"]) for ratio in record["ratios"]}
    teachers = ("runs", "recorded", "recorded, with rehearsal")
    assert names == {
        ("serving", "forward"), ("serving", "generation"), *(("fit", text) for text in (*TEXTS, THINNED)),
        *(("distillation step", f"teacher {how}, {text}") for how in teachers for text in TEXTS),
        ("joining sketches", "models that are sketched"), ("joining sketches", "from the start"),
    }  # fmt: skip
    for use in record["limits"]:
        assert use["tokens"] > 0 and min(use["seconds"]) > 0 and use["peak_bytes"] is None
        assert use["operations"] > 0 and use["share_of_limit"] > 0
    assert len(record["limits"]) == 5
    for folding in record["folding"]:
        assert folding["modules"] == 7 * TINY.target.layers and min(folding["seconds"]) > 0
        assert folding["peak_bytes"] >= folding["idle_bytes"] > 0
    for translation in record["translating"]:
        assert len(translation["seconds"]) >= 2 and min(translation["seconds"]) > 0
        assert translation["peak_bytes"] >= translation["idle_bytes"] > 0
    # Files of 16 bits: the maps of queries and values, and of the inputs that both read.
    per_layer = 16 * 24 + 24 * 16 + 12 * 16
    assert record["translating"][1]["maps_bytes"] == pytest.approx(2 * 3 * per_layer, abs=3 * 700)
    assert [(one["of"], one["against"]) for one in record["growth"]] == [
        (work, dimension) for dimension in ("tokens", "layers", "width", "rank") for work in ("fit", "step")
    ]
    for growth in record["growth"]:
        assert [after / before for before, after in zip(growth["sizes"], growth["sizes"][1:], strict=False)] == [
            2
        ] * SETTINGS.doublings
        assert len(growth["per_doubling"]) == SETTINGS.doublings and min(growth["seconds"] + growth["per_doubling"]) > 0
        assert (growth["beside_passes"] is None) == (growth["of"] == "fit")
    assert set(record["environment"]) == {"commit", "versions", "python", "machine", "device", "seconds"}
    assert record["settings"]["seed"] == 0
    shown = (tmp_path / "out" / "speed.md").read_text()
    assert shown == page(record) and shown.startswith("# Speed\n")
    for title in (
        "Serving",
        "Fit",
        "Distillation step",
        "Joining sketches",
        "Limits of the machine",
        "Folding",
        "Over a bridge",
        "Growth",
        "Environment",
    ):
        assert f"\n## {title}\n" in shown
    widths = {row.count("|") for row in shown.splitlines() if row.startswith("| a ")}
    assert widths == {7} and shown.count("\n| a ") == 8


def test_only_what_is_asked_for_is_measured(tmp_path):
    record = run_speed(tmp_path, SETTINGS, ["serving"])
    assert {ratio["measure"] for ratio in record["ratios"]} == {"serving"}
    assert record["limits"] == record["folding"] == record["translating"] == record["growth"] == []
    shown = (tmp_path / "speed.md").read_text()
    assert "## Serving" in shown and "## Fit" not in shown and "## Folding" not in shown


def test_the_served_models_differ_in_what_they_should_and_in_nothing_else(subject):
    transferred, plain, unfolded = served_models(subject)
    ids = torch.tensor([subject.passages(1, 12, "running text", 1)[0].target_ids])
    with torch.no_grad():
        folded, untrained, live, bare = (
            model(input_ids=ids, use_cache=False).logits for model in (transferred, plain, unfolded, subject.target)
        )
    torch.testing.assert_close(folded, live, rtol=1e-4, atol=1e-4)
    assert torch.equal(untrained, bare) and not torch.allclose(folded, bare, atol=1e-2)
    sizes = [
        sum(p.numel() for name, p in model.named_parameters() if "lora_" in name) for model in (transferred, plain)
    ]
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("text", TEXTS)
def test_passages_count_as_their_kind_says_and_every_part_of_the_objective_is_there(subject, text):
    passages = subject.passages(4, 16, text, 0)
    assert {len(passage.source_ids) for passage in passages} == {len(p.target_ids) for p in passages} == {16}
    for passage in passages:
        counted = sum(passage.weights)
        assert passage.weights[-1] == 1 and (counted == len(passage.weights) if text == TEXTS[1] else counted <= 2)
        assert passage.source_positions == sorted(set(passage.source_positions))
        assert passage.target_positions != passage.source_positions
    teacher, student = teacher_and_student(subject, 2)
    batch = collate(passages)
    taught, learned = read_batch(teacher, student, batch)
    losses = distillation_losses(taught, learned, batch, None, subject.shared, DEFAULT)
    assert losses.keys() == {"kl", "chunk"} and losses["kl"] > 0


def test_steps_train_and_their_bare_passes_do_not(subject):
    teacher, student = teacher_and_student(subject, 2)
    passages = subject.passages(8, 12, "answered prompts", 0)
    before = {name: parameter.clone() for name, parameter in student.trainable().items()}
    recorded = RecordedTeacher(teacher.model, passages, with_hidden=False)
    steps, passes = time_steps(recorded, student, subject, passages, 2, 0, Clock(CPU))
    assert len(steps) == len(passes) == 3
    trained = student.trainable()
    assert any(not torch.equal(trained[name], parameter) for name, parameter in before.items())
    assert all(parameter.grad is None for parameter in trained.values())


def test_a_step_rehearses_beside_every_fourth_passage(subject):
    teacher, student = teacher_and_student(subject, 2)
    passages = subject.passages(12, 12, "answered prompts", 0)
    recorded = RecordedTeacher(teacher.model, passages, with_hidden=False)
    rehearsal = rehearse(subject, student, seed=0)
    read: list[int] = []

    class Counted:
        def predict(self, batch):
            read.append(len(batch["target_ids"]))
            return rehearsal.bare.predict(batch)

    time_steps(recorded, student, subject, passages, 4, 0, Clock(CPU), replace(rehearsal, bare=Counted()))
    assert read == [1, 1, 1]


def test_all_works_take_turns():
    ran: list[str] = []
    works = {name: lambda name=name: ran.append(name) for name in ("a", "b", "c")}
    seconds = interleaved(Clock(CPU), works, 5)
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 5, "b": 5, "c": 5}
    rounds = [ran[start : start + 3] for start in range(0, 18, 3)]
    assert len(ran) == 18 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_ratios_of_seconds_and_of_rates_are_of_the_same_repetition():
    slow, quick = Side("slow", 10, [2.0, 4.0, 9.0]), Side("quick", 10, [1.0, 2.0, 3.0])
    seconds = Ratio("m", "n", slow, quick, of_rates=False, target=2.0).describe()
    assert (seconds["ratio"], seconds["quartiles"], seconds["is_met"]) == (2.0, [2.0, 2.5], True)
    rates = Ratio("m", "n", slow, quick, of_rates=True, target=0.6).describe()
    assert (rates["ratio"], rates["is_met"]) == (0.5, False)
    assert rates["sides"][0]["tokens_per_second"] == 2.5


def test_the_fold_at_the_size_of_7b_models_is_of_every_module(monkeypatch):
    monkeypatch.setitem(models.SHAPES, "7b", TINY)
    folding = fold_all("7b", 2, 0, 1, 1)
    assert (folding.modules, folding.rank, folding.threads, len(folding.seconds)) == (21, 2, 1, 1)
    assert folding.describe()["target"] == 30.0


@pytest.mark.parametrize("dimension", ["tokens", "layers", "width", "rank"])
def test_one_number_doubles_and_the_others_stay(dimension):
    numbers, sizes = zip(*sizes_of(dimension, 3), strict=True)
    field = "passages" if dimension == "tokens" else dimension
    assert [number // numbers[0] for number in numbers] == [1, 2, 4, 8]
    assert all(vars(size) == {**vars(Size()), field: number} for number, size in zip(numbers, sizes, strict=True))


def test_shapes_are_of_models_that_they_are_named_after():
    for name, shape in ((SOURCE, SHAPES["zoo"].source), (TARGET, SHAPES["zoo"].target)):
        bundled = AutoConfig.from_pretrained(demo_models_path() / name)
        fields = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size", "vocab_size")
        assert [getattr(shape.config(), field) for field in fields] == [getattr(bundled, field) for field in fields]
    shapes = [SHAPES["7b"].source, SHAPES["7b"].target, SHAPES["7b-13b"].target]
    counts = [skeleton(shape.config()).num_parameters() for shape in shapes]
    assert [round(count / 1e9, 1) for count in counts] == [6.7, 7.2, 13.0]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--measures", "magic"], f"Measure 'magic' is unknown; choose from {', '.join(MEASURES)}."),
        (["--repeats", "0"], "repeats is 0; give 1 or more."),
        (["--length", "4"], "length is 4; give 8 or more."),
        (["--seed", "-1"], "seed is -1; give a whole number"),
        (["--shape", "70b"], "--shape does not accept '70b'"),
    ],
)
def test_a_measurement_that_cannot_be_made_is_refused_and_nothing_is_written(
    options, complaint, tmp_path: Path, capsys
):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "speed", "--out", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_operations_are_those_of_the_matrices_that_every_token_meets(subject):
    width, neurons, vocabulary = TINY.source.width, TINY.source.neurons, TINY.source.vocabulary
    per_layer = 4 * width**2 + 3 * width * neurons
    assert linear_weights(subject.source) == TINY.source.layers * per_layer + vocabulary * width
    use = Use("pass", 10, 8e6, [2.0, 4.0, 6.0], None, 4e6).describe()
    assert (use["tokens_per_second"], use["share_of_limit"]) == (2.5, 0.5)
