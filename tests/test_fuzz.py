"""A short run of `benchmarks.fuzz`; the long one is a command."""

import itertools
import json
import random

import pytest

from benchmarks.fuzz import TARGETS, Outcome, Target, fuzz, main, try_once
from benchmarks.mutations import HOSTILE_NUMBERS, HOSTILE_TEXTS
from castlora.errors import UserError


def test_damaged_inputs_are_taken_or_refused_in_one_sentence():
    outcomes = fuzz(count=40 * len(TARGETS), seed=1)
    assert [failure for outcome in outcomes.values() for failure in outcome.failures] == []
    assert all(outcome.tried == 40 == outcome.taken + outcome.refused for outcome in outcomes.values())
    assert all(outcome.refused > outcome.taken / 2 for outcome in outcomes.values())


@pytest.mark.parametrize("name", ["adapter to check", "MLX-LM adapter"])
def test_no_field_of_a_configuration_breaks_a_reader_by_what_it_holds(tmp_path, name):
    TARGETS[name].files(tmp_path)
    path = tmp_path / "adapter_config.json"
    intact = json.loads(path.read_text())
    lists = ([], [None, {}], ["b", "a", 1], ["x" * 1000], {"q_proj": None}, {"q_proj": 10**400}, {"a": {"b": [1]}})
    for field, value in itertools.product(intact, [None, *HOSTILE_TEXTS, *HOSTILE_NUMBERS, *lists]):
        path.write_text(json.dumps(intact | {field: value}))
        try:
            TARGETS[name].read(tmp_path)
        except UserError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize("name", list(TARGETS))
def test_intact_inputs_are_taken(tmp_path, name):
    TARGETS[name].files(tmp_path)
    assert set(TARGETS[name].mutated) <= {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    TARGETS[name].read(tmp_path)


def outcome_of(read) -> Outcome:
    outcome = Outcome()
    target = Target(lambda folder: (folder / "a.txt").write_text("intact") and None, read, ("a.txt",))
    try_once(target, random.Random(3), outcome, "input 0")
    return outcome


def refuse(_folder):
    raise UserError("a.txt is damaged.\nCopy it again.")


def fail(_folder):
    raise KeyError("a key")


def spoil(folder):
    (folder / "b.txt").write_text("written")


@pytest.mark.parametrize(
    ("read", "complaint"),
    [(refuse, "refused in what is no line of text"), (fail, "KeyError: 'a key'"), (spoil, "reading changed")],
)
def test_what_must_not_happen_is_a_failure(read, complaint):
    (failure,) = outcome_of(read).failures
    assert complaint in failure


def test_the_counts_are_written_and_the_same_seed_gives_the_same(tmp_path, capsys):
    for name in ("first", "second"):
        main(count=20, seed=5, out=tmp_path / name)
    first, second = (json.loads((tmp_path / name).read_text())["targets"] for name in ("first", "second"))
    for counts in (*first.values(), *second.values()):
        del counts["slowest_seconds"]
    assert first == second
    assert "adapter to move" in capsys.readouterr().out
