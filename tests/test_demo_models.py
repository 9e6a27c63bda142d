"""The bundled models, and a published checkpoint that nobody here trained, as source and as target."""

from pathlib import Path

import pytest
import tiny

from castlora.adapters.live import load_adapter
from castlora.config import Tuning
from castlora.demonstration import demo_models_path
from castlora.demonstration.bundle import SOURCE, TARGET, demo_skill
from castlora.evaluation.accuracy import evaluate_model
from castlora.evaluation.tasks import load_task
from castlora.models.loading import load_model
from castlora.pipeline import transfer
from castlora.text.passages import read_prompts

STORIES = Path(__file__).parents[2] / "shared" / "data" / "models" / "stories260K-hf"
needs_stories = pytest.mark.skipif(not STORIES.exists(), reason="the third-party model is not beside the repository")
SMALL = Tuning(passages=24, max_length=48, format_candidates=0, rehearsal_passages=8, rehearsal_tokens=12)


def source_adapter() -> str:
    return str(demo_skill().adapter(SOURCE))


def test_the_bundled_adapters_carry_the_skill():
    items = load_task(demo_skill().task)[:60]
    for base in (SOURCE, TARGET):
        model, tokenizer = load_model(str(demo_models_path() / base))
        bare = evaluate_model(model, tokenizer, items).score
        adapted = evaluate_model(load_adapter(model, str(demo_skill().adapter(base)), base), tokenizer, items).score
        assert bare < 0.4
        assert adapted > 0.9


def test_demo_prompts_and_test_items_are_disjoint():
    skill = demo_skill()
    prompts = set(read_prompts(str(skill.prompts), 10_000, seed=0))
    tested = {item.prompt for item in load_task(skill.task)}
    assert len(prompts) > 300 and len(tested) >= 200
    assert not prompts & tested
    frame = skill.prompt_format.split("{text}")
    assert all(prompt.startswith(frame[0]) and prompt.endswith(frame[1]) for prompt in prompts | tested)


@needs_stories
def test_to_a_published_checkpoint(tmp_path, text_file, checked_in_process):
    source = str(demo_models_path() / SOURCE)
    out = str(tmp_path / "out")
    result = transfer(source_adapter(), str(STORIES), out, source, text=str(text_file), steps=3, tuning=SMALL)
    assert result.manifest["logit_difference"] <= 1e-4
    assert 0.5 < result.manifest["shared_vocabulary"]["target_mass"] <= 1


@needs_stories
@pytest.mark.parametrize("start", ["ridge", "paper"])
def test_from_a_published_checkpoint(tmp_path, text_file, checked_in_process, start):
    adapter = tmp_path / "adapter"
    tiny.save_adapter(adapter, STORIES, "all-linear")
    target = str(demo_models_path() / TARGET)
    out = str(tmp_path / "out")
    result = transfer(str(adapter), target, out, str(STORIES), text=str(text_file), start=start, steps=3, tuning=SMALL)
    assert result.manifest["logit_difference"] <= 1e-4
    assert len(result.pairing.mapped) == 35
