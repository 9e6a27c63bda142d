"""Byte-exact correspondence of two tokenizers: of their positions in a text and of their vocabularies.

Two tokenizers cut the same text at different places, but both spell its bytes. Counting the bytes that each token
consumes finds the positions where both models have read exactly the same text, and comparing what each piece spells
finds the part of the vocabulary on which their predictions can be compared.
"""

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from castlora.errors import UserError, first_line

Integers: TypeAlias = NDArray[np.int64]
Component: TypeAlias = dict[str, Any]

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_UNPRINTABLE = sorted(set(range(0x100)) - set(_PRINTABLE))
_BYTE_OF_CHARACTER = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + rank): byte for rank, byte in enumerate(_UNPRINTABLE)
}


class EncodedText(NamedTuple):
    """The tokens of one text.

    Attributes:
        ids: token ids, shape (tokens,).
        ends: UTF-8 bytes of the text consumed once each token is read, shape (tokens,), never decreasing.
    """

    ids: Integers
    ends: Integers


@dataclass(frozen=True, eq=False)
class ByteTokenizer:
    """A tokenizer that knows which bytes of a text each of its tokens consumes.

    Building one reads the whole vocabulary; encoding with it costs little more than plain encoding. It holds a copy of
    the tokenizer's backend, so truncation or padding set on the original do not reach it.

    Attributes:
        backend: the tokenizer without truncation and padding.
        spellings: for each id the bytes that the token spells in running text; None for special tokens, unknown
            tokens and ids without a token. A model's logits may have more columns than this (padded embeddings).
        byte_pieces: ids of the pieces written `<0xXX>` that stand for a single byte.
        eos_token_id: the end-of-sequence token, if the tokenizer has one.
        fingerprint: see `tokenizer_fingerprint`.
    """

    backend: Tokenizer
    spellings: tuple[bytes | None, ...]
    byte_pieces: frozenset[int]
    eos_token_id: int | None
    fingerprint: str

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "ByteTokenizer":
        """Reads the spelling of every token from the tokenizer's serialised backend.

        Raises:
            UserError: the tokenizer is not a fast one, or it is neither byte-level nor SentencePiece-type.
        """
        fast = _require_fast(tokenizer)
        serialised = _serialised_backend(fast)
        speller = _speller(serialised, _name(fast))
        try:
            backend = _backend_with_whole_offsets(serialised)
            special_ids, eos_token_id = fast.all_special_ids, fast.eos_token_id
        except Exception as error:  # What the tokenizers library raises has no type of its own.
            raise UserError(
                f"Tokenizer of {_name(fast)} contradicts itself ({first_line(error)}); copy its tokenizer.json again."
            ) from error
        backend.encode_special_tokens = fast.split_special_tokens
        return cls(
            backend=backend,
            spellings=_spellings(backend, serialised, speller, silent_ids=special_ids),
            byte_pieces=_byte_pieces(backend, speller),
            eos_token_id=eos_token_id,
            fingerprint=_digest(serialised),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> EncodedText:
        """Encodes one text; see `encode_batch`."""
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[EncodedText]:
        """Encodes texts and counts the bytes that each token consumes.

        The ends are exact, also within characters of several tokens, wherever the tokens spell the text. The space
        that SentencePiece-type tokenizers put before a text is no byte of it, so a token of this space alone
        consumes nothing, like a beginning-of-sequence token. Special tokens written out in the text consume their
        characters.

        Where the tokens do not spell the text (unknown characters, a literal `▁`, Unicode normalisation), the
        tokenizer's character offsets divide it into the smallest stretches that tokens and characters share. All
        tokens of such a stretch get its end, so that the last token with a given end is always the one that has
        consumed exactly those bytes. Characters that no token stands for go to the token before them.

        Args:
            texts: the texts to encode.
            add_special_tokens: whether to add the tokenizer's usual special tokens, as calling it does.

        Returns:
            One `EncodedText` per text. The last end is the length of the text in bytes, unless no token at all
            stands for the text.
        """
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [
            self._spelled_out(encoding.ids, text.encode()) or self._located(text, add_special_tokens)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _spelled_out(self, ids: list[int], text: bytes) -> EncodedText | None:
        """The exact answer, if the tokens together spell the text."""
        ends = _spelled_ends([self.spellings[token] or b"" for token in ids], text)
        return None if ends is None else EncodedText(np.array(ids, dtype=np.int64), ends)

    def _located(self, text: str, add_special_tokens: bool) -> EncodedText:
        """The answer by character offsets, exact in every stretch of the text that its own tokens spell."""
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        ids = np.array(encoding.ids, dtype=np.int64)
        ends = np.zeros(len(ids), dtype=np.int64)
        of_text = ~_added_by_template(encoding)
        if of_text.any():
            spelled = [self.spellings[token] or b"" for token in ids[of_text]]
            ends[of_text] = _located_ends(np.array(encoding.offsets)[of_text], spelled, text)
        return EncodedText(ids, np.maximum.accumulate(ends))


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes that each token spells in running text, by id.

    None stands for special tokens, unknown tokens and ids without a token. The leading space of a SentencePiece-type
    piece is spelled out, though at the start of a text it is no byte of the text. A model's vocabulary may be larger
    than this list (padded embeddings).

    Raises:
        UserError: the tokenizer is not a fast one, or it is neither byte-level nor SentencePiece-type.
    """
    return list(ByteTokenizer.from_tokenizer(tokenizer).spellings)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides how the tokenizer encodes and decodes; truncation and padding do not count.

    Raises:
        UserError: the tokenizer is not a fast one.
    """
    return _digest(_serialised_backend(_require_fast(tokenizer)))


def same_tokenizer(source: ByteTokenizer, target: ByteTokenizer) -> bool:
    """Whether both give every text the same ids, so that logits can be compared as they stand."""
    return (
        source.fingerprint == target.fingerprint
        and source.backend.encode_special_tokens == target.backend.encode_special_tokens
    )


def aligned_positions(ends_source: Integers, ends_target: Integers) -> tuple[Integers, Integers]:
    """The token positions where both tokenizers have consumed exactly the same bytes of the same text.

    Of several tokens with the same end the last one counts: its state has seen everything up to there.

    Args:
        ends_source: bytes consumed after each source token, shape (source tokens,), never decreasing.
        ends_target: the same for the target, shape (target tokens,).

    Returns:
        Positions in the source and in the target, both of shape (aligned,) and strictly increasing.
    """
    last_source = _last_of_each_end(ends_source)
    last_target = _last_of_each_end(ends_target)
    _, in_source, in_target = np.intersect1d(
        ends_source[last_source], ends_target[last_target], assume_unique=True, return_indices=True
    )
    return last_source[in_source], last_target[in_target]


def shared_vocabulary(source: ByteTokenizer, target: ByteTokenizer) -> tuple[Integers, Integers]:
    """The tokens that both vocabularies spell alike, and the end-of-sequence tokens, which are matched by role.

    Where a vocabulary spells the same bytes twice, an ordinary piece goes before a byte piece `<0xXX>`, then the
    lower id. All ids lie below `len(spellings)`; logits beyond that (padded embeddings) belong to no token.

    Returns:
        Source ids, strictly increasing, and the target id of each, without repetitions; both of shape (shared,).
    """
    ids_source, ids_target = _id_of_each_spelling(source), _id_of_each_spelling(target)
    pairs = {ids_source[spelling]: ids_target[spelling] for spelling in ids_source.keys() & ids_target.keys()}
    if source.eos_token_id is not None and target.eos_token_id is not None:
        pairs[source.eos_token_id] = target.eos_token_id
    shared = np.array(sorted(pairs.items()), dtype=np.int64).reshape(-1, 2)
    return shared[:, 0], shared[:, 1]


def _require_fast(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer {_name(tokenizer)} is not a fast tokenizer; use a model whose repository has a tokenizer.json"
        )
    return tokenizer


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)


def _serialised_backend(tokenizer: PreTrainedTokenizerFast) -> Component:
    serialised: Component = json.loads(tokenizer.backend_tokenizer.to_str())
    return serialised | {"truncation": None, "padding": None}


def _backend_with_whole_offsets(serialised: Component) -> Tokenizer:
    """The backend with offsets that include a token's own spaces; some post-processors trim them."""
    whole = copy.deepcopy(serialised["post_processor"])
    for step in _flat(whole):
        if "trim_offsets" in step:
            step["trim_offsets"] = False
    return Tokenizer.from_str(json.dumps(serialised | {"post_processor": whole}))


def _digest(serialised: Component) -> str:
    canonical = json.dumps(serialised, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class _ByteLevelSpeller:
    """Pieces are written in GPT-2's alphabet of 256 printable characters, one for each byte."""

    def spell(self, piece: str) -> bytes:
        if all(character in _BYTE_OF_CHARACTER for character in piece):
            return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
        return piece.encode()

    def is_byte_piece(self, piece: str) -> bool:
        return False


@dataclass(frozen=True)
class _SentencePieceSpeller:
    """Pieces are text in which a mark may stand for the space; bytes may have pieces `<0xXX>` of their own.

    Attributes:
        replacements: what the decoder replaces in each piece, and by what, in its order.
        byte_fallback: whether `<0xXX>` stands for a byte.
    """

    replacements: tuple[tuple[str, str], ...]
    byte_fallback: bool

    def spell(self, piece: str) -> bytes:
        if self.is_byte_piece(piece):
            return bytes.fromhex(piece[3:5])
        for mark, text in self.replacements:
            piece = piece.replace(mark, text)
        return piece.encode()

    def is_byte_piece(self, piece: str) -> bool:
        return self.byte_fallback and _BYTE_PIECE.fullmatch(piece) is not None


_Speller: TypeAlias = _ByteLevelSpeller | _SentencePieceSpeller


def _speller(serialised: Component, name: str) -> _Speller:
    """Recognises how pieces spell text from the components of the backend."""
    model = serialised["model"]
    marks_words = bool(model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
    before_model = [*_flat(serialised["normalizer"]), *_flat(serialised["pre_tokenizer"])]
    if not marks_words and any(step["type"] == "ByteLevel" for step in before_model):
        return _ByteLevelSpeller()
    decoder = _flat(serialised["decoder"]) or [step for step in before_model if step["type"] == "Metaspace"]
    if marks_words or not decoder or not all(_keeps_pieces_apart(step) for step in decoder):
        raise UserError(
            f"tokenizer {name} is neither byte-level nor SentencePiece-type, so its tokens cannot be traced to bytes; "
            "use a model with one of those tokenizers"
        )
    return _SentencePieceSpeller(
        replacements=tuple(_replacement(step) for step in decoder if step["type"] in ("Replace", "Metaspace")),
        byte_fallback=any(step["type"] == "ByteFallback" for step in decoder),
    )


def _flat(component: Component | None) -> list[Component]:
    """The steps of a normalizer, pre-tokenizer or decoder, with sequences opened."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    steps = next(value for value in component.values() if isinstance(value, list))
    return [inner for step in steps for inner in _flat(step)]


def _keeps_pieces_apart(step: Component) -> bool:
    """Whether a decoder step leaves what each piece spells independent of its neighbours."""
    if step["type"] == "Replace":
        return "String" in step["pattern"]
    return step["type"] in ("Metaspace", "ByteFallback", "Fuse", "Strip")


def _replacement(step: Component) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    return step["pattern"]["String"], step["content"]


def _spellings(
    backend: Tokenizer, serialised: Component, speller: _Speller, silent_ids: Iterable[int]
) -> tuple[bytes | None, ...]:
    spelled = {token: speller.spell(piece) for piece, token in backend.get_vocab(with_added_tokens=False).items()}
    model, added = serialised["model"], serialised["added_tokens"]
    # The text matches an added token as it is written, so outside the model's vocabulary no scheme applies to it.
    spelled = {token["id"]: token["content"].encode() for token in added} | spelled
    unknown = {model.get("unk_id"), backend.token_to_id(model.get("unk_token") or "")}
    silent = unknown | set(silent_ids) | {token["id"] for token in added if token["special"]}
    size = max(spelled, default=-1) + 1
    return tuple(None if token in silent else spelled.get(token) or None for token in range(size))


def _byte_pieces(backend: Tokenizer, speller: _Speller) -> frozenset[int]:
    vocabulary = backend.get_vocab(with_added_tokens=False)
    return frozenset(token for piece, token in vocabulary.items() if speller.is_byte_piece(piece))


def _id_of_each_spelling(tokenizer: ByteTokenizer) -> dict[bytes, int]:
    """One id per spelling, the preferred one."""
    ids = sorted(range(len(tokenizer.spellings)), key=lambda token: (token in tokenizer.byte_pieces, token))
    chosen: dict[bytes, int] = {}
    for token in ids:
        spelling = tokenizer.spellings[token]
        if spelling is not None:
            chosen.setdefault(spelling, token)
    return chosen


def _spelled_ends(spelled: Sequence[bytes], text: bytes) -> Integers | None:
    """Bytes consumed after each token if the tokens spell the text, up to a space put before it."""
    joined = b"".join(spelled)
    if joined == text:
        unwritten = 0
    elif joined[:1] == b" " and joined[1:] == text:
        unwritten = 1
    else:
        return None
    ends: Integers = np.fromiter(map(len, spelled), dtype=np.int64, count=len(spelled)).cumsum()
    return np.maximum(ends - unwritten, 0)


def _located_ends(offsets: Integers, spelled: Sequence[bytes], text: str) -> Integers:
    """Bytes consumed after each token of the text, from the tokens' character offsets of shape (tokens, 2)."""
    written = text.encode()
    byte_at = _byte_positions(text)
    reached = np.maximum.accumulate(offsets[:, 1])
    still_ahead = np.minimum.accumulate(offsets[::-1, 0])[::-1]
    borders = np.flatnonzero(reached[:-1] <= still_ahead[1:]) + 1
    firsts, afters = np.append(0, borders), np.append(borders, len(offsets))
    stops = byte_at[np.append(still_ahead[borders], len(text))]

    ends = np.repeat(stops, afters - firsts)
    for stretch in np.flatnonzero(afters - firsts > 1):
        first, after = firsts[stretch], afters[stretch]
        start, stop = byte_at[still_ahead[first]], byte_at[reached[after - 1]]
        exact = _spelled_ends(spelled[first:after], written[start:stop])
        if exact is not None:
            ends[first : after - 1] = start + exact[:-1]
    return ends


def _byte_positions(text: str) -> Integers:
    """The UTF-8 byte at which each character begins, and the length of the text; shape (characters + 1,)."""
    codepoints = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    lengths = 1 + (codepoints >= 0x80) + (codepoints >= 0x800) + (codepoints >= 0x10000)
    return np.concatenate([[0], lengths.cumsum()])


def _added_by_template(encoding: Encoding) -> NDArray[np.bool_]:
    """Which tokens the post-processor added around the text; special tokens written out in it are not among them."""
    return np.array(encoding.special_tokens_mask, dtype=bool)


def _last_of_each_end(ends: Integers) -> Integers:
    return np.flatnonzero(np.diff(ends, append=-1))
