"""Puts finished models and adapters where they are kept: the demo's in the package, all others beside this file.

    python -m benchmarks.zoo.bundle --zoo ZOO

Models that are not finished yet are left for the next call.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jsonargparse import auto_cli

from benchmarks.zoo.specs import BASE_MODELS, LEFT_OUT_SOURCES
from castlora.demonstration.bundle import SOURCE, TARGET, DemoSkill, demo_models_path, demo_tasks_path

HERE = Path(__file__).parent
DEMO_SKILL = DemoSkill("question-type", "Question types", "Question: {text}\nType:")
NOT_KEPT = ("llama-s-later", "llama-s-deeper")
"""Models of which the repository has the training records alone, so that it stays small."""
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")

CARD = """\
# {name}

A small {family} language model for the tests, the demo and the benchmarks of castlora, and for nothing else.

| | |
|---|---|
| parameters | {parameters:,} |
| training tokens | {training_tokens:,} |
| validation loss | {loss:.3f} nats per token |
| validation perplexity | {perplexity:.3f} per byte |

Trained {beginning} on English Wikipedia (CC BY-SA), public-domain novels, tales and speeches, MedQuAD
(CC BY 4.0), US government web pages (CC0), OpenStax textbooks (CC BY 4.0), TinyStories (CDLA-Sharing-1.0), FairytaleQA
stories (Apache-2.0) and African Storybook (CC BY); left out: {left_out}. The training script and its settings are in
`benchmarks/zoo`.
"""


def bundle_model(name: str, zoo: Path, destination: Path) -> None:
    """Copies a base model and writes its card from the training record."""
    source = zoo / "models" / name
    record = json.loads((source / "training.json").read_text())
    destination.mkdir(parents=True, exist_ok=True)
    for file in MODEL_FILES:
        shutil.copyfile(source / file, destination / file)
    spec = BASE_MODELS[name]
    text = CARD.format(
        name=name,
        family=spec.architecture["model_type"],
        beginning=f"on from `{spec.successor_of}`" if spec.successor_of else "from random weights",
        parameters=record["parameters"],
        training_tokens=record["training_tokens"],
        loss=record["validation"]["loss"],
        perplexity=record["validation"]["perplexity_per_byte"],
        left_out=", ".join(LEFT_OUT_SOURCES),
    )
    metadata = ModelCardData(license="other", language="en", pipeline_tag="text-generation", tags=["castlora"])
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}").save(destination / "README.md")


def bundle_adapter(source: Path, destination: Path) -> None:
    """Copies an adapter without its training record."""
    destination.mkdir(parents=True, exist_ok=True)
    for file in ADAPTER_FILES:
        shutil.copyfile(source / file, destination / file)


def summary(record: Path) -> dict[str, Any]:
    """The training record of an adapter without its figures per item."""
    figures: dict[str, Any] = json.loads(record.read_text())
    for when in ("before", "after"):
        figures[when] = {name: value for name, value in figures[when].items() if name not in ("scores", "nlls")}
    return figures


def main(zoo: Path) -> None:
    """Copies all that is finished.

    Args:
        zoo: the folder that the training scripts wrote
    """
    (HERE / "training").mkdir(exist_ok=True)
    for name in BASE_MODELS:
        if not (zoo / "models" / name / "training.json").exists():
            continue
        if name not in NOT_KEPT:
            bundle_model(name, zoo, (demo_models_path() if name in (SOURCE, TARGET) else HERE / "models") / name)
        shutil.copyfile(zoo / "models" / name / "training.json", HERE / "training" / f"{name}.json")
        print(f"model {name}")
    skills = [summary(path) for path in sorted((zoo / "adapters").glob("*/*/training.json"))]
    (HERE / "training" / "skills.json").write_text(json.dumps(skills, indent=1) + "\n")
    for record in sorted((zoo / "adapters").glob("*/*/training.json")):
        base, skill = record.parent.parent.name, record.parent.name
        if base in NOT_KEPT:
            continue
        bundle_adapter(record.parent, HERE / "adapters" / base / skill)
        print(f"adapter {base}/{skill}")
        if skill == DEMO_SKILL.name and base in (SOURCE, TARGET):
            bundle_adapter(record.parent, DEMO_SKILL.adapter(base))
    tasks = demo_tasks_path() / DEMO_SKILL.name
    tasks.mkdir(parents=True, exist_ok=True)
    for part in ("test", "prompts"):
        shutil.copyfile(zoo / "demo" / f"{DEMO_SKILL.name}-{part}.jsonl", tasks / f"{part}.jsonl")
    (tasks / "skill.json").write_text(json.dumps(vars(DEMO_SKILL), indent=1) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
