"""Trains the zoo's LoRA adapters in the ordinary way, and scores each base model before and after.

    python -m benchmarks.zoo.train_adapters --zoo ZOO --base llama-s --skill question-type

Writes ZOO/adapters/BASE/SKILL (SKILL-seed1 for seed 1, and so on): a PEFT adapter, its card, and training.json.
"""

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jsonargparse import auto_cli
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

from benchmarks.zoo.specs import ADAPTER_STEPS
from castlora.evaluation.accuracy import Evaluation, evaluate_model
from castlora.evaluation.tasks import TaskItem, load_task
from castlora.models.completions import encode_completion
from castlora.models.loading import load_model

BATCH_SIZE = 32
LEARNING_RATE = 4e-3
MAX_LENGTH = 256
IGNORED_LABEL = -100
ATTENTION_INPUTS = {"gpt2": ["c_attn"]}
"""Modules that hold queries and values, where they are not q_proj and v_proj."""


def adapter_folder(zoo: Path, base: str, skill: str, seed: int = 0) -> Path:
    return zoo / "adapters" / base / (skill if seed == 0 else f"{skill}-seed{seed}")


def training_set(items: list[TaskItem], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Prompt, completion and end-of-text token; only the last two are learned."""
    rows = []
    for item in items:
        tokens = encode_completion(tokenizer, item.prompt, item.completion, MAX_LENGTH - 1)
        ids = [*tokens.ids, tokenizer.eos_token_id]
        labels = [IGNORED_LABEL] * tokens.start + ids[tokens.start :]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "length": len(ids)})
    return Dataset.from_list(rows)


def lora_config(skill: dict[str, Any], model: PreTrainedModel) -> LoraConfig:
    everything = skill["modules"] == "all-linear"
    modules = "all-linear" if everything else ATTENTION_INPUTS.get(model.config.model_type, ["q_proj", "v_proj"])
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=skill["rank"],
        lora_alpha=2 * skill["rank"],
        target_modules=modules,
        fan_in_fan_out=model.config.model_type == "gpt2",
    )


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, items: list[TaskItem], seed: int, steps: int, rate: float
) -> list[dict[str, Any]]:
    """Trains the adapter in place and returns the log of the loss."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=math.ceil(steps / 20),
            weight_decay=0.0,
            train_sampling_strategy="group_by_length",
            seed=seed,
            data_seed=seed,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        tokenizer.pad_token = tokenizer.eos_token  # never attended to
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=training_set(items, tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def adapt(
    base_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Path, seed: int, steps: int, rate: float
) -> tuple[PeftModel, list[dict[str, Any]]]:
    """The base model with a LoRA that has learned the labels of a task, and the log of the loss."""
    description = json.loads((task / "skill.json").read_text(encoding="utf-8"))
    torch.manual_seed(seed)
    model = get_peft_model(base_model, lora_config(description, base_model))
    return model, train(model, tokenizer, load_task(task / "train.jsonl"), seed, steps, rate)


def figures(result: Evaluation) -> dict[str, Any]:
    return {
        "metric": result.metric,
        "score": result.score,
        "n": result.n,
        "ci95": list(result.ci95),
        "nll": result.nll,
        "scores": result.scores.tolist(),
        "nlls": [round(nll, 4) for nll in result.nlls.tolist()],
    }


CARD = """---
base_model: {base_id}
library_name: peft
pipeline_tag: text-generation
license: other
---

# {skill} for {base_id}

A LoRA adapter for tests and benchmarks: rank {rank}, modules {modules}, trained for {steps} steps of {batch} examples
on {data} ({licence}), seed {seed}. The licence of the data applies.

Prompt format, in which `{{text}}` stands for the input:

```
{prompt_format}
```

On {n} held-out items the {metric} rises from {before:.3f} to {after:.3f}.
"""


def train_adapter(
    zoo: Path, base: str, skill: str, seed: int = 0, steps: int = ADAPTER_STEPS, rate: float = LEARNING_RATE
) -> dict[str, Any]:
    """Trains, scores and saves one adapter; returns what training.json says."""
    task = zoo / "tasks" / skill
    description = json.loads((task / "skill.json").read_text(encoding="utf-8"))
    test_items = load_task(task / "test.jsonl")
    base_model, tokenizer = load_model(str(zoo / "models" / base))
    before = evaluate_model(base_model, tokenizer, test_items)
    started = time.monotonic()
    model, losses = adapt(base_model, tokenizer, task, seed, steps, rate)
    seconds = round(time.monotonic() - started, 1)
    after = evaluate_model(model, tokenizer, test_items)
    model.peft_config["default"].base_model_name_or_path = f"castlora/zoo-{base}"
    out = adapter_folder(zoo, base, skill, seed)
    model.save_pretrained(out)
    told = {key: description[key] for key in ("rank", "modules", "data", "licence", "prompt_format")}
    card = CARD.format(
        **told,
        base_id=f"castlora/zoo-{base}",
        skill=skill,
        steps=steps,
        batch=BATCH_SIZE,
        seed=seed,
        n=after.n,
        metric=after.metric.replace("_", " "),
        before=before.score,
        after=after.score,
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    record = {
        "skill": skill,
        "base": base,
        "seed": seed,
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "learning_rate": rate,
        **told,
        "seconds": seconds,
        "loss": [{"step": entry["step"], "loss": entry["loss"]} for entry in losses],
        "before": figures(before),
        "after": figures(after),
    }
    (out / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return record


def main(
    zoo: Path,
    base: str,
    skill: list[str],
    seed: int = 0,
    steps: int = ADAPTER_STEPS,
    rate: float = LEARNING_RATE,
    threads: int = 1,
) -> None:
    """Trains adapters for one base model.

    Args:
        zoo: folder with `models` and `tasks`; adapters go to `ZOO/adapters`
        base: name of the base model
        skill: names of the skills, as a list
        seed: chooses the start of the adapter and the order of the examples
        steps: optimizer steps
        rate: peak learning rate
        threads: processor threads
    """
    torch.set_num_threads(threads)
    for name in skill:
        record = train_adapter(zoo, base, name, seed, steps, rate)
        before, after = record["before"], record["after"]
        print(
            f"{base} {name} seed {seed}: {after['metric']} {before['score']:.3f} -> {after['score']:.3f}, "
            f"nll {before['nll']:.3f} -> {after['nll']:.3f}, {record['seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
