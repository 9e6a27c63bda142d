import gzip
import json
from collections import Counter

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from castlora.errors import UserError
from castlora.text.passages import (
    GENERIC_FORMATS,
    SLOT,
    Passage,
    candidate_formats,
    check_prompt_format,
    cut_passages,
    draw_fillings,
    fill_formats,
    join_sentences,
    read_documents,
    read_prompts,
)

PARAGRAPHS = ["The fox finds the hen.\nShe hides.", "Der König fährt über den Fluß.", "日本語のテキスト 🙂"]


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz", "text.jsonl", "text.jsonl.gz"])
def test_documents_of_every_kind_of_file(tmp_path, name):
    path = tmp_path / name
    if ".jsonl" in name:
        content = "".join(json.dumps({"id": 7, "text": paragraph}) + "\n" for paragraph in PARAGRAPHS)
    else:
        content = "\n \n\n".join(PARAGRAPHS)
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(content)
    assert list(read_documents(str(path))) == PARAGRAPHS


def test_blank_records_are_no_documents(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": " "}\n\n{"text": "The fox."}\n{"content": "The hen."}\n')
    assert list(read_documents(str(path))) == ["The fox.", "The hen."]


def test_half_a_surrogate_pair_does_no_harm(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a \\ud800 fox"}\n')
    assert list(read_documents(str(path))) == ["a ? fox"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", b"", "holds no text; give a file with at least one paragraph"),
        ("blank.txt", b" \n\n\t\n", "holds no text; give a file with at least one paragraph"),
        ("latin.txt", "Fluß".encode("latin-1"), "cannot be read as UTF-8 text"),
        ("plain.txt.gz", b"The fox.", "cannot be read as UTF-8 text"),
        ("short.txt.gz", gzip.compress(b"The fox finds the hen.", mtime=0)[:-4], "cannot be read as UTF-8 text"),
        ("broken.jsonl", b'{"text": "The fox."}\n{"text": ', "line 2 is not JSON"),
        ("other.jsonl", b'{"words": "The fox."}\n', "line 1 has no text field 'text'"),
        ("list.jsonl", b"[1, 2]\n", "line 1 has no text field 'text'"),
        ("number.jsonl", b'{"text": 7}\n', "line 1 has no text field 'text'"),
    ],
)
def test_bad_text_files_are_refused_by_name(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        list(read_documents(str(tmp_path / name)))
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["/nowhere/text.txt", "nowhere", "owner/missing.jsonl"])
def test_a_missing_text_is_named(name):
    with pytest.raises(UserError, match=f"--text '{name}' does not exist; give a .txt or .jsonl file"):
        list(read_documents(name))


def test_a_data_set_out_of_reach_is_named():
    with pytest.raises(UserError, match=r"--text 'owner/nowhere' cannot be streamed from the hub .*; give a local"):
        list(read_documents("owner/nowhere"))


@given(
    documents=st.lists(st.text(st.sampled_from("ab é日🙂\n"), max_size=80), max_size=4),
    max_bytes=st.integers(16, 60),
    count=st.integers(0, 10),
)
def test_passages_are_short_pieces_of_the_documents(documents, max_bytes, count):
    passages = cut_passages(documents, count, max_bytes, seed=0)
    assert len(passages) <= count
    for passage in passages:
        assert passage.answer_start == 0
        assert 0 < len(passage.text.encode()) <= max_bytes
        assert passage.text == passage.text.strip()
        assert any(passage.text in document for document in documents)


def test_many_documents_are_drawn_from_and_no_text_twice():
    documents = [" ".join(f"word{number}" for number in range(500))] + [
        f"A short text {number}." for number in range(90)
    ]
    drawn = [passage.text for passage in cut_passages([*documents, *documents], 50, 40, seed=0)]
    assert len(set(drawn)) == len(drawn) == 50
    assert sum(text.startswith("A short") for text in drawn) > 10


def test_passages_are_cut_at_spaces_and_leave_little_out():
    words = [f"{noun}{day}" for day in range(12) for noun in tiny.NOUNS]
    document = " ".join(words)
    pieces = [passage.text for passage in cut_passages([document], 100, 50, seed=0)]
    assert {word for piece in pieces for word in piece.split()} <= set(words)
    assert sum(len(piece) for piece in pieces) > 0.9 * len(document)


def test_the_order_of_passages_depends_on_the_seed_alone():
    documents = [f"Day {number}" for number in range(20)]
    first, again, other = (cut_passages(documents, 20, 40, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert set(first) == set(other) == {Passage(document) for document in documents}


def test_prompt_format_is_filled_with_sentences():
    documents = ["The fox finds the hen. Too short. Where does\nthe river {text} run?", "One more sentence here"]
    prompts = fill_formats(draw_fillings(documents, 10, seed=0), ["Q: {text}\nA: {x}"])
    assert sorted(prompts) == [
        "Q: One more sentence here\nA: {x}",
        "Q: The fox finds the hen.\nA: {x}",
        "Q: Where does the river {text} run?\nA: {x}",
    ]
    assert len(draw_fillings(documents, 2, seed=0)) == 2


def test_half_of_the_fillings_are_questions_where_there_are_enough():
    questions = [f"Where does the river run on day {day}?" for day in range(12)]
    statements = [f"The river runs to the mill on day {day}." for day in range(60)]
    for asked, said, expected in ((12, 60, 10), (3, 60, 3), (0, 60, 0), (12, 8, 12)):
        fillings = draw_fillings([*questions[:asked], *statements[:said]], 20, seed=0)
        assert len(set(fillings)) == len(fillings) == 20
        assert sum(filling.endswith("?") for filling in fillings) == expected


def test_formats_take_turns():
    assert fill_formats("abcde", ["<{text}>", "{text}!"]) == ["<a>", "b!", "<c>", "d!", "<e>"]


@pytest.mark.parametrize("form", GENERIC_FORMATS)
def test_generic_formats_have_one_slot(form):
    check_prompt_format(form)
    assert form.count(SLOT) == 1


def test_formats_are_made_of_frequent_sentence_openings_and_headings():
    documents = [
        "This is a fox of the wood. This is the hen of the yard. This was not the mill.",
        "They said: the river runs on. Topic: the river and the mill. See Topic: hens and foxes.",
        "this is no opening at all. 3 foxes ran to the mill. Don't go to the river.",
    ]
    found = candidate_formats(documents, 1000)
    assert found[: len(GENERIC_FORMATS)] == list(GENERIC_FORMATS)
    made = [form.removeprefix("{text}\n") for form in found[len(GENERIC_FORMATS) :]]
    assert made == ["This", "This is", "This was", "They", "See", "Don't", "Don't go", "Topic:"]
    few = candidate_formats(documents, len(GENERIC_FORMATS) + 4)
    assert few == [*GENERIC_FORMATS, "{text}\nThis", "{text}\nThis is", "{text}\nTopic:"]


def test_text_without_sentences_leaves_the_generic_formats():
    assert candidate_formats(["日本語のテキスト"], 100) == list(GENERIC_FORMATS)


def test_a_prompt_format_without_slot_is_refused():
    with pytest.raises(UserError, match=r"--prompt-format has no \{text\} slot"):
        check_prompt_format("Question:")


def test_prompts_of_plain_lines_and_of_json_lines_are_the_same(tmp_path):
    prompts = ["Who finds the hen?", " Where? ", "Who hides?"]
    (tmp_path / "prompts.txt").write_text("\n".join([*prompts, "", prompts[0]]))
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    plain, lines = (read_prompts(str(tmp_path / f"prompts.{end}"), 10, seed=3) for end in ("txt", "jsonl"))
    assert plain == lines
    assert sorted(plain) == sorted(prompts)
    assert read_prompts(str(tmp_path / "prompts.txt"), 2, seed=3) == plain[:2]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", "\n \n", "holds no prompt; give at least one line"),
        ("other.jsonl", '{"text": "Who?"}\n', "line 1 has no text field 'prompt'"),
        ("broken.jsonl", "Who?\n", "line 1 is not JSON"),
    ],
)
def test_bad_prompt_files_are_refused_by_name(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=complaint) as caught:
        read_prompts(str(tmp_path / name), 5, seed=0)
    assert name in str(caught.value)


def test_missing_prompts_are_named():
    with pytest.raises(UserError, match="--prompts '/nowhere' is not a file"):
        read_prompts("/nowhere", 5, seed=0)


def test_half_of_the_sentences_have_others_in_front_of_them():
    sentences = [f"The river runs on day {day}{'?' if day % 3 == 0 else '.'}" for day in range(400)]
    joined = join_sentences(sentences, 3, seed=0)
    assert [text.endswith(last) for text, last in zip(joined, sentences, strict=True)] == [True] * 400
    lengths = Counter(text.count("The river") for text in joined)
    assert set(lengths) == {1, 2, 3}
    assert lengths[1] == pytest.approx(200, abs=40) and lengths[2] == pytest.approx(100, abs=30)
    # Only the last sentence may ask.
    assert all("?" not in text[:-1] for text in joined)
    assert join_sentences(sentences, 3, seed=0) == joined != join_sentences(sentences, 3, seed=1)


@pytest.mark.parametrize("sentences", [["Who is it?", "Where does it run?"], []])
def test_nothing_is_put_in_front_where_nothing_is_said(sentences):
    assert join_sentences(sentences, 3, seed=0) == sentences


def test_sentences_can_stay_alone():
    assert join_sentences(["The fox runs.", "The hen sleeps."], 1, seed=0) == ["The fox runs.", "The hen sleeps."]
