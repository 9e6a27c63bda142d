"""Maps that are trained on some adapters and carry another: what `python -m benchmarks.bridges` runs and renders."""

import json
from dataclasses import replace

import pytest
import tiny
import torch

from benchmarks import bridges
from castlora import config
from castlora.adapters.factors import LowRank
from castlora.adapters.live import attach_lora, student_factors
from castlora.bench import reading
from castlora.bench.spec import BenchmarkModel
from castlora.maps.starts import fold_maps, parametrize_by_maps, random_maps
from castlora.models.modules import linear_slots
from castlora.models.pairing import pair_modules

CHOICES = [" fox", " hen", " river"]
SKILLS = ["animals", "plants"]
REFERENCES = {"bare target": {"score": 0.2}, "retrained": {"score": 1.0}}


@pytest.mark.parametrize("target", ["mistral", "gpt2"])
def test_another_adapter_with_fewer_modules_is_carried_by_the_same_maps(paired, target):
    source, model, pairing, factors = paired("llama", target)
    maps = random_maps(pairing, factors, seed=0)
    other = {
        name: LowRank(torch.randn(5, lora.a.shape[1]), torch.randn(lora.b.shape[0], 5))
        for name, lora in factors.items()
        if "mlp" not in name and "k_proj" not in name
    }
    slots = [linear_slots(one, one.config) for one in (source, model)]
    of_other = pair_modules(*slots, other)
    student = attach_lora(model, [pair.target.name for pair in pairing.mapped], 12)
    parametrize_by_maps(student, pairing, factors, maps)
    bridges.carry(student, pairing, other)
    folded = fold_maps(of_other, other, bridges.maps_along(of_other, bridges.maps_of(student, pairing)))
    assert 0 < len(folded) < len(pairing.mapped)
    for name, found in student_factors(student, [pair.target.name for pair in pairing.mapped]).items():
        update = folded[name].b @ folded[name].a if name in folded else torch.zeros_like(found.b @ found.a)
        torch.testing.assert_close(found.b @ found.a, update)


def test_maps_are_read_as_they_stand_and_as_they_were_written(paired, tmp_path):
    _, model, pairing, factors = paired("llama", "mistral")
    maps = random_maps(pairing, factors, seed=0)
    student = attach_lora(model, [pair.target.name for pair in pairing.mapped], 8)
    parametrize_by_maps(student, pairing, factors, maps)
    standing = bridges.maps_of(student, pairing)
    bridges.write_maps(standing, tmp_path / "maps.safetensors")
    for found in (standing, bridges.read_maps(tmp_path / "maps.safetensors")):
        assert len(found) == len(maps)
        for key, one in bridges.maps_along(pairing, found).items():
            assert torch.equal(one.to_source, maps[key].to_source)
            assert torch.equal(one.from_source, maps[key].from_source)


@pytest.fixture
def two_skills(base_model, adapter, tmp_path, monkeypatch):
    """Folder of the tasks of two skills, for a llama that has an adapter for each and a mistral that has too."""
    items = [
        {"prompt": f"Who? {sentence} Answer:", "completion": CHOICES[i % 3], "choices": CHOICES}
        for i, sentence in enumerate(tiny.sentences(24))
    ]
    models = {}
    for name in ("llama", "mistral"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        models[name] = BenchmarkModel(str(base_model(name)), str(tmp_path / "adapters" / name / "{skill}"))
        for skill in SKILLS:
            (tmp_path / "adapters" / name / skill).symlink_to(adapter(name))
    for skill in SKILLS:
        folder = tmp_path / "tasks" / skill
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items[:9]))
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": i["prompt"]}) + "\n" for i in items[9:]))
    monkeypatch.setattr(bridges, "zoo_models", lambda *_: models)
    monkeypatch.setattr(bridges, "PAIR", "llama:mistral")
    # What is random at first gains nothing from another random adapter.
    monkeypatch.setattr(
        bridges, "reference_scores", lambda _spec, _pair, skill: {"skill": skill, "references": REFERENCES}
    )
    # The source would answer hundreds of variants of a few prompts.
    monkeypatch.setitem(config.RECIPES, "default", replace(config.DEFAULT, fewest_prompts=0))
    write = reading.write_rehearsed
    little = {"rehearsal_passages": 8, "rehearsal_tokens": 12}
    monkeypatch.setattr(
        reading, "write_rehearsed", lambda models, recipe, seed: write(models, replace(recipe, **little), seed)
    )
    return tmp_path / "tasks"


def test_maps_learn_from_the_other_adapters_alone_and_nothing_is_run_twice(
    two_skills, text_file, tmp_path, monkeypatch
):
    learned_from = []
    learn = bridges.learn_maps

    def learn_and_tell(taught, *args):
        learned_from.append([adapter.reading.plan.adapter.folder.name for adapter in taught])
        return learn(taught, *args)

    monkeypatch.setattr(bridges, "learn_maps", learn_and_tell)
    out, page = tmp_path / "results", tmp_path / "bridges.md"
    for _ in range(2):
        bridges.main(
            two_skills, text_file, tmp_path / "work", out, page, tmp_path, SKILLS, SKILLS, steps=[2], bridge_steps=4
        )
    assert learned_from == [["plants"], ["animals"]]
    learned = json.loads((out / "learned" / "animals.json").read_text())
    assert [point["step"] for point in learned["points"]] == list(range(5))
    assert learned["points"][-1]["seen_kl"] < learned["points"][0]["seen_kl"]
    text = page.read_text()
    assert "| steps | bridge | bridge, last layer solved | ridge start, rehearsed | default, last layer solved" in text
    cells = sorted(path.name for path in (out / "steps" / "2").glob("*/animals/*.seed0.json"))
    assert [name.removesuffix(".prompts.seed0.json") for name in cells] == [
        "bridge-last-layer-solved", "bridge", "default-last-layer-solved", "fresh-rehearsed", "ridge-start-rehearsed",
    ]  # fmt: skip
    assert "| lift, animals unseen | lift, plants unseen |" in text
    assert page.with_suffix(".svg").read_text().startswith("<svg")


def test_the_page_shows_what_is_carried_and_what_is_saved():
    def point(step: int, score: float) -> dict[str, object]:
        unseen = {"loss": 3.0, "kl": 2.5, "agreement": 0.4}
        return {"step": step, "seen_kl": 1.0 - step / 4, "unseen": unseen, "bare_kl": 6.0, "score": score}

    measured = {"seed": 0, "environment": {"commit": "0123456789abcdef", "versions": {}, "machine": "2 cores"}}
    bridge = {"skill": "animals", "references": REFERENCES, "points": [point(0, 0.2), point(2, 0.4)], **measured}
    lifts = (0.31, 0.42, 0.1, 0.2, -0.03)
    found = bridges.Found(
        {50: dict(zip(bridges.STARTS, lifts, strict=True))},
        [bridge, {**bridge, "skill": "plants"}],
        [measured | {"seed": 1}],
    )
    page = bridges.render(found, "bridges.svg")
    assert "Commits 0123456789; seeds 0, 1; 2 cores;" in page
    assert "| 0 | 1.00 | 2.50 | 40 % | 0.00 | 0.00 |" in page and "| 2 | 0.50 | 2.50 | 40 % | 0.25 | 0.25 |" in page
    assert "| 50 | 0.31 | 0.42 | 0.10 | 0.20 | -0.03 |" in page and "the bare target's from the unseen: 6.00" in page
