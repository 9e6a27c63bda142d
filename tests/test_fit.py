"""Fitting a bridge, as a whole, in shards and in several processes."""

import inspect
import json
import shutil

import pytest
import tiny
import torch
from preloaded import finish, launched, run_castlora
from safetensors.torch import load_file

from castlora import UserError, fit, merge_statistics
from castlora.bridge import commands, results
from castlora.bridge import fit as fitting
from castlora.bridge.maps_file import read_fits
from castlora.maps import fitting as statistics

SHORT = {"passages": 40, "max_length": 48}


@pytest.fixture
def bridge(base_model, text_file, tmp_path):
    """Fits between two tiny models."""

    def run(source: str, target: str, out: str = "bridge", **options):
        places = [str(base_model(source)), str(base_model(target)), str(tmp_path / out)]
        return fit(*places, **{"text": str(text_file), **SHORT, **options})

    return run


def test_a_model_is_the_next_version_of_itself(bridge):
    found = bridge("llama", "llama")
    maps = tiny.maps_in(found)
    assert len(maps) == 3 * (4 + 7)
    for name, tensor in maps.items():
        torch.testing.assert_close(tensor, torch.eye(len(tensor)), atol=0.01, rtol=0, msg=name)
    fits = [one for path in found.glob("layer-*") for one in read_fits(path).values()]
    assert all(one.is_anchored and one.explained > 0.999 for one in fits)


def test_maps_are_solved_from_as_many_places_as_asked_for(bridge):
    described, maps = [], []
    for number, places in enumerate((100_000, 10_000, 150)):
        found = bridge("llama", "gpt2", f"{places}", places=places)
        described.append(json.loads((found / "bridge.json").read_text()))
        maps.append(tiny.maps_in(found))
        assert described[number]["places"] == places
    # There are no ten thousand.
    assert all(torch.equal(maps[0][name], maps[1][name]) for name in maps[0])
    assert described[0]["positions"] == described[1]["positions"] > 400 and 100 < described[2]["positions"] < 200
    assert all(not torch.equal(maps[0][name], maps[2][name]) for name in maps[0])


def test_what_is_written_says_what_it_is(bridge, base_model, text_file):
    found = bridge("llama", "gpt2", roles=["q", "v"], seed=5)
    description = json.loads((found / "bridge.json").read_text())
    assert description["source"] == str(base_model("llama"))
    assert description["roles"] == ["q", "v"]
    assert description["text"] == text_file.name
    assert description["positions"] > 400
    assert {path.name for path in found.iterdir()} == {
        "README.md", "bridge.json", "source", "target", *(f"layer-00{n}-attention.safetensors" for n in range(3))
    }  # fmt: skip
    assert set(load_file(found / "layer-002-attention.safetensors")) == {
        "to_source", "from_source.transformer.h.2.attn.c_attn.q", "from_source.transformer.h.2.attn.c_attn.v"
    }  # fmt: skip
    assert json.loads((found / "target" / "config.json").read_text())["model_type"] == "gpt2"
    card = (found / "README.md").read_text()
    assert "# Bridge from `llama` to `gpt2`" in card
    assert "| modules | q, v |" in card
    assert str(base_model("llama").parent) not in card


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(bridge):
    first, again, other = (
        bridge("llama", "gpt2", "1"),
        bridge("llama", "gpt2", "2"),
        bridge("llama", "gpt2", "3", seed=1),
    )
    for path in sorted(first.glob("layer-*")):
        assert path.read_bytes() == (again / path.name).read_bytes()
        assert path.read_bytes() != (other / path.name).read_bytes()


def test_shards_add_up_to_the_whole_in_any_order(bridge, tmp_path):
    whole = tiny.maps_in(bridge("llama", "gpt2", "whole"))
    shards = [bridge("llama", "gpt2", f"shard {number}", shard=f"{number}/3") for number in (1, 2, 3)]
    places = list(map(str, shards))
    merged = merge_statistics(places, str(tmp_path / "merged"))
    again = merge_statistics(places[::-1], str(tmp_path / "again"))
    for path in merged.glob("layer-*"):
        assert path.read_bytes() == (again / path.name).read_bytes()
    found = tiny.maps_in(merged)
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        # Passages are batched otherwise, and files hold 16 bits.
        assert (found[name] - tensor).norm() <= 0.01 * tensor.norm(), name
    summed = json.loads((merged / "bridge.json").read_text())
    assert summed["shard"] is None
    assert summed["positions"] == json.loads((tmp_path / "whole" / "bridge.json").read_text())["positions"]
    explained = [
        {name: one.explained for path in folder.glob("layer-*") for name, one in read_fits(path).items() if "." in name}
        for folder in (merged, tmp_path / "whole")
    ]
    assert len(explained[0]) == 3 * 6
    assert explained[0] == pytest.approx(explained[1], abs=0.01)


def test_shards_that_are_not_all_of_one_fit_are_refused(bridge, tmp_path):
    first, second = (str(bridge("llama", "gpt2", f"shard {number}", shard=f"{number}/2")) for number in (1, 2))
    other = str(bridge("llama", "gpt2", "other", shard="2/2", seed=1))
    whole = str(bridge("llama", "gpt2", "whole"))
    damaged = tmp_path / "damaged"
    shutil.copytree(second, damaged)
    (damaged / "layer-001-mlp.safetensors").write_bytes(b"")
    odd = tmp_path / "odd"
    shutil.copytree(second, odd)
    description = json.loads((odd / "statistics.json").read_text())
    (odd / "statistics.json").write_text(json.dumps({**description, "ridge": 10**400}))
    for shards, complaint in (
        ([first], "Shard 2 of 2 is missing"),
        ([first, second, second], "Shard 2 is given 2 times"),
        ([first, other], r"shards of different fits \(seed\)"),
        ([first, whole], "has no statistics.json"),
        ([first, str(damaged)], "layer-001-mlp.safetensors of .*damaged.* is missing or damaged"),
        ([first, str(odd)], "statistics.json of .*odd.* is damaged"),
        ([], "No shard is named"),
    ):
        with pytest.raises(UserError, match=complaint):
            merge_statistics(shards, str(tmp_path / "merged"))
        assert not (tmp_path / "merged").exists(), complaint


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"shard": "3"}, "shard is '3'; give NUMBER/COUNT"),
        ({"shard": "3/2"}, "shard is '3/2'"),
        ({"shard": "0/2"}, "shard is '0/2'"),
        ({"shard": "1/65"}, "at most 64 shards"),
        ({"shard": "1/50"}, "give fewer shards or more text"),
        ({"roles": ["q", "w"]}, "roles has 'w'; choose from down, fc"),
        ({"roles": ["gate"]}, "has a partner in the target"),
        ({"max_length": 97}, "max_length is 97; give a number from 2 to 96"),
        ({"passages": 0}, "passages is 0; give a number above 0"),
        ({"places": 0}, "places is 0; give a number above 0"),
        ({"places": 0.001}, r"places is 0\.001, too few of \d+; give several times the width"),
        ({"ridge": -1.0}, "ridge is -1.0; give 0 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"text": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(bridge, tmp_path, options, complaint):
    with pytest.raises(UserError, match=complaint):
        bridge("llama", "gpt2", **options)
    assert not (tmp_path / "bridge").exists()


def test_an_interrupted_fit_goes_on_with_the_sites_that_it_lacks(bridge, tmp_path, monkeypatch):
    whole = tiny.maps_in(bridge("llama", "gpt2", "whole"))
    monkeypatch.setattr(fitting, "memory_beside", lambda *_arguments: 1)
    solve, kept = results.solve_maps, []

    def solve_some(*arguments):
        if len(kept) == 5:
            raise KeyboardInterrupt
        kept.append(arguments)
        return solve(*arguments)

    monkeypatch.setattr(results, "solve_maps", solve_some)
    with pytest.raises(KeyboardInterrupt):
        bridge("llama", "gpt2")
    assert [path.name for path in (tmp_path / "bridge").iterdir()] == [".castlora"]
    with pytest.raises(UserError, match=r"interrupted run with other settings \(ridge\)"):
        bridge("llama", "gpt2", ridge=0.5)
    kept.clear()
    read = []
    collect = statistics.collect_moments
    monkeypatch.setattr(
        fitting, "collect_moments", lambda *given, **also: read.append(given) or collect(*given, **also)
    )
    monkeypatch.setattr(results, "solve_maps", solve)
    found = tiny.maps_in(bridge("llama", "gpt2"))
    # Twelve sites, five of which were kept; each is read for text to solve from and for held-out text.
    assert len(read) == 2 * (12 - 5)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_a_text_that_has_changed_since_a_fit_was_interrupted_is_refused(bridge, text_file, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    as_it_was = text_file.read_bytes()
    text.write_bytes(as_it_was)
    with monkeypatch.context() as stopped:
        stopped.setattr(results, "solve_maps", lambda *_arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bridge("llama", "gpt2", "stopped", text=str(text))
    text.write_bytes(as_it_was[len(as_it_was) // 2 :])
    with pytest.raises(UserError, match="--text is not what it was when the run that this would continue began"):
        bridge("llama", "gpt2", "stopped", text=str(text))
    text.write_bytes(as_it_was)
    bridge("llama", "gpt2", "stopped", text=str(text))
    assert not (tmp_path / "stopped" / ".castlora").exists()


@pytest.mark.slow
def test_two_processes_fit_what_one_fits(bridge, base_model, text_file, tmp_path):
    alone = tiny.maps_in(bridge("llama", "gpt2"))
    words = ["fit", "--source", base_model("llama"), "--target", base_model("gpt2"), "--text", text_file]
    words += ["--passages", 40, "--max-length", 48, "--out", tmp_path / "together"]
    finish(launched(tmp_path / "said", 2, run_castlora, *words))
    together = tiny.maps_in(tmp_path / "together")
    assert together.keys() == alone.keys()
    for name, tensor in alone.items():
        assert (together[name] - tensor).norm() <= 0.01 * tensor.norm(), name


@pytest.mark.parametrize(("command", "function"), [(commands._fit, fit), (commands._merge_stats, merge_statistics)])
def test_the_commands_take_what_the_library_takes(command, function):
    taken = [
        [(name, one.default) for name, one in inspect.signature(taker).parameters.items()]
        for taker in (command, function)
    ]
    assert taken[0] == taken[1]
