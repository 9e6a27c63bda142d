import pytest

from benchmarks.quality import PAIRS
from benchmarks.retrained import TRAINED, lifts_by_seed, render
from benchmarks.zoo.specs import GRID_SKILLS

ENVIRONMENT = {"commit": "0" * 40, "machine": "a machine", "versions": {"torch": "2"}, "python": "3"}
REFERENCES = {
    ("one:two", "skill"): {"bare target": {"score": 0.2}, "retrained": {"score": 0.7}},
    ("three:two", "skill"): {"bare target": {"score": 0.2}, "retrained": {"score": 0.7}},
    ("two:one", "skill"): {"bare target": {"score": 0.5}, "retrained": {"score": 0.9}},
}


def record(base: str, seed: int, score: float) -> dict[str, object]:
    return {"base": base, "skill": "skill", "seed": seed, "score": score, "environment": ENVIRONMENT}


def test_an_adapter_counts_on_every_pair_whose_target_it_was_trained_on():
    lifts = lifts_by_seed(REFERENCES, [record("two", 1, 0.6), record("one", 1, 0.9), record("two", 2, 0.8)])
    assert lifts == {
        1: {
            ("one:two", "skill"): pytest.approx(0.8),
            ("three:two", "skill"): pytest.approx(0.8),
            ("two:one", "skill"): pytest.approx(1.0),
        },
        2: {("one:two", "skill"): pytest.approx(1.2), ("three:two", "skill"): pytest.approx(1.2)},
    }


def test_the_page_has_a_row_for_every_target_and_the_mean_of_each_seed():
    page = render(REFERENCES, [record("two", 1, 0.6), record("one", 1, 0.9), record("two", 2, 0.8)])
    assert "| one | skill | 0.500 | 0.900 | 0.900 | – |" in page
    assert "| two | skill | 0.200 | 0.700 | 0.600 | 0.800 |" in page
    assert "Seed 1: mean lift 0.87 [" in page
    assert "Seed 2: mean lift 1.20 [1.20, 1.20] over 2 pairs and skills." in page
    # Each pair and skill has one voice: (0.8 + 1.2) / 2 on two of them, 1.0 on the third.
    assert "Together: 1.00 [" in page


def test_every_base_model_of_the_grid_has_an_adapter_of_every_skill_to_train_again():
    bases = {base for pair in PAIRS for base in pair.split(":")}
    assert set(TRAINED) == {(base, skill) for base in bases for skill in GRID_SKILLS}
