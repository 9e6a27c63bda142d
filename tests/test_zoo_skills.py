import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.zoo.demo_items import PROBLEMS, QUESTIONS, examples, fairy_tale_slots, word_problem_slots
from benchmarks.zoo.demo_items import main as write_demo_items
from benchmarks.zoo.skills import (
    SKILLS,
    Example,
    Sources,
    balanced_split,
    cut_like,
    disjoint,
    labelled,
    restaurant_record,
    sentences,
    solving_operations,
    text_key,
    tidy,
    write_skill,
)
from castlora.evaluation.tasks import load_task

DATA = Path(__file__).parents[2] / "shared" / "data"
GENERATORS = [(QUESTIONS, fairy_tale_slots), (PROBLEMS, word_problem_slots)]


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Ann has 3 figs and Bo has 1,200 figs. How many in all?", 1203, ["addition"]),
        ("Of 9 figs Ann eats 4. How many are left?", 5, ["subtraction"]),
        ("4 bags hold 2.5 pounds each. How many pounds?", 10, ["multiplication"]),
        ("3 children share 12 figs. How many each?", 4, ["division"]),
        ("2 bags hold 2 figs each. How many figs?", 4, ["addition", "multiplication"]),
        ("Ann has 3 figs, 4 pears and 5 plums. How many in all?", 12, []),
        ("Ann has 0 figs and eats 5. How many?", 5, []),
    ],
)
def test_solving_operations(question: str, answer: float, expected: list[str]) -> None:
    assert solving_operations(question, answer) == expected


@pytest.mark.parametrize(
    ("meaning", "description", "expected"),
    [
        (
            "name: Aster | food: French | area: riverside | family friendly: no",
            "By the river, Aster has French dishes and no children.",
            "food: French; area: riverside; family: no",
        ),
        ("name: Aster | food: Fast food", "Aster sells fast food.", "food: Fast food; area: none; family: none"),
        ("name: Aster | food: French", "Aster is a place to eat.", None),
        ("name: Aster | food: French", "French food in the city centre.", None),
    ],
)
def test_a_record_is_kept_only_where_the_words_bear_it_out(
    meaning: str, description: str, expected: str | None
) -> None:
    assert restaurant_record(meaning, description) == expected


def test_numbers_and_marks_do_not_make_a_text_new() -> None:
    assert text_key("Ann has 1,234.5 figs!") == text_key("ann  has 7 figs")
    assert text_key("Ann has 7 figs") != text_key("Ann has 7 plums")


def test_tidy_closes_the_gaps_of_tokenised_text() -> None:
    assert tidy("it 's not here , he\n did n't say : why ? 3.5 - 4") == "it's not here, he didn't say: why? 3.5 - 4"


def test_sentences_are_whole_and_within_the_lengths() -> None:
    assert sentences("Go on. The fox ran home! and then? He slept for a very long time. unfinished", 10, 30) == [
        "The fox ran home!",
        "He slept for a very long time.",
    ]


@pytest.mark.parametrize("line", ["And so the night was over, my good lord,", "What light is that in yonder window"])
def test_a_distractor_looks_like_the_line(line: str) -> None:
    sentence = "The postman had walked the whole afternoon along the narrow road to the mill."
    cut = cut_like(line, sentence)
    assert abs(len(cut) - len(line)) <= 10
    assert cut.endswith(",") == line.endswith(",")
    assert f"{sentence} ".startswith(f"{cut.rstrip(',')} ")


def test_a_balanced_split_shares_no_text() -> None:
    rows = [
        (f"{word} went home", label) for label in ("fox", "hen") for word in map("abcdefghij".__getitem__, range(10))
    ]
    split = balanced_split(
        labelled((f"{label} {text}", label) for text, label in rows), test_per_class=3, train_per_class=5
    )
    assert Counter(e.completion for e in split.test) == {" fox": 3, " hen": 3}
    assert Counter(e.completion for e in split.train) == {" fox": 5, " hen": 5}
    assert not {e.text for e in split.train} & {e.text for e in split.test}
    assert {e.choices for e in split.train} == {(" fox", " hen")}


def test_what_is_tested_is_not_trained() -> None:
    train = [Example("Ann has 3 figs", " a"), Example("Bo has 3 figs", " b"), Example("Bo has 9 figs", " b")]
    split = disjoint(train, [Example("ann has 4 figs.", " a")])
    assert [e.text for e in split.train] == ["Bo has 9 figs"]


@pytest.mark.parametrize(("templates", "slots"), GENERATORS, ids=["questions", "problems"])
def test_demo_items_are_balanced_varied_and_reproducible(templates, slots) -> None:
    drawn = list(islice(examples(templates, slots, seed=3), 900))
    counts = Counter(e.completion.strip() for e in drawn)
    assert counts.keys() == templates.keys()
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({text_key(e.text) for e in drawn}) == len(drawn)
    assert drawn == list(islice(examples(templates, slots, seed=3), 900))
    assert all(len(forms) >= 8 for forms in templates.values())
    assert not any("{" in e.text for e in drawn)


def test_demo_problems_have_whole_answers() -> None:
    for example in islice(examples(PROBLEMS, word_problem_slots, seed=0), 200):
        low, high = sorted(int(number) for number in re.findall(r"\d+", example.text))
        assert low > 1
        if example.completion == " division":
            assert high % low == 0
        if example.completion == " subtraction":
            assert high > low


def test_demo_files_are_tasks_apart_from_their_prompts(tmp_path: Path) -> None:
    write_demo_items(tmp_path)
    for skill in ("question-type", "operation"):
        items = load_task(tmp_path / f"{skill}-test.jsonl")
        prompts = [
            json.loads(line)["prompt"] for line in (tmp_path / f"{skill}-prompts.jsonl").read_text().splitlines()
        ]
        before, after = SKILLS[skill].prompt_format.split("{text}")
        assert len(items) == 300
        assert all(text.startswith(before) and text.endswith(after) for text in [*prompts, items[0].prompt])
        assert not {text_key(item.prompt) for item in items} & {text_key(prompt) for prompt in prompts}


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs the data sets")
@pytest.mark.parametrize("name", SKILLS)
def test_a_skill_is_held_out_and_even(tmp_path: Path, name: str) -> None:
    write_skill(name, SKILLS[name], Sources(DATA / "tasks", DATA / "corpus"), tmp_path)
    train, test = (load_task(tmp_path / name / f"{part}.jsonl") for part in ("train", "test"))
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / name / "prompts.jsonl").read_text().splitlines()]
    tested = {text_key(item.prompt) for item in test}
    assert 150 <= len(test) == len(tested) <= 500
    assert not tested & {text_key(prompt) for prompt in prompts}
    assert not tested & {text_key(item.prompt) for item in train}
    assert all(item.completion[0] == " " for item in [*train, *test])
    if SKILLS[name].kind in ("binary", "classification", "rule"):
        counts = Counter(item.completion for item in test)
        assert counts.keys() == set(test[0].choices or ())
        assert max(counts.values()) - min(counts.values()) <= 1
