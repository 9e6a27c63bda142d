"""Where the default starts when it reads prompts of the task."""

import json
from dataclasses import replace

import pytest
import tiny

from castlora import teach, transfer_to_each
from castlora.config import DEFAULT
from castlora.maps import copied_start
from castlora.maps.copied_start import STEPS_OF_PLAIN_START, start_with_prompts
from castlora.plan import plan_transfer


@pytest.mark.parametrize(
    ("target", "changes", "start"),
    [
        ("gpt2", {}, "fresh"),
        ("gpt2", {"steps": STEPS_OF_PLAIN_START}, "fresh"),
        ("gpt2", {"steps": STEPS_OF_PLAIN_START - 1}, "ridge"),
        ("gpt2", {"trained": "maps"}, "ridge"),
        ("llama", {}, "ridge"),
    ],
)
def test_long_trainings_for_other_shapes_start_from_nothing(base_model, adapter, target, changes, start):
    plan = plan_transfer(str(adapter("llama")), str(base_model(target)), str(base_model("llama")))
    recipe = replace(DEFAULT, **changes)
    assert start_with_prompts(recipe, plan) == replace(recipe, start=start)


@pytest.fixture
def few_steps_are_enough(monkeypatch):
    monkeypatch.setattr(copied_start, "STEPS_OF_PLAIN_START", 3)


@pytest.fixture
def started(quick_transfer, few_steps_are_enough):
    """The start of a transfer, and the bytes that it wrote."""

    def run(**options) -> tuple[str, bytes]:
        result = quick_transfer("llama", "gpt2", **options)
        recipe = json.loads((result.folder / "castlora.json").read_text())["recipe"]
        return recipe.get("start", DEFAULT.start), (result.folder / "adapter_model.safetensors").read_bytes()

    return run


def test_prompts_given_or_answered_are_told_from_general_text(
    started, base_model, adapter, prompts_file, text_file, tmp_path
):
    asked = {"adapter": str(adapter("llama")), "source": str(base_model("llama")), "tuning": tiny.SHORT}
    given, weights = started(prompts=str(prompts_file), out="given")
    assert given == "fresh"
    taught = teach(**asked, prompts=str(prompts_file), out=str(tmp_path / "prompts.jsonl"))
    assert started(text=None, taught=str(taught), out="taught") == (given, weights)
    told, other = started(prompts=str(prompts_file), start="ridge", out="told")
    assert told == "ridge" and other != weights
    general = teach(
        **asked, text=str(text_file), prompt_format="Who? {text} Answer:", out=str(tmp_path / "general.jsonl")
    )
    assert started(text=None, taught=str(general), out="general")[0] == "ridge"
    assert started(prompt_format="Who? {text} Answer:", out="format")[0] == "ridge"
    assert started(prompts=str(prompts_file), recipe="paper", out="paper")[0] == "paper"


def test_each_of_several_targets_starts_as_it_would_alone(
    started, base_model, adapter, prompts_file, tmp_path, checked_in_process
):
    _, alone = started(prompts=str(prompts_file))
    targets = [str(base_model("gpt2")), str(base_model("mistral"))]
    settings = {"steps": 3, "batch_size": 4, "tuning": tiny.SHORT, "prompts": str(prompts_file)}
    transfer_to_each(str(adapter("llama")), targets, str(tmp_path / "each"), **settings)
    assert (tmp_path / "each" / "gpt2" / "adapter_model.safetensors").read_bytes() == alone
