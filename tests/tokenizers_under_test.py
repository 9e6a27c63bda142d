"""Tokenizers of every kind that castlora reads, trained on a few lines or found in and beside the repository."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from castlora.alignment.tokens import ByteTokenizer

REPOSITORY = Path(__file__).parents[1]
STORIES = REPOSITORY.parent / "shared" / "data" / "models" / "stories260K-hf"

TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog, then over the fence; it didn't look back once.",
    "In 2024 there were 365 + 1 days, 12 months and  two  spaces,\r\n\ttabs and line ends\n\n    as well.",
    "Über den Wolken, naïve café, à bientôt, señor. Привет, мир! 日本語のテキスト。 안녕하세요 🙂🎉 e\u0301",
    "The end of the text is not the end of the tokens: the the then there these those their them.",
] * 3
SPECIALS = ["<unk>", "<s>", "</s>"]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
LINE_SPLIT = Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|[^\r\n\p{L}\p{N}]?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+")


def fast(backend: Tokenizer, eos: str = "</s>") -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)


def begin_of_sequence(backend: Tokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])


def pieces(
    vocabulary: Sequence[str],
    merges: Sequence[tuple[str, str]],
    normalizer: normalizers.Normalizer | None,
    decoder: decoders.Decoder,
    byte_fallback: bool = True,
) -> Tokenizer:
    """A SentencePiece-type tokenizer of these pieces, which puts `<s>` before every text."""
    known = dict.fromkeys([*SPECIALS, *(BYTE_PIECES if byte_fallback else []), *vocabulary])
    ids = {piece: token for token, piece in enumerate(known)}
    backend = Tokenizer(
        models.BPE(ids, list(merges), unk_token="<unk>", fuse_unk=byte_fallback, byte_fallback=byte_fallback)
    )
    backend.add_special_tokens([AddedToken(special, normalized=False, special=True) for special in SPECIALS])
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoder
    backend.post_processor = begin_of_sequence(backend)
    return backend


def llama2_normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def llama2_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


@functools.cache
def trained_merges(vocab_size: int) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, limit_alphabet=50, show_progress=False)
    backend.train_from_iterator(TRAINING_TEXT, trainer)
    vocabulary = backend.get_vocab()
    pairs = [(left, right) for left in vocabulary for right in vocabulary if left + right in vocabulary]
    pairs.sort(key=lambda pair: vocabulary[pair[0] + pair[1]])
    return tuple(sorted(vocabulary, key=vocabulary.__getitem__)), tuple(pairs)


def normalised_metaspace() -> PreTrainedTokenizerFast:
    return fast(pieces(*trained_merges(200), llama2_normalizer(), llama2_decoder()))


def pretokenised_metaspace() -> PreTrainedTokenizerFast:
    backend = pieces(*trained_merges(140), None, llama2_decoder())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_tokens(["<think>"])
    return fast(backend)


def metaspace_without_prefix() -> PreTrainedTokenizerFast:
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast(pieces(*trained_merges(170), normalizers.Replace(" ", "▁"), decoder))


def plain_spaces() -> PreTrainedTokenizerFast:
    vocabulary, merges = trained_merges(200)
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    spaced = [piece.replace("▁", " ") for piece in vocabulary]
    spaced_merges = [(left.replace("▁", " "), right.replace("▁", " ")) for left, right in merges]
    return fast(pieces(spaced, spaced_merges, normalizers.Prepend(" "), decoder))


def unigram_with_nfkc() -> PreTrainedTokenizerFast:
    vocabulary, _ = trained_merges(200)
    scores = [(special, 0.0) for special in SPECIALS] + [(piece, -float(len(vocabulary))) for piece in vocabulary]
    backend = Tokenizer(models.Unigram(scores, unk_id=0))
    backend.add_special_tokens([AddedToken(special, normalized=False, special=True) for special in SPECIALS])
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    end = ("</s>", backend.token_to_id("</s>"))
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return fast(backend)


def unigram_with_byte_fallback() -> PreTrainedTokenizerFast:
    vocabulary, _ = trained_merges(200)
    known = dict.fromkeys([*SPECIALS, *BYTE_PIECES, *vocabulary])
    # Longer pieces are likelier than their parts, as in a trained vocabulary.
    scores = [(piece, 0.0 if piece in SPECIALS else -10.0 - len(known) / (1 + len(piece))) for piece in known]
    backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    backend.add_special_tokens([AddedToken(special, normalized=False, special=True) for special in SPECIALS])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = llama2_decoder()
    backend.post_processor = begin_of_sequence(backend)
    return fast(backend)


def byte_level(
    vocab_size: int,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None = None,
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING_TEXT, trainer)
    backend.add_tokens(["<think>", "é ü"])
    return fast(backend, eos="<|endoftext|>")


def gpt2_like() -> PreTrainedTokenizerFast:
    return byte_level(400, pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama3_like() -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Split(LINE_SPLIT, behavior="isolated")
    return byte_level(350, pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]))


def byte_level_with_nfc() -> PreTrainedTokenizerFast:
    return byte_level(350, pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC())


def byte_level_with_prefix() -> PreTrainedTokenizerFast:
    return byte_level(330, pre_tokenizers.ByteLevel(add_prefix_space=True))


def available_tokenizers() -> list[Path]:
    """The tokenizers that lie in the repository: of the bundled demonstration and of the benchmark's zoo."""
    folders = [
        REPOSITORY / "src" / "castlora" / "demonstration" / "models",
        REPOSITORY / "benchmarks" / "zoo" / "models",
    ]
    return [path.parent for folder in folders for path in sorted(folder.glob("*/tokenizer.json"))]


LOSSLESS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "normalised metaspace": normalised_metaspace,
    "pretokenised metaspace": pretokenised_metaspace,
    "metaspace without prefix": metaspace_without_prefix,
    "plain spaces": plain_spaces,
    "unigram with byte fallback": unigram_with_byte_fallback,
    "GPT-2-like": gpt2_like,
    "Llama-3-like": llama3_like,
    "byte level with prefix": byte_level_with_prefix,
    **{path.name: functools.partial(PreTrainedTokenizerFast.from_pretrained, path) for path in available_tokenizers()},
}
if STORIES.is_dir():
    LOSSLESS["stories260K"] = functools.partial(PreTrainedTokenizerFast.from_pretrained, STORIES)
NORMALISING: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "unigram with NFKC": unigram_with_nfkc,
    "byte level with NFC": byte_level_with_nfc,
}
ALL = LOSSLESS | NORMALISING


@functools.cache
def original(name: str) -> PreTrainedTokenizerFast:
    return ALL[name]()


@functools.cache
def byte_tokenizer(name: str) -> ByteTokenizer:
    return ByteTokenizer.from_tokenizer(original(name))


def small_metaspace_backend() -> Tokenizer:
    return pieces(["▁", "a", "b", "▁a", "▁b"], [("▁", "a"), ("▁", "b")], llama2_normalizer(), llama2_decoder())


def small_metaspace() -> ByteTokenizer:
    return ByteTokenizer.from_tokenizer(fast(small_metaspace_backend()))
