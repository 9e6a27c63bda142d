"""The adapter as it is, as the start where the target has the source's shapes."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from castlora import transfer
from castlora.adapters.factors import LowRank
from castlora.adapters.live import attach_lora, start_from_factors, student_factors
from castlora.alignment.positions import AlignedPassage
from castlora.config import DEFAULT
from castlora.distillation.distill import HeldOut, Student
from castlora.distillation.training import peak_learning_rate
from castlora.maps.copied_start import (
    StartChoice,
    copied_factors,
    copied_start,
    gentle_recipe,
    has_shapes_of_source,
    keep_better_start,
)
from castlora.plan import plan_transfer
from castlora.report.settings import settings_in_words


def update(lora: LowRank) -> torch.Tensor:
    return lora.b @ lora.a


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_between_equal_shapes_every_update_is_the_adapters(paired, name):
    _, _, pairing, factors = paired(name, name)
    copied = copied_factors(pairing, factors)
    assert copied.keys() == factors.keys()
    for module, lora in copied.items():
        torch.testing.assert_close(update(lora), update(factors[module]))
        torch.testing.assert_close(lora.a.norm(dim=1), lora.b.norm(dim=0))


@pytest.mark.parametrize(("source", "target"), [("llama", "mistral"), ("gpt2", "gpt2-deep"), ("phi3", "llama")])
def test_between_other_shapes_nothing_is_copied(paired, source, target):
    _, _, pairing, factors = paired(source, target)
    assert not has_shapes_of_source(pairing, factors) and copied_factors(pairing, factors) == {}


GIVEN, GENERAL = (AlignedPassage([1], [1], [0], [0], [1.0], is_general) for is_general in (False, True))


@pytest.mark.parametrize(
    ("changes", "training", "is_copied"),
    [
        ({"start": "ridge"}, GENERAL, True),
        ({"start": "readout"}, GENERAL, True),
        ({"start": "fresh"}, GENERAL, False),
        ({"start": "ridge", "trained": "maps"}, GENERAL, False),
        ({"start": "ridge"}, GIVEN, False),
        ({"start": "readout", "steps": 0}, GIVEN, True),
    ],
)
def test_a_copy_stands_beside_solved_factors_that_the_text_may_not_teach_all(
    base_model, adapter, changes, training, is_copied
):
    folder = str(base_model("llama"))
    plan = plan_transfer(str(adapter("llama")), folder, folder)
    copied = copied_start(plan, replace(DEFAULT, **changes), 2, [training])
    assert bool(copied) == is_copied
    assert {lora.rank for lora in copied.values()} == ({2} if is_copied else set())


@pytest.mark.parametrize(
    ("of_bare", "of_maps", "of_copy", "is_copied"),
    [
        (4.0, 2.0, 1.0, True),
        (4.0, 1.0, 1.5, False),
        (4.0, 1.0, 1.0, False),
        # Of a model that only has the same shapes, nearly all is left to learn.
        (4.0, 3.9, 2.1, False),
    ],
)
def test_the_adapter_is_the_start_if_it_does_most_of_its_work(paired, caplog, of_bare, of_maps, of_copy, is_copied):
    _, model, pairing, factors = paired("llama", "llama")
    copied = copied_factors(pairing, factors)
    solved = {name: LowRank(torch.randn_like(lora.a), torch.randn_like(lora.b)) for name, lora in copied.items()}
    student = Student(attach_lora(model, copied, 4), 32, 32, with_head=False)
    start_from_factors(student.model, solved)
    losses = iter([of_bare, of_maps, of_copy])
    with caplog.at_level("INFO", logger="castlora"):
        choice = keep_better_start(student, copied, lambda _student: HeldOut(next(losses), 0.0, 0.0))
    assert choice == StartChoice(is_copied, of_bare, of_maps, of_copy)
    found = student_factors(student.model, copied)
    for name, expected in (copied if is_copied else solved).items():
        assert torch.equal(found[name].a, expected.a) and torch.equal(found[name].b, expected.b)
    assert f"the start is {'the adapter' if is_copied else 'the maps'}." in caplog.text


def test_the_bare_target_the_maps_and_the_copy_are_what_is_compared(paired):
    _, model, pairing, factors = paired("llama", "llama")
    copied = copied_factors(pairing, factors)
    student = Student(attach_lora(model, copied, 4), 32, 32, with_head=False)
    solved = {name: LowRank(2 * lora.a, lora.b) for name, lora in copied.items()}
    start_from_factors(student.model, solved)
    ids = torch.tensor([[5, 6, 7]])
    seen = []

    def measure(student: Student) -> HeldOut:
        seen.append(tiny.logits(student.model, ids))
        return HeldOut(1.0, 0.0, 0.0)

    keep_better_start(student, copied, measure)
    expected = []
    for updates in ({}, solved, copied):
        fresh = attach_lora(paired("llama", "llama")[1], copied, 4)
        start_from_factors(fresh, updates)
        expected.append(tiny.logits(fresh, ids))
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])


def test_a_copied_start_is_taught_at_a_tenth_of_the_rate():
    copied, solved = StartChoice(True, 4.0, 2.0, 1.0), StartChoice(False, 4.0, 1.0, 2.0)
    assert gentle_recipe(DEFAULT, copied) == replace(DEFAULT, learning_rate_scale=pytest.approx(0.12))
    assert gentle_recipe(DEFAULT, solved) == gentle_recipe(DEFAULT, None) == DEFAULT


@pytest.fixture
def successor(base_model, tmp_path):
    """A llama that is a little off another."""
    model = AutoModelForCausalLM.from_pretrained(base_model("llama"), dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * parameter.std(correction=0) * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "successor")
    tiny.family("llama")[1].save_pretrained(tmp_path / "successor")
    return str(tmp_path / "successor")


@pytest.fixture
def moved(adapter, successor, checked_in_process, tmp_path):
    """The manifest, card and log of a transfer to the successor."""

    def move(**options: object) -> tuple[dict[str, Any], str, list[dict[str, float]]]:
        result = transfer(
            str(adapter("llama")), successor, str(tmp_path / "out"), batch_size=4, tuning=tiny.SHORT, **options
        )
        return result.manifest, (result.folder / "README.md").read_text(), result.log

    return move


def test_general_text_gently_teaches_the_adapter_as_it_is(moved, text_file):
    manifest, card, log = moved(text=str(text_file), start="ridge", steps=4)
    choice, losses = manifest["start_choice"], manifest["losses"]
    assert choice["is_copied"] and choice["loss_of_copy"] < choice["loss_of_maps"]
    assert losses["held_out_before"] == pytest.approx(choice["loss_of_copy"])
    assert losses["held_out_bare"] == pytest.approx(choice["loss_of_bare"])
    gentle = replace(DEFAULT, batch_size=4, learning_rate_scale=0.1 * DEFAULT.learning_rate_scale)
    assert max(entry["learning_rate"] for entry in log[1:]) == pytest.approx(peak_learning_rate(gentle, 32))
    assert "`ridge`; the adapter as it is, which was nearer" in card
    assert settings_in_words(manifest)["start"] == "the adapter as it is, nearer than closed-form maps (ridge)"


def test_prompts_teach_the_maps(moved, prompts_file):
    manifest, card, log = moved(prompts=str(prompts_file), start="ridge", steps=4)
    assert manifest["start_choice"] is None and "as it is" not in card
    assert settings_in_words(manifest)["start"] == "closed-form maps (ridge)"
    whole = peak_learning_rate(replace(DEFAULT, batch_size=4), 32)
    assert max(entry["learning_rate"] for entry in log[1:]) == pytest.approx(whole)


def test_without_a_step_the_last_layer_is_solved_on_top_of_the_adapter(moved, prompts_file):
    manifest, _, _ = moved(prompts=str(prompts_file), steps=0)
    assert manifest["start_choice"]["is_copied"]
    assert manifest["last_layer"]["losses"][0] == pytest.approx(manifest["start_choice"]["loss_of_copy"])
