import itertools

import pytest
import tiny
import torch

from castlora.alignment.tokens import ByteTokenizer
from castlora.alignment.vocabulary import REST, SharedVocabulary, first_tokens

TOKENIZERS = {name: ByteTokenizer.from_tokenizer(tiny.family(name)[1]) for name in ("llama", "mistral", "gpt2")}
unlike_pairs = pytest.mark.parametrize(("source", "target"), list(itertools.permutations(TOKENIZERS, 2)))


def vocabulary(source: str, target: str, source_size: int | None = None, target_size: int | None = None):
    own, other = TOKENIZERS[source], TOKENIZERS[target]
    return SharedVocabulary.of(own, other, source_size or len(own.spellings), target_size or len(other.spellings))


def test_one_tokenizer_shares_its_whole_vocabulary():
    shared = vocabulary("llama", "llama")
    assert shared.is_whole
    assert shared.source_ids.tolist() == shared.target_ids.tolist() == list(range(309))
    assert torch.equal(shared.source_classes, shared.target_classes)
    assert len(set(shared.source_classes.tolist()) - {REST}) == 309


@unlike_pairs
def test_shared_tokens_are_in_one_class(source, target):
    shared = vocabulary(source, target)
    assert not shared.is_whole
    assert len(shared.source_ids) > 200
    classes = shared.source_classes[shared.source_ids]
    assert torch.equal(classes, shared.target_classes[shared.target_ids])
    assert (classes != REST).all()


@pytest.mark.parametrize("target", TOKENIZERS)
def test_what_the_source_cannot_tell_from_the_end_of_a_text_is_in_its_class(target):
    own, other = TOKENIZERS["llama"], TOKENIZERS[target]
    sizes = len(own.spellings) + 3, len(other.spellings)
    ends = (own.eos_token_id, 20, sizes[0] - 1)
    shared, plain = (SharedVocabulary.of(own, other, *sizes, source_ends) for source_ends in (ends, ends[:1]))
    assert not shared.is_whole and plain.is_whole == (target == "llama")
    assert set(shared.source_classes[list(ends)].tolist()) == {shared.target_classes[other.eos_token_id].item()}
    others = [token for token in range(sizes[0]) if token not in ends]
    assert torch.equal(shared.source_classes[others], plain.source_classes[others])
    assert torch.equal(shared.target_classes, plain.target_classes)


@pytest.mark.parametrize("source", TOKENIZERS)
def test_what_the_target_cannot_tell_from_the_end_of_a_text_is_in_its_class(source):
    own, other = TOKENIZERS[source], TOKENIZERS["llama"]
    sizes = len(own.spellings), len(other.spellings) + 3
    ends = (other.eos_token_id, 20, 300, sizes[1] - 1)
    shared, plain = (
        SharedVocabulary.of(own, other, *sizes, (own.eos_token_id,), target_ends) for target_ends in (ends, ends[:1])
    )
    assert not shared.is_whole and plain.is_whole == (source == "llama")
    end = shared.source_classes[own.eos_token_id].item()
    assert set(shared.target_classes[list(ends)].tolist()) == {end}
    others = [token for token in range(sizes[1]) if token not in ends]
    assert torch.equal(shared.target_classes[others], plain.target_classes[others])
    assert not shared.target_is_ambiguous[list(ends)].any()
    assert torch.equal(shared.target_is_ambiguous[others], plain.target_is_ambiguous[others])
    # No probability of the source lies where the target has no token.
    assert set(shared.source_classes.tolist()) - {REST} <= set(shared.target_classes.tolist())
    moved = (shared.source_classes != plain.source_classes).nonzero().flatten()
    assert len(moved) and set(shared.source_classes[moved].tolist()) == {end}


def test_a_model_may_not_predict_the_end_that_its_tokenizer_has():
    end = TOKENIZERS["llama"].eos_token_id
    assert len(vocabulary("llama", "gpt2", source_size=end).source_classes) == end


@unlike_pairs
def test_both_vocabularies_have_members_in_every_class(source, target):
    shared = vocabulary(source, target)
    members = [set(side.tolist()) - {REST} for side in (shared.source_classes, shared.target_classes)]
    assert members[0] == members[1] == set(range(1, shared.classes))


@unlike_pairs
def test_a_token_of_one_vocabulary_joins_the_first_token_of_its_spelling_in_the_other(source, target):
    shared = vocabulary(source, target)
    own, other = TOKENIZERS[source], TOKENIZERS[target]
    lone = set(range(len(own.spellings))) - set(shared.source_ids.tolist())
    told = 0
    for token in lone:
        spelling = own.spellings[token]
        if spelling is None or not spelling.isascii():
            continue
        ids = other.encode("a" + spelling.decode(), add_special_tokens=False).ids.tolist()
        spelled = [other.spellings[one] for one in ids]
        if b"a" in spelled[:2]:
            first = ids[spelled.index(b"a") + 1]
            assert shared.source_classes[token] == shared.target_classes[first]
            told += 1
    assert told > 0


def test_the_first_token_of_a_spelling():
    gpt2 = TOKENIZERS["gpt2"]
    spelled = [gpt2.spellings[token] for token in first_tokens(gpt2, [b" the", b"xyz", "日".encode(), b"\xe6"])]
    assert spelled == [b" the", b"x", b"\xe6", b"\xe6"]
    assert first_tokens(gpt2, [None]) == [None]


def test_tokens_that_a_model_cannot_predict_are_left_out():
    full, cut = vocabulary("llama", "gpt2"), vocabulary("llama", "gpt2", 270, 200)
    kept = (full.source_ids < 270) & (full.target_ids < 200)
    assert 0 < kept.sum() < len(kept)
    assert torch.equal(cut.source_ids, full.source_ids[kept]) and torch.equal(cut.target_ids, full.target_ids[kept])
    assert (len(cut.source_classes), len(cut.target_classes)) == (270, 200)


def test_padded_embeddings_belong_to_the_rest():
    shared = vocabulary("llama", "gpt2", 320, 304)
    assert shared.source_classes[309:].tolist() == [REST] * 11
    assert shared.target_classes[300:].tolist() == [REST] * 4
    assert len(shared.source_ids) == len(vocabulary("llama", "gpt2").source_ids)
