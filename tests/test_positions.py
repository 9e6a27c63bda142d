import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from castlora.alignment.positions import (
    AlignedPassage,
    align_passages,
    batches,
    bytes_per_token,
    collate,
    counted_places,
    thinned,
)
from castlora.alignment.tokens import ByteTokenizer
from castlora.errors import UserError
from castlora.text.passages import Passage

LLAMA = ByteTokenizer.from_tokenizer(tiny.sentencepiece_type(50))
MISTRAL = ByteTokenizer.from_tokenizer(tiny.sentencepiece_type(60))
GPT2 = ByteTokenizer.from_tokenizer(tiny.byte_level(300))
PAIRS = [(LLAMA, MISTRAL), (LLAMA, GPT2), (GPT2, MISTRAL), (GPT2, GPT2), (LLAMA, LLAMA)]
TEXTS = st.lists(st.sampled_from([*"ab é,日", *tiny.NOUNS, " the", "\n"]), max_size=15).map("".join)


def align(text: str, source=LLAMA, target=GPT2, answer_start=0, max_length=200, context_weight=0.1):
    return list(align_passages([Passage(text, answer_start)], source, target, max_length, context_weight))


def bytes_read(tokenizer: ByteTokenizer, ids: list[int], positions: list[int]) -> list[bytes]:
    """What the model has read at each position, up to the space that SentencePiece puts before a text."""
    spelled = [tokenizer.spellings[token] or b"" for token in ids]
    dummy_prefix = 1 if tokenizer is not GPT2 else 0
    return [b"".join(spelled[: at + 1])[dummy_prefix:] for at in positions]


@given(text=TEXTS, pair=st.sampled_from(PAIRS), max_length=st.integers(1, 30))
def test_both_models_have_read_the_same_bytes_at_every_position(text, pair, max_length):
    source, target = pair
    for aligned in align(text, source, target, max_length=max_length):
        of_source = bytes_read(source, aligned.source_ids, aligned.source_positions)
        of_target = bytes_read(target, aligned.target_ids, aligned.target_positions)
        assert of_source == of_target
        assert all(text.encode().startswith(read) and read for read in of_source)
        assert len(aligned.source_ids) <= max_length and len(aligned.target_ids) <= max_length
        assert max(aligned.source_positions) < len(aligned.source_ids)
        assert max(aligned.target_positions) < len(aligned.target_ids)
        assert aligned.weights == [1.0] * len(aligned.source_positions)


def test_the_last_position_has_read_the_whole_text():
    (aligned,) = align("The fox finds the hen.")
    assert bytes_read(GPT2, aligned.target_ids, aligned.target_positions)[-1] == b"The fox finds the hen."
    assert aligned.source_positions[-1] == len(aligned.source_ids) - 1


def test_one_tokenizer_is_aligned_with_itself_token_by_token():
    (aligned,) = align("The fox finds the hen.", GPT2, GPT2)
    assert aligned.source_positions == aligned.target_positions == list(range(len(aligned.source_ids)))
    (aligned,) = align("The fox finds the hen.", LLAMA, LLAMA)
    # The begin-of-text token and the space before the text have read nothing.
    assert aligned.source_positions == list(range(aligned.source_positions[0], len(aligned.source_ids)))


def test_no_position_counts_before_the_first_byte():
    (aligned,) = align("xyz", LLAMA, GPT2)
    assert bytes_read(LLAMA, aligned.source_ids, aligned.source_positions)[0] == b"x"
    assert aligned.target_positions[0] == 0


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("context_weight", [0.0, 0.1])
def test_positions_count_fully_from_where_the_answer_is_predicted(source, target, context_weight):
    prompt, answer = "Who finds the hen? Answer:", " the fox"
    (aligned,) = align(prompt + answer, source, target, len(prompt.encode()), context_weight=context_weight)
    read = bytes_read(source, aligned.source_ids, aligned.source_positions)
    assert prompt.encode() in read
    assert aligned.weights == [1.0 if len(prefix) >= len(prompt) else context_weight for prefix in read]


def test_a_prompt_without_an_answer_counts_at_its_end():
    prompt = "Who finds the hen? Answer:"
    (aligned,) = align(prompt, answer_start=len(prompt), context_weight=0.0)
    assert aligned.weights[-1] == 1.0
    assert sum(aligned.weights) == 1.0


def test_where_the_answer_is_cut_off_only_the_context_counts():
    prompt, answer = "Who finds the hen? Answer:", " the fox"
    (aligned,) = align(prompt + answer, answer_start=len(prompt), max_length=8)
    assert set(aligned.weights) == {0.1}
    assert align(prompt + answer, answer_start=len(prompt), max_length=8, context_weight=0.0) == []


def test_a_text_cut_off_within_a_character_of_several_tokens_ends_before_it():
    (aligned,) = align("ab日本", GPT2, GPT2, max_length=4)
    assert bytes_read(GPT2, aligned.source_ids, aligned.source_positions)[:2] == [b"a", b"ab"]
    assert len(aligned.source_ids) == 4


def test_passages_keep_their_order_over_groups():
    texts = [f"Day {number}" for number in range(1100)]
    aligned = list(align_passages(map(Passage, texts), GPT2, GPT2, 50, 0.1))
    assert [bytes_read(GPT2, one.source_ids, one.source_positions)[-1].decode() for one in aligned] == texts


@pytest.mark.parametrize("text", ["", " "])
def test_a_passage_without_a_position_that_counts_is_dropped(text):
    assert all(sum(aligned.weights) > 0 for aligned in align(text))
    assert align("") == []


SHORT = AlignedPassage([1, 2], [3], [0, 1], [0, 0], [0.1, 1.0])
LONG = AlignedPassage([4, 5, 6], [7, 8], [2], [1], [1.0])


def test_a_batch_is_padded_on_the_right_and_padding_does_not_count():
    batch = collate([SHORT, LONG])
    assert batch["source_ids"].tolist() == [[1, 2, 0], [4, 5, 6]]
    assert batch["source_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["target_ids"].tolist() == [[3, 0], [7, 8]]
    assert batch["target_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["source_positions"].tolist() == [[0, 1], [2, 0]]
    torch.testing.assert_close(batch["weights"], torch.tensor([[0.1, 1.0], [1.0, 0.0]]))
    assert batch["is_aligned"].tolist() == [[True, True], [True, False]]


def test_batches_go_through_all_passages_in_order():
    found = [batch["source_ids"][:, 0].tolist() for batch in batches([SHORT, LONG, LONG], 2, torch.device("cpu"))]
    assert found == [[1, 4], [4]]


def test_bytes_per_token():
    passages = [Passage("ab"), Passage("日")]
    count = sum(len(GPT2.encode(passage.text).ids) for passage in passages)
    assert bytes_per_token(passages, GPT2) == 5 / count


def test_counted_places_take_rows_of_each_passage():
    values = torch.randn(2, 4, 3)
    positions, counts = torch.tensor([[0, 3, 2], [1, 2, 0]]), torch.tensor([[True, True, False], [False, True, False]])
    assert torch.equal(
        values[counted_places(positions, counts)], torch.stack([values[0, 0], values[0, 3], values[1, 2]])
    )


def test_some_places_are_drawn_at_random_and_what_did_not_count_still_does_not():
    passages = tiny.aligned("llama", "gpt2", 40)
    passages[0].weights[:] = [0.0] * len(passages[0].weights)
    there = sum(len(passage.weights) for passage in passages)
    thin = thinned(passages, there // 4, 0)
    counted = sum(weight > 0 for passage in thin for weight in passage.weights)
    assert 0.15 * there < counted < 0.35 * there
    assert thin == thinned(passages, there // 4, 0) != thinned(passages, there // 4, 1)
    by_text = {tuple(passage.source_ids): passage for passage in passages}
    for passage in thin:
        whole = by_text[tuple(passage.source_ids)]
        assert passage.source_positions == whole.source_positions
        assert all(kept in (0.0, before) for kept, before in zip(passage.weights, whole.weights, strict=True))
    assert thinned(passages, there, 0) == passages
    with pytest.raises(UserError, match=rf"places is 0.001, too few of {there}; give several times the width"):
        thinned(passages, 0.001, 0)
