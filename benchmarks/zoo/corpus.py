"""Reading the general corpus: JSON lines with `text` and `src`, gzip-compressed."""

from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset

from benchmarks.zoo.specs import LEFT_OUT_SOURCES, SIMPLE_SOURCES


def load_documents(corpus: Path, split: str) -> Dataset:
    """All documents of one split (`train` or `valid`) with columns `text` and `src`."""
    files = sorted(str(path) for path in corpus.glob(f"{split}*.jsonl.gz"))
    if not files:
        raise FileNotFoundError(f"{corpus}: no {split}*.jsonl.gz; point --corpus at the corpus folder")
    return load_dataset("json", data_files=files, split="train")


def pretraining_order(documents: Dataset, seed: int) -> Dataset:
    """Documents in the order they are consumed: simple sources are certain to be within a short budget.

    The simple-language part is spread evenly over the front of the order instead of coming first,
    so that no part of the training sees one kind of text alone.
    """
    sources = documents["src"]
    simple = [i for i, src in enumerate(sources) if src in SIMPLE_SOURCES]
    other = [i for i, src in enumerate(sources) if src not in SIMPLE_SOURCES and src not in LEFT_OUT_SOURCES]
    other_shuffled = documents.select(other).shuffle(seed=seed)
    front = other_shuffled.select(range(len(other) // 3))
    back = other_shuffled.select(range(len(other) // 3, len(other)))
    mixed_front = concatenate_datasets([documents.select(simple), front]).shuffle(seed=seed)
    return concatenate_datasets([mixed_front, back])
