import json
from dataclasses import replace

import pytest

from castlora.bench import speed
from castlora.bench.speed import Ratio, Shape, Workload, folding, side_by_side
from castlora.bench.speed_page import render_speed
from castlora.cli import main

TINY = Shape(layers=2, width=16, mlp=24, heads=2, vocabulary=40)


@pytest.fixture
def tiny(monkeypatch):
    """Every shape is small, and a training takes two steps."""
    monkeypatch.setattr(speed, "SHAPES", dict.fromkeys(speed.SHAPES, TINY))
    monkeypatch.setattr(speed, "_STEPS", 2)
    monkeypatch.setattr(speed, "_FEW_STEPS", 1)
    monkeypatch.setattr(speed, "_NEW_TOKENS", 2)


def test_ratios_are_taken_within_a_turn():
    ratio = Ratio("x", "one", "other", {"one": [2.0, 30.0, 4.0], "other": [1.0, 10.0, 4.0]}, 1.0)
    assert ratio.ratios == [2.0, 3.0, 1.0]
    assert ratio.median == 2.0


def test_functions_take_turns():
    called = []
    seconds = side_by_side({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, repeats=3)
    assert called[-6:] == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_both_sides_read_the_same_tokens(tiny, monkeypatch):
    pair = speed._make_pair(Workload(TINY, passages=8), seed=0)
    read = {"training": 0, "bare": 0}
    for model in (pair.source, pair.target):
        model.register_forward_pre_hook(
            lambda _module, _arguments, inputs: read.__setitem__(now, read[now] + inputs["input_ids"].numel()),
            with_kwargs=True,
        )
    teacher, student, plain = speed.LiveTeacher(pair.teacher, with_hidden=False), pair.student("factors"), pair.plain()
    now = "training"
    speed._train(pair, teacher, student)
    now = "bare"
    speed._bare_steps(pair, plain, pair.teacher)
    assert read["training"] == read["bare"] > 0


def test_the_unfolded_maps_write_what_the_folded_adapter_writes(tiny):
    pair = speed._make_pair(Workload(TINY, passages=8), seed=0)
    ids = speed.torch.tensor([pair.passages[0].target_ids])
    with speed.torch.no_grad():
        live, folded, bare = (model(ids).logits for model in (pair.unfolded(), pair.folded(), pair.target))
    speed.torch.testing.assert_close(live, folded, rtol=1e-4, atol=1e-4)
    assert not speed.torch.allclose(live, bare, atol=1e-3)


def test_the_record_is_rendered(tiny, tmp_path, capsys):
    out, page = tmp_path / "speed.json", tmp_path / "speed.md"
    main(["bench", "speed", "--out", str(out), "--page", str(page), "--repeats", "2"])
    record = json.loads(out.read_text())
    assert all(seconds > 0 for one in record["ratios"] for times in one["seconds"].values() for seconds in times)
    assert [one["measure"] for one in record["ratios"]] == ["serving"] * 2 + ["fit"] + ["distillation"] * 4
    assert {one["size"]: len(one["seconds"]) for one in record["growth"]} == dict.fromkeys(
        ("passages", "layers", "width", "rank"), 4
    )
    assert page.read_text() == render_speed(record)
    for one in record["ratios"]:
        assert f"| {one['of']} | {one['to']} | {one['median']:.2f} |" in page.read_text()


def test_maps_of_a_layer_are_counted():
    assert folding("zoo", 2, 2)["map_bytes_per_layer"] == 4 * (8 * 128**2 + 3 * (128**2 + 344**2))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"repeats": "1"}, "repeats is 1"), ({"page": "/nowhere/speed.md"}, "'/nowhere/speed.md' lies in no folder")],
)
def test_bad_settings_are_refused(tiny, tmp_path, capsys, options, said):
    settings = {"out": str(tmp_path / "speed.json"), "page": str(tmp_path / "speed.md")} | options
    with pytest.raises(SystemExit) as caught:
        main(["bench", "speed", *(word for key, value in settings.items() for word in (f"--{key}", value))])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_seed_decides_weights_and_text():
    work = replace(Workload(TINY), passages=4)
    one, same, other = (speed._make_pair(work, seed) for seed in (0, 0, 1))
    assert one.passages == same.passages != other.passages
