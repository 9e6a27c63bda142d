"""Sketches of single models, and the bridges that they join into."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from preloaded import finish, launched, run_castlora
from safetensors.torch import load_file, save_file

from castlora import UserError, join, sketch, translate
from castlora.alignment.grid import draw_grid, on_grid_alone
from castlora.alignment.positions import align_passages
from castlora.alignment.tokens import ByteTokenizer
from castlora.bridge import commands, results
from castlora.bridge import join as joining
from castlora.bridge import sketch as sketching
from castlora.bridge.files import plan_bridge
from castlora.bridge.maps_file import read_fits
from castlora.maps.fitting import collect_moments
from castlora.maps.shared_maps import by_site, site_statistics, solve_maps
from castlora.text.passages import cut_passages, read_documents

SHORT = {"passages": 48, "passage_bytes": 90, "places": 10**6}


@pytest.fixture
def sketched(base_model, text_file, tmp_path):
    """Sketches a tiny model."""

    def make(model: str, out: str | None = None, **options) -> str:
        place = str(tmp_path / (out or f"sketch of {model}"))
        sketch(str(base_model(model)), place, **{"text": str(text_file), **SHORT, **options})
        return place

    return make


def files_in(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture
def without_models(monkeypatch):
    def forbid():
        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)

    return forbid


def test_the_grid_is_drawn_in_bytes_and_knows_no_tokenizer(base_model):
    text = "The fox finds the old mill behind the house."
    on_grid = draw_grid(len(text), passage=3, share=0.6, seed=1)
    assert (on_grid == draw_grid(len(text), passage=3, share=0.6, seed=1)).all()
    assert (on_grid != draw_grid(len(text), passage=4, share=0.6, seed=1)).any()
    assert 0.4 < on_grid.mean() < 0.8
    assert not draw_grid(100, 0, share=1.0, seed=0)[0]
    for family in ("llama", "gpt2"):
        encoded = ByteTokenizer.from_tokenizer(tiny.tokenizer_of(base_model(family))).encode(text)
        passage, ends = on_grid_alone(encoded, on_grid, max_length=10)
        assert len(passage.source_ids) == len(passage.target_ids) == 10
        assert passage.source_positions == passage.target_positions
        assert ends.tolist() == encoded.ends[passage.target_positions].tolist()
        wanted = {end for position, end in enumerate(encoded.ends.tolist()) if 0 < position < 10 and on_grid[end]}
        assert set(ends.tolist()) == wanted != set()


@pytest.mark.parametrize(("source", "target"), [("llama", "gpt2"), ("gpt2", "mistral"), ("phi3", "llama")])
def test_joined_sketches_give_the_maps_of_both_models_run_side_by_side(
    sketched, base_model, text_file, tmp_path, without_models, source, target
):
    places = sketched(source), sketched(target)
    passages = cut_passages(read_documents(str(text_file)), SHORT["passages"], SHORT["passage_bytes"], seed=0)
    assert len(passages) == 48
    models = [tiny.load(base_model(name)) for name in (source, target)]
    tokenizers = [ByteTokenizer.from_tokenizer(tiny.tokenizer_of(base_model(name))) for name in (source, target)]
    aligned = list(align_passages(passages, *tokenizers, max_length=tiny.CONTEXT, context_weight=1.0))
    plan = plan_bridge(str(base_model(source)), str(base_model(target)), None)
    kept = [passage for number, passage in enumerate(aligned) if number % 16]
    held_out = [passage for number, passage in enumerate(aligned) if number % 16 == 0]
    fitted, held = (collect_moments(*models, plan.pairing, some) for some in (kept, held_out))

    without_models()
    joined = join(*places, str(tmp_path / "joined"))
    found = tiny.maps_in(joined)
    assert json.loads((joined / "bridge.json").read_text())["positions"] == int(
        next(iter(fitted.inputs.values())).count
    )
    for site, pairs in by_site(plan.pairing):
        maps, fits = solve_maps(*(site_statistics(moments, site, pairs) for moments in (fitted, held)), ridge=0.1)
        (path,) = joined.glob(f"layer-{site[0]:03}-{site[2]}.*")
        written = read_fits(path)
        for name, tensor in maps.items():
            # Sketches hold 16 bits, and so do maps; of places paired otherwise nothing would be alike.
            assert (found[f"{path.stem} {name}"] - tensor).norm() <= 0.05 * tensor.norm(), (path.stem, name)
            assert written[name].explained == pytest.approx(fits[name].explained, abs=0.02)


def test_a_model_is_the_next_version_of_itself_and_its_adapters_stay_what_they_are(
    sketched, base_model, adapter, tmp_path
):
    place = sketched("llama")
    joined = join(place, place, str(tmp_path / "joined"))
    for name, tensor in tiny.maps_in(joined).items():
        torch.testing.assert_close(tensor, torch.eye(len(tensor)), atol=0.01, rtol=0, msg=name)
    (moved,) = translate(str(joined), [str(adapter("llama"))], str(tmp_path / "moved"), scale=1)
    ids = torch.tensor([tiny.tokenizer_of(base_model("llama"))("The fox finds the old mill.").input_ids])
    models = [tiny.load(base_model("llama"))] + [
        tiny.load_adapted(base_model("llama"), one) for one in (adapter("llama"), moved)
    ]
    bare, before, after = (tiny.logits(model, ids) for model in models)
    assert (after - before).norm() < 0.01 * (before - bare).norm()


def test_fewer_places_are_kept_where_fewer_are_asked_for(sketched, tmp_path):
    def kept(folder: str) -> int:
        return sum(len(load_file(path)["places"]) for path in (tmp_path / folder).rglob("places.safetensors"))

    sketched("gpt2", "all")
    sketched("gpt2", "some", places=200)
    assert kept("all") > 500
    # The tokens of the tiny tokenizer are not of four bytes.
    assert 60 < kept("some") < 500


def test_sketches_of_some_modules_join_in_those_that_both_have(sketched, tmp_path):
    some = sketched("gpt2", roles=["q", "up"])
    joined = join(sketched("llama"), some, str(tmp_path / "joined"))
    assert json.loads((joined / "bridge.json").read_text())["roles"] == ["q", "up"]
    names = {name.split(".")[-1] for name in tiny.maps_in(joined) if "from_source" in name}
    assert names == {"q", "fc"}
    others = sketched("llama", "others", roles=["v"])
    with pytest.raises(UserError, match=r"The sketches have v and q, up, none in common"):
        join(others, some, str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(sketched, tmp_path):
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        sketched("llama", name, seed=seed)
    first, again, other = (files_in(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != content for name, content in other.items())


def test_an_interrupted_sketch_goes_on_with_the_parts_that_it_lacks(sketched, tmp_path, monkeypatch):
    monkeypatch.setattr(sketching, "_PASSAGES_PER_PART", 10)
    sketched("llama", "whole")
    write, read = sketching.write_part, []

    def write_some(folder, *arguments):
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(folder.name)
        write(folder, *arguments)

    monkeypatch.setattr(sketching, "write_part", write_some)
    with pytest.raises(KeyboardInterrupt):
        sketched("llama", "stopped")
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == [".castlora"]
    with pytest.raises(UserError, match=r"interrupted run with other settings \(places\)"):
        sketched("llama", "stopped", places=7)
    with pytest.raises(UserError, match=r"has no sketch\.json"):
        join(str(tmp_path / "stopped"), str(tmp_path / "whole"), str(tmp_path / "joined"))
    read[:] = ["first one of the second run"]
    sketched("llama", "stopped")
    assert read[1:] == ["part-00003.unfinished", "part-00004.unfinished"]
    assert files_in(tmp_path / "stopped") == files_in(tmp_path / "whole")


def test_a_text_that_has_changed_since_a_sketch_was_interrupted_is_refused(sketched, text_file, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    as_it_was = text_file.read_bytes()
    text.write_bytes(as_it_was)
    with monkeypatch.context() as stopped:
        stopped.setattr(sketching, "write_part", lambda *_arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sketched("llama", "stopped", text=str(text))
    text.write_bytes(as_it_was[len(as_it_was) // 2 :])
    with pytest.raises(UserError, match="--text is not what it was when the run that this would continue began"):
        sketched("llama", "stopped", text=str(text))
    text.write_bytes(as_it_was)
    sketched("llama", "stopped", text=str(text))
    assert not (tmp_path / "stopped" / ".castlora").exists()


def test_an_interrupted_join_goes_on_with_the_sites_that_it_lacks(sketched, tmp_path, monkeypatch):
    places = sketched("llama"), sketched("gpt2")
    whole = files_in(join(*places, str(tmp_path / "whole")))
    solve, solved = results.solve_and_write, []

    def solve_some(path, *arguments):
        if len(solved) == 5:
            raise KeyboardInterrupt
        solved.append(path.name)
        solve(path, *arguments)

    monkeypatch.setattr(results, "solve_and_write", solve_some)
    with pytest.raises(KeyboardInterrupt):
        join(*places, str(tmp_path / "joined"))
    del solved[1:]
    of_model = Path(places[0]) / "sketch.json"
    as_it_was = of_model.read_text()
    of_model.write_text(as_it_was + " ")
    with pytest.raises(UserError, match="--source is not what it was when the run that this would continue began"):
        join(*places, str(tmp_path / "joined"))
    of_model.write_text(as_it_was)
    monkeypatch.setattr(
        results, "solve_and_write", lambda path, *given: solved.append(path.name) or solve(path, *given)
    )
    assert files_in(join(*places, str(tmp_path / "joined"))) == whole
    assert len(solved) == 1 + 12 - 5


def test_sketches_that_do_not_belong_together_or_are_damaged_are_refused(sketched, tmp_path, monkeypatch):
    whole = sketched("llama")
    sketched("gpt2", "gpt2")
    sketched("gpt2", "other grid", seed=1)
    for name in ("no part", "no numbers", "odd shape", "odd description", "no places"):
        shutil.copytree(tmp_path / "gpt2", tmp_path / name)
    (tmp_path / "no part" / "part-00000" / "layer-001-heads.safetensors").unlink()
    broken = tmp_path / "no numbers" / "part-00000" / "layer-002-mlp.safetensors"
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(broken).items()}, broken)
    short = tmp_path / "odd shape" / "part-00000" / "layer-000-attention.safetensors"
    save_file({name: tensor[1:] for name, tensor in load_file(short).items()}, short)
    description = json.loads((tmp_path / "odd description" / "sketch.json").read_text())
    (tmp_path / "odd description" / "sketch.json").write_text(json.dumps({**description, "parts": "all"}))
    save_file({"places": torch.zeros(3)}, tmp_path / "no places" / "part-00000" / "places.safetensors")
    for name, complaint in (
        ("nowhere", "has no sketch.json; give a folder that castlora sketch wrote"),
        ("other grid", r"sketches over different grids \(text_sha256\); make both with the same --text"),
        ("no part", "part-00000/layer-001-heads.safetensors of the sketch .* is missing or damaged"),
        ("no numbers", "part-00000/layer-002-mlp.safetensors .* holds NaN or infinity"),
        ("odd shape", r"part-00000/layer-000-attention.safetensors .*it has no inputs of \d+ places"),
        ("odd description", "sketch.json of .* is damaged"),
        ("no places", "part-00000/places.safetensors .*it has no places"),
    ):
        with pytest.raises(UserError, match=complaint):
            join(whole, str(tmp_path / name), str(tmp_path / "joined"))
        assert not (tmp_path / "joined").exists(), name
    # With every passage held out there is none to solve from.
    monkeypatch.setattr(joining, "_HELD_OUT_EVERY", 1)
    with pytest.raises(UserError, match="share too few places"):
        join(whole, str(tmp_path / "gpt2"), str(tmp_path / "joined"))
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"roles": ["w"]}, "roles has 'w'; choose from down, fc"),
        ({"roles": ["gate"]}, "has no module of the roles gate"),
        ({"passages": 0}, "passages is 0; give a number above 0"),
        ({"passages": 1}, "yields 1 passages, at least 2 are needed"),
        ({"passage_bytes": -1}, "passage_bytes is -1"),
        ({"places": 0}, "places is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"sharded": True}, "--sharded splits models among processes, and there is one"),
        ({"text": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(sketched, tmp_path, options, complaint):
    with pytest.raises(UserError, match=complaint):
        sketched("gpt2", "sketch", **options)
    assert not (tmp_path / "sketch").exists()


def test_a_penalty_below_zero_is_refused(sketched, tmp_path):
    place = sketched("llama")
    with pytest.raises(UserError, match=r"ridge is -1.0; give 0 or more"):
        join(place, place, str(tmp_path / "joined"), ridge=-1.0)
    assert not (tmp_path / "joined").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["false", "true"])
def test_two_processes_sketch_what_one_sketches(sketched, base_model, text_file, tmp_path, sharded):
    alone = sketched("llama", "alone", passages=600)
    words = ["sketch", "--model", base_model("llama"), "--text", text_file, "--passages", 600]
    words += ["--passage-bytes", 90, "--places", 10**6, "--out", tmp_path / "together", "--sharded", sharded]
    finish(launched(tmp_path / "said", 2, run_castlora, *words))
    assert files_in(tmp_path / "together") == files_in(tmp_path / alone)


@pytest.mark.parametrize(("command", "function"), [(commands._sketch, sketch), (commands._join, join)])
def test_the_commands_take_what_the_library_takes(command, function):
    taken = [
        [(name, one.default) for name, one in inspect.signature(taker).parameters.items()]
        for taker in (command, function)
    ]
    assert taken[0] == taken[1]


def test_parts_without_a_place_are_kept_as_such(sketched, tmp_path, monkeypatch):
    monkeypatch.setattr(sketching, "_PASSAGES_PER_PART", 4)
    sketched("llama", "few", places=3)
    counts = [len(load_file(path)["places"]) for path in sorted((tmp_path / "few").rglob("places.safetensors"))]
    assert len(counts) == 12 and 0 in counts and sum(counts) > 0
    for path in (tmp_path / "few").rglob("layer-*.safetensors"):
        number = int(path.parent.name.split("-")[1])
        assert {len(tensor) for tensor in load_file(path).values()} == {counts[number]}
