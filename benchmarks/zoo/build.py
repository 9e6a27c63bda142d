"""Builds the whole zoo: tokenizers, base models, skills and adapters.

    python -m benchmarks.zoo.build --corpus CORPUS --tasks TASKS --third_party MODELS --out ZOO

What is finished is left as it is, and a base model goes on from its last checkpoint.
"""

import shutil
from pathlib import Path

import torch
from jsonargparse import auto_cli

from benchmarks.zoo import demo_items, skills, train_tokenizers
from benchmarks.zoo.pretrain import pretrain
from benchmarks.zoo.specs import ADAPTERS, BASE_MODELS
from benchmarks.zoo.train_adapters import adapter_folder, train_adapter


def main(corpus: Path, tasks: Path, third_party: Path, out: Path, threads: int = 1) -> None:
    """Trains what is missing.

    Args:
        corpus: folder with `train-*.jsonl.gz` and `valid.jsonl.gz`
        tasks: folder with the data sets as JSON lines
        third_party: folder of the base models that are not trained here
        out: the zoo folder
        threads: processor threads
    """
    torch.set_num_threads(threads)
    if not (out / "tokenizers").exists():
        train_tokenizers.main(corpus, out)
    if not (out / "tasks").exists():
        skills.main(tasks, corpus, out / "tasks")
    if not (out / "demo").exists():
        demo_items.main(out / "demo")
    for name in BASE_MODELS:
        if not (out / "models" / name / "training.json").exists():
            pretrain(name, corpus, out)
    for adapter in ADAPTERS:
        if not (out / "models" / adapter.base).exists():
            shutil.copytree(third_party / adapter.base, out / "models" / adapter.base)
        if not (adapter_folder(out, adapter.base, adapter.skill) / "training.json").exists():
            train_adapter(out, adapter.base, adapter.skill, steps=adapter.steps)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
