"""Pretrains one base model of the zoo on the general corpus; resumes where it was stopped.

python -m benchmarks.zoo.pretrain --model llama-s --corpus CORPUS --out ZOO
"""

import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.zoo.corpus import load_documents, pretraining_order
from benchmarks.zoo.specs import BASE_MODELS, BLOCK_LENGTH, BaseModelSpec

BLOCKS_PER_STEP = 16
HIDDEN_LEARNING_RATE = 0.02
OTHER_LEARNING_RATE = 4e-3
WARMUP_FRACTION = 0.03
CHECKPOINT_EVERY_STEPS = 300
VALIDATION_DOCUMENTS = 300


def tokenize_blocks(documents, tokenizer: PreTrainedTokenizerFast, token_budget: int) -> np.ndarray:
    """Documents joined by begin and end marks, cut into blocks, shape (blocks, BLOCK_LENGTH)."""
    ids: list[int] = []
    for batch in documents.iter(batch_size=200):
        for document in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]:
            ids += [tokenizer.bos_token_id, *document, tokenizer.eos_token_id]
        if len(ids) >= token_budget:
            break
    blocks = min(len(ids), token_budget) // BLOCK_LENGTH
    return np.array(ids[: blocks * BLOCK_LENGTH], dtype=np.uint16).reshape(blocks, BLOCK_LENGTH)


def make_optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, norms and biases."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    hidden = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    other = [p for p in model.parameters() if p.ndim != 2 or id(p) in embeddings]
    return [
        torch.optim.Muon(hidden, lr=HIDDEN_LEARNING_RATE, weight_decay=0.02),
        torch.optim.AdamW(other, lr=OTHER_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    warmup = max(1, round(WARMUP_FRACTION * steps))
    return min((step + 1) / warmup, (steps - step) / (steps - warmup))


@torch.no_grad()
def validation_figures(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, corpus: Path) -> dict[str, float]:
    """Loss in nats per token and perplexity per byte on the first validation documents."""
    documents = load_documents(corpus, "valid").select(range(VALIDATION_DOCUMENTS))
    blocks = tokenize_blocks(documents, tokenizer, token_budget=10**9)
    text_bytes = sum(len(text.encode()) for text in documents["text"])
    losses = []
    for start in range(0, len(blocks), BLOCKS_PER_STEP):
        batch = torch.from_numpy(blocks[start : start + BLOCKS_PER_STEP].astype(np.int64))
        losses += [float(model(input_ids=batch, labels=batch, use_cache=False).loss)] * len(batch)
    loss = float(np.mean(losses))
    nats_per_byte = loss * blocks.size / text_bytes
    return {"loss": loss, "perplexity_per_byte": math.exp(nats_per_byte), "tokens": int(blocks.size)}


class _Training:
    """Forward and backward on a compiled copy, in bf16 or fp32; the optimizers keep fp32 weights."""

    def __init__(self, master: PreTrainedModel, dtype: torch.dtype) -> None:
        self.master = list(master.parameters())
        self.model = AutoModelForCausalLM.from_config(master.config, dtype=dtype)
        self.compiled = torch.compile(self.model)

    def loss_and_gradients(self, batch: torch.Tensor) -> float:
        with torch.no_grad():
            for copy, master in zip(self.model.parameters(), self.master, strict=True):
                copy.copy_(master)
        total = 0.0
        for half in batch.split(BLOCKS_PER_STEP // 2):
            loss = self.compiled(input_ids=half, labels=half, use_cache=False).loss / 2
            loss.backward()
            total += float(loss.detach())
        for copy, master in zip(self.model.parameters(), self.master, strict=True):
            assert copy.grad is not None
            master.grad = copy.grad.float()
            copy.grad = None
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        return total


def _save_checkpoint(path: Path, step: int, model, optimizers, log: list) -> None:
    state = {"step": step, "model": model.state_dict(), "log": log}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def begin(spec: BaseModelSpec, tokenizer: PreTrainedTokenizerFast, out: Path) -> PreTrainedModel:
    """The model before its first step: with random weights, or those of the model that it succeeds."""
    torch.manual_seed(spec.seed)
    config = spec.config(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if spec.successor_of is None:
        return model
    before = AutoModelForCausalLM.from_pretrained(out / "models" / spec.successor_of, dtype=torch.float32)
    if spec.layers is None:
        return before
    weights = before.state_dict()
    model.load_state_dict({name: weights[_name_before(name, spec.layers)] for name in model.state_dict()})
    return model


def _name_before(name: str, layers: Sequence[int]) -> str:
    """The name of a weight in the model whose layers a model begins with."""
    return re.sub(r"(?<=\.)\d+(?=\.)", lambda number: str(layers[int(number[0])]), name, count=1)


def pretrain(name: str, corpus: Path, out: Path) -> dict:
    """Trains to the end of the token budget and returns the training record."""
    spec = BASE_MODELS[name]
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizers" / spec.tokenizer)
    model = begin(spec, tokenizer, out)
    documents = pretraining_order(load_documents(corpus, "train"), seed=spec.seed)
    blocks = tokenize_blocks(documents, tokenizer, spec.tokens)
    order = np.random.default_rng(spec.seed).permutation(len(blocks))
    steps = len(blocks) // BLOCKS_PER_STEP
    optimizers = make_optimizers(model)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    training = _Training(model, getattr(torch, spec.precision))

    checkpoint = out / "models" / f"{name}.checkpoint"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    first_step, log = 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first_step, log = state["step"], state["log"]
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
    started, window = time.time(), []
    for step in range(first_step, steps):
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(step, steps)
        rows = blocks[order[step * BLOCKS_PER_STEP : (step + 1) * BLOCKS_PER_STEP]]
        window.append(training.loss_and_gradients(torch.from_numpy(rows.astype(np.int64))))
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % 50 == 0:
            tokens = (step + 1) * BLOCKS_PER_STEP * BLOCK_LENGTH
            rate = (step + 1 - first_step) * BLOCKS_PER_STEP * BLOCK_LENGTH / (time.time() - started)
            log.append({"tokens": tokens, "loss": round(float(np.mean(window)), 4)})
            window = []
            remaining = (steps - step - 1) * BLOCKS_PER_STEP * BLOCK_LENGTH / rate / 60
            print(
                f"{name} {step + 1}/{steps} loss {log[-1]['loss']:.3f} {rate:.0f} tok/s {remaining:.0f} min left",
                flush=True,
            )
        if (step + 1) % CHECKPOINT_EVERY_STEPS == 0:
            _save_checkpoint(checkpoint, step + 1, model, optimizers, log)
    model.to(torch.bfloat16).save_pretrained(out / "models" / name)
    tokenizer.save_pretrained(out / "models" / name)
    model.float()
    record = {
        "model": name,
        "parameters": model.num_parameters(),
        "precision": spec.precision,
        "training_tokens": steps * BLOCKS_PER_STEP * BLOCK_LENGTH,
        "training_loss": log,
        "validation": validation_figures(model, tokenizer, corpus),
    }
    (out / "models" / name / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def main(model: str, corpus: Path, out: Path, threads: int = 1) -> None:
    """Pretrains one base model.

    Args:
        model: a name from `specs.BASE_MODELS`
        corpus: folder with `train-*.jsonl.gz` and `valid.jsonl.gz`
        out: the zoo folder; the model goes to `OUT/models/MODEL`
        threads: processor threads
    """
    torch.set_num_threads(threads)
    record = pretrain(model, corpus, out)
    print(json.dumps(record["validation"]))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
