"""Adapters over a bridge, without a model."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from castlora import CastMaps, UserError, check_portable, fit, translate
from castlora.adapters.factors import read_factors
from castlora.adapters.files import open_adapter
from castlora.bridge import cast_maps
from castlora.cli import main
from castlora.maps.cast_layer import LowRank
from castlora.maps.shared_maps import Fit
from castlora.models.loading import load_config

SHORT = {"passages": 40, "max_length": 48}


@pytest.fixture(scope="module")
def bridge(base_model, text_file, tmp_path_factory):
    """Fits between two tiny models, once for each pair."""
    folder, made = tmp_path_factory.mktemp("bridges"), {}

    def make(source: str, target: str, **options) -> str:
        key = source, target, str(options)
        if key not in made:
            out = folder / str(len(made))
            fit(str(base_model(source)), str(base_model(target)), str(out), str(text_file), **SHORT, **options)
            made[key] = str(out)
        return made[key]

    return make


def factors_of(folder, base) -> dict[str, LowRank]:
    return read_factors(open_adapter(str(folder)), load_config(str(base)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_onto_the_same_model_an_adapter_stays_what_it_is(bridge, base_model, adapter, tmp_path, family):
    (moved,) = translate(bridge(family, family), [str(adapter(family))], str(tmp_path / "moved"), scale=1)
    ids = torch.tensor([tiny.tokenizer_of(base_model(family))("The fox finds the old mill.").input_ids])
    bare, before, after = (
        tiny.logits(model, ids)
        for model in (
            tiny.load(base_model(family)),
            tiny.load_adapted(base_model(family), adapter(family)),
            tiny.load_adapted(base_model(family), moved),
        )
    )
    assert (after - before).norm() < 0.01 * (before - bare).norm()


@pytest.mark.parametrize(("source", "target"), [("llama", "gpt2"), ("gpt2", "mistral"), ("mistral", "phi3")])
def test_what_is_written_is_the_fold_of_the_maps_and_loads_everywhere(
    bridge, base_model, adapter, tmp_path, monkeypatch, source, target
):
    place, plain = bridge(source, target), str(adapter(source))
    with monkeypatch.context() as without_models:
        without_models.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
        (moved,) = translate(place, [plain], str(tmp_path / "moved"))
    assert [finding.rule for finding in check_portable(moved)] == ["base by name"]
    written = factors_of(moved, base_model(target))
    maps = CastMaps.load(place)
    folded = maps.translate(open_adapter(str(adapter(source))))
    for name, lora in folded.factors.items():
        torch.testing.assert_close(written[name].b @ written[name].a, lora.b @ lora.a, rtol=1e-4, atol=1e-6)
    record = json.loads((moved / "translation.json").read_text())
    assert (record["adapter_rank"], record["rank"], record["target"]) == (4, folded.rank, target)
    assert -1 < record["explained_to_source"] < 1
    assert f"for `{target}`" in (moved / "README.md").read_text()


def test_one_module_is_carried_as_the_paper_has_it(bridge, base_model, adapter, tmp_path):
    source = adapter("llama", ("q_proj",))
    (moved,) = translate(bridge("llama", "mistral"), [str(source)], str(tmp_path / "moved"))
    written = factors_of(moved, base_model("mistral"))["model.layers.3.self_attn.q_proj"]
    lora = factors_of(source, base_model("llama"))["model.layers.2.self_attn.q_proj"]
    maps = load_file(f"{bridge('llama', 'mistral')}/layer-003-attention.safetensors")
    back = maps["from_source.model.layers.3.self_attn.q_proj.q"].float()
    expected = back @ lora.b @ lora.a @ maps["to_source"].float()
    torch.testing.assert_close(written.b @ written.a, expected, rtol=1e-4, atol=1e-5)
    # Layers 1 and 2 of the target both stand for layer 1 of the source, and share what it does.
    for layer in (1, 2):
        written = factors_of(moved, base_model("mistral"))[f"model.layers.{layer}.self_attn.q_proj"]
        lora = factors_of(source, base_model("llama"))["model.layers.1.self_attn.q_proj"]
        maps = load_file(f"{bridge('llama', 'mistral')}/layer-00{layer}-attention.safetensors")
        back = maps[f"from_source.model.layers.{layer}.self_attn.q_proj.q"].float()
        expected = back @ lora.b @ lora.a @ maps["to_source"].float() / 2
        torch.testing.assert_close(written.b @ written.a, expected, rtol=1e-4, atol=1e-5)


def test_two_bridges_in_a_row_are_their_product(bridge, base_model, adapter, tmp_path):
    source = adapter("llama", ("q_proj",))
    (between,) = translate(bridge("llama", "phi3"), [str(source)], str(tmp_path / "between"))
    (moved,) = translate(bridge("phi3", "llama"), [str(between)], str(tmp_path / "moved"))
    name, fused = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.qkv_proj"
    lora = factors_of(source, base_model("llama"))[name]
    there, back = (
        load_file(f"{place}/layer-001-attention.safetensors")
        for place in (bridge("llama", "phi3"), bridge("phi3", "llama"))
    )
    outward = back[f"from_source.{name}.q"].float() @ there[f"from_source.{fused}.q"].float()
    inward = there["to_source"].float() @ back["to_source"].float()
    written = factors_of(moved, base_model("llama"))[name]
    torch.testing.assert_close(written.b @ written.a, outward @ lora.b @ lora.a @ inward, rtol=1e-3, atol=1e-5)


def test_a_rank_that_engines_do_not_accept_is_cut(bridge, base_model, adapter, tmp_path):
    source = adapter("llama", ("q_proj", "k_proj", "v_proj"), r=48)
    (moved,) = translate(bridge("llama", "gpt2"), [str(source)], str(tmp_path / "moved"))
    record = json.loads((moved / "translation.json").read_text())
    # Three times 48 for a fused module, whose inputs have 32 numbers.
    assert record["rank"] == 128
    assert record["cut"] == 0
    name = "transformer.h.1.attn.c_attn"
    written = factors_of(moved, base_model("gpt2"))[name]
    maps = load_file(f"{bridge('llama', 'gpt2')}/layer-001-attention.safetensors")
    lora = factors_of(source, base_model("llama"))
    expected = [
        maps[f"from_source.{name}.{role}"].float() @ one.b @ one.a @ maps["to_source"].float()
        for role, one in ((role, lora[f"model.layers.1.self_attn.{role}_proj"]) for role in "qkv")
    ]
    torch.testing.assert_close(written.b @ written.a, torch.cat(expected), rtol=1e-3, atol=1e-4)


def test_several_adapters_get_a_folder_each_and_a_second_call_goes_on(bridge, adapter, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(adapter("llama"), first)
    shutil.copytree(adapter("llama", ("q_proj",)), second)
    place = bridge("llama", "gpt2")
    write = cast_maps._write

    def stopped(maps, files, out, scale):
        if out.endswith("second"):
            raise KeyboardInterrupt
        return write(maps, files, out, scale)

    monkeypatch.setattr(cast_maps, "_write", stopped)
    with pytest.raises(KeyboardInterrupt):
        translate(place, [str(first), str(second)], str(tmp_path / "moved"))
    written: list[str] = []
    monkeypatch.setattr(cast_maps, "_write", lambda *given: written.append(given[2]) or write(*given))
    words = ["translate", "--bridge", place, "--adapter", str(first), "--adapter", str(second)]
    main([*words, "--out", str(tmp_path / "moved")])
    assert written == [str(tmp_path / "moved" / "second")]
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["first", "second"]
    (alone,) = translate(place, [str(first)], str(tmp_path / "alone"))
    for path in alone.iterdir():
        assert path.read_bytes() == (tmp_path / "moved" / "first" / path.name).read_bytes()


def test_what_no_bridge_carries_is_named_and_nothing_is_written(bridge, adapter, tmp_path):
    place, plain = bridge("llama", "gpt2"), str(adapter("llama"))
    some = bridge("llama", "gpt2", roles=["q"])
    damaged = tmp_path / "damaged"
    shutil.copytree(place, damaged)
    (damaged / "layer-001-mlp.safetensors").write_bytes(b"no")
    infinite = tmp_path / "infinite"
    shutil.copytree(place, infinite)
    maps = load_file(infinite / "layer-000-mlp.safetensors")
    save_file({**maps, "to_source": maps["to_source"] / 0}, infinite / "layer-000-mlp.safetensors")
    other = tmp_path / "other"
    shutil.copytree(place, other)
    shutil.copyfile(other / "layer-000-heads.safetensors", other / "layer-000-mlp.safetensors")
    no_bridge = tmp_path / "none"
    shutil.copytree(place, no_bridge)
    (no_bridge / "bridge.json").write_text("[]")
    odd = tmp_path / "odd"
    shutil.copytree(place, odd)
    (odd / "bridge.json").write_text('{"source": "a", "target": "b", "roles": [["q"]], "seed": 0}')
    for where, adapters, complaint in (
        (place, [], "--adapter names nothing"),
        (place, [plain, plain], "which would share a folder"),
        (place, ["nowhere"], "Adapter 'nowhere' is not a folder"),
        (place, [str(adapter("gpt2"))], "does not fit its base model"),
        (place, [str(adapter("llama", use_dora=True))], "is of kind DoRA"),
        (place, [plain, str(adapter("gpt2"))], "does not fit its base model"),
        (some, [plain], "for which the bridge has no maps"),
        ("nowhere", [plain], "Bridge 'nowhere' is not a folder"),
        ("no/where", [plain], "neither a folder here nor reachable"),
        (plain, [plain], "has no bridge.json"),
        (str(no_bridge), [plain], "bridge.json of .* is damaged"),
        (str(odd), [plain], "bridge.json of .* is damaged"),
        (str(damaged), [plain], "layer-001-mlp.safetensors of the bridge .* is missing or damaged"),
        (str(infinite), [plain], "NaN or infinity"),
        (str(other), [plain], "has no map 'from_source.transformer.h.0.mlp.c_fc.fc' of shape"),
    ):
        with pytest.raises(UserError, match=complaint):
            translate(where, adapters, str(tmp_path / "moved"))
        assert not (tmp_path / "moved").exists(), complaint


def test_an_adapter_for_some_roles_needs_no_more_maps_than_these(bridge, adapter, tmp_path):
    source = str(adapter("llama", ("q_proj",)))
    some, every = (
        translate(place, [source], str(tmp_path / out))[0]
        for place, out in ((bridge("llama", "gpt2", roles=["q"]), "some"), (bridge("llama", "gpt2"), "every"))
    )
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (some, every)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name])


def test_what_an_adapter_trains_beside_is_told(bridge, base_model, tmp_path, caplog):
    source = str(tmp_path / "source")
    tiny.save_adapter(tmp_path / "source", base_model("llama"), ("q_proj",), modules_to_save=["lm_head"])
    translate(bridge("llama", "gpt2"), [source], str(tmp_path / "moved"))
    assert caplog.text.count("also trains lm_head, which no map carries") == 1


def test_a_saved_bridge_is_the_same_bridge(bridge, adapter, tmp_path):
    place = bridge("llama", "gpt2")
    CastMaps.load(place).save(tmp_path / "copy")
    moved = [
        translate(where, [str(adapter("llama"))], str(tmp_path / out))[0]
        for where, out in ((place, "first"), (str(tmp_path / "copy"), "second"))
    ]
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in moved]
    assert weights[0] == weights[1]
    fits = [CastMaps.load(where).fits for where in (place, str(tmp_path / "copy"))]
    assert fits[0] == fits[1] and len(fits[0]) == 12
    assert "to_source" in fits[0]["layer-002-neurons"]
    with pytest.raises(UserError, match="exists; give a new folder"):
        CastMaps.load(place).save(tmp_path / "copy")


def test_a_bridge_between_folders_of_this_machine_is_not_uploaded(bridge, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["push", "--adapter", bridge("llama", "gpt2"), "--repo", "owner/name"])
    assert caught.value.code == 2
    assert "names the source by the folder" in capsys.readouterr().err


def test_a_bridge_is_uploaded_with_all_that_it_needs(bridge, tmp_path, monkeypatch, capsys):
    place = tmp_path / "copy"
    CastMaps.load(bridge("llama", "gpt2")).save(place)
    description = json.loads((place / "bridge.json").read_text())
    (place / "bridge.json").write_text(json.dumps({**description, "source": "owner/old", "target": "owner/new"}))
    (place / "notes.txt").write_text("mine")
    uploaded: list[dict] = []

    class Hub:
        def create_repo(self, repo: str, **options: object) -> None:
            assert repo == "owner/name" and options["private"] is True

        def upload_folder(self, **options: object):
            uploaded.append(options)
            return type("Commit", (), {"commit_url": "https://hub/commit/1"})

    monkeypatch.setattr("castlora.publishing.hub.HfApi", Hub)
    main(["push", "--adapter", str(place), "--repo", "owner/name", "--private", "true"])
    assert capsys.readouterr().out == "https://hub/commit/1\n"
    taken = {path for pattern in uploaded[0]["allow_patterns"] for path in place.glob(pattern)}
    assert taken == {path for path in place.rglob("*.*") if path.is_file()} - {place / "notes.txt"}


def test_modules_that_an_adapter_leaves_as_they_are_need_no_maps(bridge, base_model, adapter, tmp_path):
    some = bridge("llama", "llama", roles=["q"])
    (moved,) = translate(some, [str(adapter("llama", ("q_proj",)))], str(tmp_path / "first"), scale=1)
    # It has keys and values too, which engines want beside queries.
    assert any("k_proj" in name for name in load_file(moved / "adapter_model.safetensors"))
    (again,) = translate(some, [str(moved)], str(tmp_path / "second"), scale=1)
    first, second = (factors_of(folder, base_model("llama")) for folder in (moved, again))
    name = "model.layers.1.self_attn.q_proj"
    change = second[name].b @ second[name].a - first[name].b @ first[name].a
    assert change.norm() < 0.02 * (first[name].b @ first[name].a).norm()


def test_between_related_models_the_update_is_larger_unless_it_is_told_not_to_be(bridge, base_model, adapter, tmp_path):
    source = str(adapter("llama", ("q_proj",)))
    related, unrelated = bridge("llama", "llama"), bridge("llama", "gpt2")
    norms = {}
    for place, scale in ((related, None), (related, 1), (related, 2), (unrelated, None), (unrelated, 1)):
        (moved,) = translate(place, [source], str(tmp_path / f"{len(norms)}"), scale)
        weights = load_file(moved / "adapter_model.safetensors")
        norms[place, scale] = sum(tensor.norm() for name, tensor in weights.items() if "lora_B" in name)
        if scale is None:
            record = json.loads((moved / "translation.json").read_text())
            assert record["scale"] == (1.3 if place == related else 1)
    assert norms[related, None] / norms[related, 1] == pytest.approx(1.3)
    assert norms[related, 2] / norms[related, 1] == pytest.approx(2)
    assert norms[unrelated, None] == norms[unrelated, 1]


def test_models_are_related_where_most_of_the_maps_were_drawn_towards_the_identity():
    near, far = Fit(0.9, is_anchored=True), Fit(0.3, is_anchored=False)
    assert cast_maps.are_related({"layer-000-mlp": {"to_source": near, "from_source.up": near}, "one": {"up": far}})
    assert not cast_maps.are_related({"layer-000-mlp": {"to_source": near}, "layer-001-mlp": {"to_source": far}})


def test_an_adapter_that_a_bridge_has_scaled_is_not_scaled_again(bridge, adapter, tmp_path):
    place, folder = bridge("llama", "llama"), str(adapter("llama", ("q_proj",)))
    records = []
    for number, scale in enumerate((1, None, None, 2)):
        (moved,) = translate(place, [folder], str(tmp_path / str(number)), scale)
        record = json.loads((moved / "translation.json").read_text())
        records.append((record["scale"], record["total_scale"]))
        folder = str(moved)
    assert records == [(1, 1), (1.3, 1.3), (1, 1.3), (2, 2.6)]
    assert "| scale of the update | 2; 2.6 with bridges before |" in (moved / "README.md").read_text()
    for damage in ("{", "[]", '{"total_scale": "much"}', '{"total_scale": NaN}', '{"total_scale": 0}'):
        (moved / "translation.json").write_text(damage)
        with pytest.raises(UserError, match="total_scale"):
            translate(place, [folder], str(tmp_path / "more"))
        assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(bridge, adapter, tmp_path, scale):
    with pytest.raises(UserError, match="give a number above 0"):
        translate(bridge("llama", "gpt2"), [str(adapter("llama"))], str(tmp_path / "moved"), scale)
    assert not (tmp_path / "moved").exists()
