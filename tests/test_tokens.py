import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from castlora.alignment.tokens import (
    ByteTokenizer,
    aligned_positions,
    same_tokenizer,
    shared_vocabulary,
    token_bytes,
    tokenizer_fingerprint,
)
from castlora.errors import UserError
from tests.tokenizers_under_test import (
    ALL,
    LOSSLESS,
    STORIES,
    byte_tokenizer,
    fast,
    gpt2_like,
    llama2_decoder,
    llama2_normalizer,
    normalised_metaspace,
    original,
    pieces,
    small_metaspace,
    small_metaspace_backend,
    trained_merges,
)

WORDS = ("the", " the", "12345", "7", "é", "e\u0301", "ﬁ", "日本", "Привет", "א", "\u0300", "🙂", "👩🏽‍🚀", "🇩🇪")
RIGHT_TO_LEFT = ("مرحبا", " שלום", "\u200f", "\u202b", "עם 123")
COMBINING = ("नमस्ते", "ก็", "ế", "e\u0323\u0302", "\u1100\u1161\u11a8")
CODE = ("def f(x):\n    return x[1:]\n", "\t\tif (a != b) {\r\n", "<div class='a'>", "x_1 = 0x41;")
SPACES = (" ", "  ", "\r\n", "\n", "\t", "\u00a0", "\u200a")
LOOK_ALIKES = ("<0x4>", "Ġ", "\x00", "<", "</")
WRITTEN = (*WORDS, *RIGHT_TO_LEFT, *COMBINING, *CODE, *SPACES, *LOOK_ALIKES)
NOT_SPELLED = ("<0x41>", "▁", "<s>", "</s>", "<unk>", "<|endoftext|>")


def texts_from(*snippets: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(snippets) | st.text(max_size=4), max_size=12).map("".join)


texts = texts_from(*WRITTEN, *NOT_SPELLED, "▁▁", " ▁", "<think>", "é ü")
plain_texts = texts_from(*WRITTEN).filter(lambda text: not any(snippet in text for snippet in NOT_SPELLED))
lossless = st.sampled_from(sorted(LOSSLESS))
many_examples = settings(max_examples=100, deadline=None)


def spans(tokenizer: ByteTokenizer, text: str, add_special_tokens: bool = True) -> list[bytes]:
    """The bytes of the text that each token consumes."""
    _, ends = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return [text.encode()[start:end] for start, end in itertools.pairwise([0, *ends])]


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the third-party model stories260K in ../shared/data/models")
def test_stories260k_writes_spaces_plainly_and_bytes_as_fallback_pieces():
    tokenizer = byte_tokenizer("stories260K")
    assert spans(tokenizer, "The 日") == [b"", b"The", b" ", *(bytes([byte]) for byte in "日".encode())]


@many_examples
@given(name=st.sampled_from(sorted(ALL)), text=texts)
def test_ends_partition_the_text(name, text):
    ids, ends = byte_tokenizer(name).encode(text)
    assert ids.tolist() == original(name)(text)["input_ids"]
    assert len(ids) == len(ends)
    assert (np.diff(ends, prepend=0) >= 0).all()
    if byte_tokenizer(name).encode(text, add_special_tokens=False).ids.size:
        assert ends[-1] == len(text.encode())


@many_examples
@given(name=lossless, text=plain_texts)
def test_every_token_consumes_exactly_the_bytes_it_spells(name, text):
    tokenizer = byte_tokenizer(name)
    spelled = [tokenizer.spellings[token] or b"" for token in tokenizer.encode(text).ids]
    if b"".join(spelled) != text.encode():
        first = next(position for position, spelling in enumerate(spelled) if spelling)
        assert spelled[first][:1] == b" "
        spelled[first] = spelled[first][1:]
    assert spans(tokenizer, text) == spelled


@many_examples
@given(name=lossless, text=plain_texts)
def test_offsets_give_the_same_ends_as_spellings(name, text):
    tokenizer = byte_tokenizer(name)
    by_offsets = tokenizer._located(text, add_special_tokens=True)
    np.testing.assert_array_equal(by_offsets.ends, tokenizer.encode(text).ends)


@many_examples
@given(name=lossless, parts=st.lists(plain_texts, min_size=1, max_size=4))
def test_special_tokens_written_in_the_text_consume_their_characters(name, parts):
    tokenizer = byte_tokenizer(name)
    mark = original(name).eos_token
    text = mark.join(parts)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    consumed = spans(tokenizer, text, add_special_tokens=False)
    assert [span for token, span in zip(ids, consumed, strict=True) if token == tokenizer.eos_token_id] == [
        mark.encode()
    ] * (len(parts) - 1)


@pytest.mark.parametrize("name", ALL)
def test_spellings_agree_with_decoding_after_another_token(name):
    tokenizer = byte_tokenizer(name)
    anchor = tokenizer.spellings.index(b"a")
    checked = 0
    for token, spelling in enumerate(tokenizer.spellings):
        if spelling is not None and spelling.isascii():
            assert tokenizer.backend.decode([anchor, token]) == "a" + spelling.decode()
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("name", sorted(LOSSLESS))
def test_a_byte_piece_written_in_the_text_consumes_its_characters(name):
    # A unigram model takes the piece for what it looks like, and not for the byte that it stands for.
    assert b"".join(spans(byte_tokenizer(name), "the <0x41> the")).endswith(b"<0x41> the")
    assert byte_tokenizer(name).encode("the <0x41> the").ends[-1] == len("the <0x41> the")


@many_examples
@given(source=lossless, target=lossless, text=plain_texts)
def test_aligned_positions_have_read_the_same_bytes(source, target, text):
    encoded = [byte_tokenizer(name).encode(text) for name in (source, target)]
    aligned = aligned_positions(*(ends for _, ends in encoded))
    read = []
    for name, (ids, _), positions in zip((source, target), encoded, aligned, strict=True):
        spelled = [byte_tokenizer(name).spellings[token] or b"" for token in ids]
        unwritten = len(b"".join(spelled)) - len(text.encode())
        read.append([b"".join(spelled[: position + 1])[unwritten:] for position in positions])
        assert (np.diff(positions) > 0).all()
        assert not text or positions[-1] == len(ids) - 1
    assert read[0] == read[1]


@given(
    st.lists(st.integers(0, 15), max_size=20).map(sorted),
    st.lists(st.integers(0, 15), max_size=20).map(sorted),
)
def test_aligned_positions_are_the_last_ones_of_all_common_ends(ends_source, ends_target):
    common = sorted(set(ends_source) & set(ends_target))
    positions = aligned_positions(np.array(ends_source, dtype=int), np.array(ends_target, dtype=int))
    for ends, found in zip((ends_source, ends_target), positions, strict=True):
        assert found.tolist() == [len(ends) - 1 - ends[::-1].index(end) for end in common]


def test_aligned_positions_by_hand():
    # <s> ▁ The quick | The qu ick
    positions = aligned_positions(np.array([0, 0, 3, 9]), np.array([3, 6, 9]))
    assert [side.tolist() for side in positions] == [[2, 3], [0, 2]]


def test_metaspace_by_hand():
    tokenizer = small_metaspace()
    assert spans(tokenizer, "ab b") == [b"", b"a", b"b", b" b"]
    assert spans(tokenizer, "b") == [b"", b"b"]
    assert spans(tokenizer, " a") == [b"", b"", b" a"]
    assert spans(tokenizer, "é") == [b"", b"", b"\xc3", b"\xa9"]
    assert spans(tokenizer, "") == [b""]


def test_a_space_is_put_before_every_stretch_between_special_tokens():
    assert spans(small_metaspace(), "a</s>b</s>é") == [b"", b"a", b"</s>", b"b", b"</s>", b"", b"\xc3", b"\xa9"]


def test_a_literal_mark_leaves_the_rest_of_the_text_exact():
    assert spans(small_metaspace(), "é▁bé") == [b"", b"", b"\xc3", b"\xa9", "▁b".encode(), b"\xc3", b"\xa9"]


def test_all_tokens_of_a_stretch_that_cannot_be_divided_get_its_end():
    tokenizer = byte_tokenizer("byte level with NFC")
    angstrom_sign, letter = "\u212b", "\u00c5"
    assert len(angstrom_sign.encode()) == 3
    assert spans(tokenizer, f"-{letter}-") == [b"-", b"\xc3", b"\x85", b"-"]
    assert spans(tokenizer, f"-{angstrom_sign}-") == [b"-", angstrom_sign.encode(), b"", b"-"]
    assert spans(tokenizer, "-A\u030a-") == [b"-", b"A\xcc\x8a", b"", b"-"]


def test_characters_that_no_token_stands_for_go_to_the_token_before_them():
    backend = pieces(["▁", "a", "b"], [], llama2_normalizer(), llama2_decoder(), byte_fallback=False)
    backend.normalizer = normalizers.Sequence([normalizers.Replace("-", ""), llama2_normalizer()])
    tokenizer = ByteTokenizer.from_tokenizer(fast(backend))
    assert spans(tokenizer, "a-b--") == [b"", b"", b"a-", b"b--"]
    assert spans(tokenizer, "aéb") == [b"", b"", b"a", "é".encode(), b"b"]


def test_encode_batch_agrees_with_encode():
    tokenizer = byte_tokenizer("normalised metaspace")
    batch = ["The end", "", "a▁b", "日本 </s> the"]
    for text, encoded in zip(batch, tokenizer.encode_batch(batch), strict=True):
        alone = tokenizer.encode(text)
        np.testing.assert_array_equal(encoded.ids, alone.ids)
        np.testing.assert_array_equal(encoded.ends, alone.ends)


def test_truncation_set_on_the_tokenizer_neither_applies_nor_is_lifted():
    tokenizer = gpt2_like()
    tokenizer("the", truncation=True, max_length=2)
    ids, ends = ByteTokenizer.from_tokenizer(tokenizer).encode("12345 the")
    assert len(ids) > 2
    assert ends[-1] == 9
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2


def test_split_special_tokens_is_respected():
    tokenizer = normalised_metaspace()
    tokenizer.split_special_tokens = True
    split = ByteTokenizer.from_tokenizer(tokenizer)
    assert split.eos_token_id not in split.encode("a</s>").ids
    assert not same_tokenizer(split, byte_tokenizer("normalised metaspace"))


def test_token_bytes_of_a_sentencepiece_type_tokenizer():
    spelled = token_bytes(fast(small_metaspace_backend()))
    assert spelled[:3] == [None, None, None]
    assert spelled[3 : 3 + 256] == [bytes([byte]) for byte in range(256)]
    assert spelled[3 + 256 :] == [b" ", b"a", b"b", b" a", b" b"]


def test_token_bytes_of_a_byte_level_tokenizer():
    tokenizer = gpt2_like()
    spelled = token_bytes(tokenizer)
    assert sorted(spelled[1:257]) == [bytes([byte]) for byte in range(256)]
    ids = {
        text: tokenizer.convert_tokens_to_ids(text) for text in ["Ġthe", "Ċ", "é", "<think>", "é ü", "<|endoftext|>"]
    }
    assert {text: spelled[token] for text, token in ids.items()} == {
        "Ġthe": b" the",
        "Ċ": b"\n",
        "é": b"\xe9",
        "<think>": b"<think>",
        "é ü": "é ü".encode(),
        "<|endoftext|>": None,
    }


def test_shared_vocabulary_by_hand():
    source = small_metaspace()
    backend = pieces(["b", "▁b", "c", "é"], [], None, llama2_decoder(), byte_fallback=False)
    target = ByteTokenizer.from_tokenizer(fast(backend))
    by_piece = [(source.backend.token_to_id(piece), target.backend.token_to_id(piece)) for piece in ("</s>", "b", "▁b")]
    by_byte = (source.backend.token_to_id("<0x63>"), target.backend.token_to_id("c"))
    ids_source, ids_target = shared_vocabulary(source, target)
    assert list(zip(ids_source, ids_target, strict=True)) == sorted([*by_piece, by_byte])


def test_end_of_sequence_is_shared_by_role():
    source, target = byte_tokenizer("normalised metaspace"), byte_tokenizer("GPT-2-like")
    pairs = dict(zip(*(side.tolist() for side in shared_vocabulary(source, target)), strict=True))
    assert pairs[source.eos_token_id] == target.eos_token_id
    without_eos = ByteTokenizer.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=source.backend))
    assert source.eos_token_id not in shared_vocabulary(without_eos, target)[0]


@pytest.mark.parametrize("name", ALL)
def test_shared_tokens_spell_the_same_bytes_one_to_one(name):
    source = byte_tokenizer(name)
    for target in map(byte_tokenizer, ALL):
        ids_source, ids_target = shared_vocabulary(source, target)
        assert (np.diff(ids_source) > 0).all()
        assert len(set(ids_target.tolist())) == len(ids_target)
        assert [source.spellings[token] for token in ids_source] == [target.spellings[token] for token in ids_target]
        spelled_by_both = (set(source.spellings) & set(target.spellings)) - {None}
        assert len(ids_source) == len(spelled_by_both) + 1


def test_same_tokenizer_knows_a_reloaded_one_and_minds_one_merge(tmp_path):
    vocabulary, merges = trained_merges(200)
    tokenizer = normalised_metaspace()
    tokenizer.save_pretrained(tmp_path)
    fewer = fast(pieces(vocabulary, merges[:-1], llama2_normalizer(), llama2_decoder()))
    same, reloaded, other = map(
        ByteTokenizer.from_tokenizer, (tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path), fewer)
    )
    assert same_tokenizer(same, reloaded)
    assert not same_tokenizer(same, other)


def test_fingerprint_does_not_depend_on_truncation():
    tokenizer = gpt2_like()
    tokenizer.pad_token = tokenizer.eos_token
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("the", truncation=True, padding="max_length", max_length=8)
    assert tokenizer_fingerprint(tokenizer) == before == byte_tokenizer("GPT-2-like").fingerprint
    assert len(before) == 64


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(UserError, match="'ByT5Tokenizer' is not a fast tokenizer"):
        ByteTokenizer.from_tokenizer(ByT5Tokenizer())


def test_tokenizers_whose_pieces_do_not_spell_text_are_refused():
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    suffixes = Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    suffixes.decoder = decoders.BPEDecoder()
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for backend in (wordpiece, suffixes, words):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="some/model")
        with pytest.raises(UserError, match="'some/model' is neither byte-level nor SentencePiece-type"):
            token_bytes(tokenizer)
