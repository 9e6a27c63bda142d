"""Transfers with one of the two models on the accelerator at a time."""

from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from castlora import UserError, model_pair, pipeline, stages
from castlora.execution.offloading import Offloading
from castlora.maps import fitting
from castlora.maps.fitting import collect_moments
from castlora.model_pair import Loading, Models, load_models
from castlora.plan import plan_transfer


@pytest.fixture
def watched(monkeypatch):
    """Fails where a model runs that the accelerator does not hold; which it held, in order."""
    held: list[str] = []
    use, put_away = Models.use, Models.put_away

    def spy(models: Models, side: str) -> None:
        use(models, side)
        if models.takes_turns:
            held.append(side)

    def spy_away(models: Models) -> None:
        put_away(models)
        if models.takes_turns:
            held.append("neither")

    def watch(plan, loading: Loading) -> Models:
        models = load_models(plan, loading)
        for side, model in (("source", models.source), ("target", models.target)):

            def check(*_arguments, side=side) -> None:
                assert not loading.low_memory or held[-1] == side, f"{side} runs, {held[-1]} is held"

            model.register_forward_pre_hook(check)
        return models

    monkeypatch.setattr(Models, "use", spy)
    monkeypatch.setattr(Models, "put_away", spy_away)
    monkeypatch.setattr(pipeline, "load_models", watch)
    return held


@pytest.mark.parametrize(
    "options",
    [{}, {"recipe": "paper", "start": "ridge"}, {"start": "readout"}, {"start": "fresh"}],
    ids=["default", "paper", "readout", "fresh"],
)
def test_the_adapter_is_that_of_both_models_together(quick_transfer, prompts_file, watched, options):
    options = {"prompts": str(prompts_file), "steps": 24} | options
    together = quick_transfer("llama", "gpt2", "together", **options)
    assert watched == []
    in_turns = quick_transfer("llama", "gpt2", "in turns", low_memory=True, **options)
    weights = [load_file(result.folder / "adapter_model.safetensors") for result in (together, in_turns)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    for part in ("losses", "answers", "shared_vocabulary"):
        assert in_turns.manifest[part] == together.manifest[part]
    assert "--low-memory true" in in_turns.manifest["command"]
    assert watched[-1] == "neither"
    # Large models take seconds to move; the target is there first.
    changes = [side for before, side in zip(["target", *watched], watched, strict=False) if side != before]
    assert len(changes) <= 17


def test_general_text_is_read_in_turns_too(quick_transfer, watched):
    settings = {"steps": 24, "tuning": replace(tiny.SHORT, format_candidates=6)}
    together, in_turns = (
        quick_transfer("llama", "mistral", f"out {one}", low_memory=one, **settings) for one in (False, True)
    )
    assert in_turns.manifest["losses"] == together.manifest["losses"]


@pytest.mark.parametrize(("limit", "turns"), [(1, 3), (1 << 30, 1)])
def test_activations_wait_in_memory_as_far_as_there_is_room(base_model, adapter, monkeypatch, limit, turns):
    monkeypatch.setattr(fitting, "_BYTES_PER_TURN", limit)
    plan = plan_transfer(str(adapter("llama")), str(base_model("gpt2")), str(base_model("llama")))
    models, text = (tiny.load(base_model(name)) for name in ("llama", "gpt2")), tiny.aligned("llama", "gpt2", 40)
    source, target = models
    used = ["target"]
    monkeypatch.setattr(fitting, "_waits", lambda model: model is (source if used[-1] == "target" else target))
    in_turns = collect_moments(source, target, plan.pairing, text, use=used.append)
    # The one that was used last begins, so that the other comes but once per turn.
    assert used[1:] == ["target", "source", "source", "target", "target", "source"][: 2 * turns]
    together = collect_moments(source, target, plan.pairing, text)
    for kind in ("inputs", "outputs"):
        found, expected = getattr(in_turns, kind), getattr(together, kind)
        assert found.keys() == expected.keys()
        for key, moments in expected.items():
            assert all(torch.equal(vars(found[key])[name], tensor) for name, tensor in vars(moments).items())


def test_the_model_in_use_is_moved_and_the_other_leaves_first(base_model, adapter, monkeypatch):
    plan = plan_transfer(str(adapter("llama")), str(base_model("gpt2")), str(base_model("llama")))
    models = load_models(plan, Loading(low_memory=True))
    accelerator, processor = torch.device("meta"), torch.device("cpu")
    moves: list[tuple[str, torch.device]] = []
    names = {id(models.source): "source", id(models.target): "target"}
    monkeypatch.setattr(model_pair, "best_device", lambda: accelerator)
    monkeypatch.setattr(Offloading, "move", lambda _self, model, device: moves.append((names[id(model)], device)))
    models.use("target")
    models.use("source")
    models.put_away()
    assert moves == [
        ("source", processor), ("target", accelerator), ("target", processor), ("source", accelerator),
        ("source", processor), ("target", processor),
    ]  # fmt: skip


@pytest.mark.parametrize(("loading", "leave"), [({}, 2), ({"source_bits": 4}, 2), ({"target_bits": 8}, 0)])
def test_models_that_do_not_take_turns_stay_until_they_are_put_away(base_model, adapter, monkeypatch, loading, leave):
    plan = plan_transfer(str(adapter("llama")), str(base_model("gpt2")), str(base_model("llama")))
    models = replace(load_models(plan), can_move=Loading(**loading).can_move)
    left = []
    monkeypatch.setattr(Offloading, "move", lambda _self, model, device: left.append((model, device)))
    models.use("source")
    models.use("target")
    assert left == []
    models.put_away()
    assert left == [(models.source, torch.device("cpu")), (models.target, torch.device("cpu"))][:leave]


def test_a_record_that_takes_too_much_memory_is_refused(quick_transfer, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "record_limit", lambda _model: 1 << 10)
    with pytest.raises(UserError, match=r"--low-memory, what .* GiB, more than 0\.0; give --prompts, or"):
        quick_transfer("llama", "gpt2", low_memory=True)
    assert not (tmp_path / "out").exists()
