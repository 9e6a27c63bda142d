from dataclasses import asdict, fields

import pytest

from castlora.config import DEFAULT, PAPER, Recipe, Tuning, recipe_differences, resolve_recipe
from castlora.errors import UserError

NOTHING = Tuning()


def test_a_recipe_without_departures_is_the_named_one():
    assert resolve_recipe("default", None, None, None, NOTHING) == DEFAULT
    assert resolve_recipe("paper", None, None, None, NOTHING) == PAPER


def test_departures_replace_only_what_they_name():
    recipe = resolve_recipe("paper", "ridge", 7, None, Tuning(write_answers=True, mse_weight=0.0))
    assert recipe_differences(recipe, "paper") == {
        "start": "ridge", "steps": 7, "write_answers": True, "mse_weight": 0.0,
    }  # fmt: skip
    assert recipe_differences(PAPER, "paper") == {}


def test_the_start_of_the_paper_trains_its_maps():
    assert resolve_recipe("default", "paper", None, None, NOTHING).trained == "maps"
    assert resolve_recipe("default", "ridge", None, None, NOTHING).trained == "factors"
    assert resolve_recipe("default", "ridge", None, None, Tuning(trained="maps")).trained == "maps"


def test_a_solved_last_layer_is_a_factor_and_no_map():
    assert resolve_recipe("paper", "readout", None, None, NOTHING).trained == "factors"
    with pytest.raises(UserError, match=r"trained is 'maps', but the solved last layer .* give 'factors'"):
        resolve_recipe("default", "readout", None, None, Tuning(trained="maps"))


def test_without_a_step_the_last_layer_is_solved_unless_told_otherwise():
    assert resolve_recipe("default", None, 0, None, NOTHING).start == "readout"
    assert resolve_recipe("default", "ridge", 0, None, NOTHING).start == "ridge"
    for start in ("fresh", "paper"):
        with pytest.raises(UserError, match=f"steps is 0, and the {start} start moves nothing .* give 'readout'"):
            resolve_recipe("default", start, 0, None, NOTHING)


def test_maps_that_fold_into_nothing_cannot_be_left_for_factors():
    with pytest.raises(UserError, match="trained is 'factors', but the maps of the paper start fold into nothing"):
        resolve_recipe("default", "paper", None, None, Tuning(trained="factors"))


def test_every_number_of_a_recipe_can_be_tuned():
    with_options = {"start", "steps", "batch_size"}
    assert {field.name for field in fields(Recipe)} == {field.name for field in fields(Tuning)} | with_options
    assert set(asdict(NOTHING).values()) == {None}


@pytest.mark.parametrize(
    "field", ["temperature", "learning_rate_scale", "passages", "candidates", "max_length", "answer_tokens"]
)  # fmt: skip
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_numbers_that_must_be_above_zero(field, value):
    with pytest.raises(UserError, match=rf"^{field} is {value}; give a number above 0\.$"):
        resolve_recipe("default", None, None, None, Tuning(**{field: value}))


@pytest.mark.parametrize(
    "field",
    [
        "kl_weight",
        "mse_weight",
        "chunk_weight",
        "context_weight",
        "ridge",
        "map_learning_rate_ratio",
        "format_candidates",
    ],
)
@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_numbers_that_must_not_be_negative(field, value):
    with pytest.raises(UserError, match=rf"^{field} is {value}; give 0 or more\.$"):
        resolve_recipe("default", None, None, None, Tuning(**{field: value}))


@pytest.mark.parametrize(
    ("steps", "batch_size", "complaint"),
    [(-3, 1, "steps is -3; give 0 or more"), (1, 0, "batch_size is 0; give a number above 0")],
)
def test_steps_and_passages_per_step_that_cannot_be_taken(steps, batch_size, complaint):
    with pytest.raises(UserError, match=f"^{complaint}"):
        resolve_recipe("default", None, steps, batch_size, NOTHING)


def test_an_objective_without_any_part_is_refused():
    with pytest.raises(UserError, match="kl_weight, mse_weight and chunk_weight are all 0"):
        resolve_recipe("default", None, None, None, Tuning(kl_weight=0.0, mse_weight=0.0, chunk_weight=0.0))
