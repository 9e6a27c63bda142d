"""Trains the zoo's tokenizers: two SentencePiece-type ones and a byte-level BPE.

python -m benchmarks.zoo.train_tokenizers --corpus CORPUS --out ZOO
"""

import json
from pathlib import Path

from datasets import Dataset
from jsonargparse import auto_cli
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.zoo.corpus import load_documents
from benchmarks.zoo.specs import TOKENIZERS, TokenizerSpec

TRAINING_DOCUMENTS = 6000


def train_sentencepiece(texts: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """A Llama-2 style tokenizer: metaspace with a dummy prefix, byte fallback, digits one by one."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials + byte_pieces,
        limit_alphabet=110,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts["text"], trainer)
    return _as_llama(tokenizer, specials)


def _as_llama(trained: Tokenizer, specials: list[str]) -> PreTrainedTokenizerFast:
    """The trained merges in Llama-2's own form: no pre-tokenizer, byte pieces as ordinary pieces.

    Byte pieces must not stay special: the text "<0x41>" would otherwise be read as one of them.
    """
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(special, normalized=False, special=True) for special in specials])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def train_byte_level(texts: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """A GPT-2 style tokenizer; `<|endoftext|>` begins and ends every document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts["text"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=256
    )


def train(spec: TokenizerSpec, documents: Dataset) -> PreTrainedTokenizerFast:
    """Trains one tokenizer on the documents that its seed chooses."""
    texts = documents.shuffle(seed=spec.seed).select(range(min(TRAINING_DOCUMENTS, len(documents))))
    if spec.kind == "sentencepiece":
        return train_sentencepiece(texts, spec.vocab_size)
    return train_byte_level(texts, spec.vocab_size)


def main(corpus: Path, out: Path) -> None:
    """Trains every tokenizer of the zoo.

    Args:
        corpus: folder with `train-*.jsonl.gz`
        out: the zoo folder; tokenizers go to `OUT/tokenizers/NAME`
    """
    documents = load_documents(corpus, "train")
    for name, spec in TOKENIZERS.items():
        tokenizer = train(spec, documents)
        tokenizer.save_pretrained(out / "tokenizers" / name)
        print(f"{name}: {len(tokenizer)} pieces")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
