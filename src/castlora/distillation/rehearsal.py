"""Rehearsal: text that the bare target writes itself, on which training keeps its predictions as they are.

Training on a task leaves open what becomes of all other text, and small models lose most of it. What a language model
writes from nothing is a sample of what it was trained on, so that no corpus is needed to hold on to that
(self-synthesized rehearsal, arXiv 2403.01244; data-free distillation, arXiv 2305.17888).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from castlora.alignment.positions import AlignedPassage, Batch, batches
from castlora.distillation.divergence import compare
from castlora.distillation.objective import weighted_mean
from castlora.distillation.teacher import Predictions, Teacher, predict
from castlora.models.completions import begin_token, end_tokens

PASSAGES_PER_REHEARSED = 4
"""Passages of a training for each of its own that the target rehearses beside them."""
_BATCH = 64


@torch.no_grad()
def write_passages(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, count: int, max_tokens: int, seed: int
) -> list[list[int]]:
    """What a model writes when nothing is asked of it, sampled at temperature 1.

    Args:
        model: a bare base model
        tokenizer: its tokenizer
        count: passages to write
        max_tokens: of a passage, with the one that it begins with
        seed: of the sampling

    Returns:
        `count` lists of token ids. Each begins with the token that begins texts, where the tokenizer has one, and
        with any token otherwise; what ends texts stands in none.
    """
    torch.manual_seed(seed)
    ends = end_tokens(model, tokenizer)
    first = begin_token(tokenizer)
    written: list[list[int]] = []
    for start in tqdm(range(0, count, _BATCH), desc="the target writes what it rehearses", unit="batch"):
        shape = (min(_BATCH, count - start), 1)
        begins = torch.randint(len(tokenizer), shape) if first is None else torch.full(shape, first)
        # What PreTrainedModel.generate is, its types do not say.
        generate: Any = model.generate
        rows = generate(
            input_ids=begins.to(model.device),
            attention_mask=torch.ones_like(begins).to(model.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=max_tokens - 1,
            pad_token_id=ends[0] if ends else 0,
            eos_token_id=ends or None,
        )
        written += [[row[0], *takewhile(lambda token: token not in ends, row[1:])] for row in rows.tolist()]
    return written


def rehearsed(ids: Sequence[int]) -> AlignedPassage:
    """A text of the target for a teacher and a student that both are the target; every prediction counts."""
    places = list(range(len(ids)))
    return AlignedPassage(list(ids), list(ids), places, places, [1.0] * len(places))


@dataclass(frozen=True)
class BareTarget:
    """The target without its update, as the teacher of what is to be kept."""

    student: PeftModel

    @torch.no_grad()
    def predict(self, batch: Batch) -> Predictions:
        """What the bare target predicts on a batch."""
        with self.student.disable_adapter():
            return predict(self.student, batch, "target")


@dataclass(frozen=True)
class Rehearsal:
    """What the student must not unlearn."""

    bare: Teacher
    """Predicts on the passages as the bare target."""
    passages: Sequence[AlignedPassage]
    """Text that the target wrote, for training."""
    held_out_bare: Teacher
    """Predicts on the held-out ones as the bare target."""
    held_out: Sequence[AlignedPassage]
    """The same, kept out of training."""


def drift_per_position(kept: Predictions, learned: Predictions, counts: Tensor) -> Tensor:
    """KL(bare target ‖ student) in nats, shape (counted,).

    Args:
        kept: predictions of the bare target
        learned: predictions of the student on the same batch
        counts: positions that count, shape (batch, aligned)
    """
    teacher, student = (read.compared(counts, None) for read in (kept, learned))
    divergence, _ = compare(teacher, student, kept.logits.shape[-1])
    return divergence


@torch.no_grad()
def measure_drift(bare: Teacher, student: PeftModel, passages: Sequence[AlignedPassage]) -> float:
    """Mean KL(bare target ‖ student) per position of text that the bare target wrote, in nats.

    Args:
        bare: predicts as the bare target
        student: the PEFT model around the target, its update acting
        passages: kept out of training
    """
    drifts, weights = [], []
    for batch in batches(passages, _BATCH, next(student.parameters()).device):
        counts = batch["weights"] > 0
        drifts.append(drift_per_position(bare.predict(batch), predict(student, batch, "target"), counts))
        weights.append(batch["weights"][counts])
    return float(weighted_mean(torch.cat(drifts), torch.cat(weights)))
