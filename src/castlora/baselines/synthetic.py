"""Synthetic data in the manner of Trans-LoRA, arXiv 2405.17258, and TiTok, arXiv 2510.04682.

Source + LoRA writes answers, and a fresh LoRA on the target learns them as if they were labels. What the adapter
contributes is told by the contrastive excess: how much likelier source + LoRA finds a piece of an answer than the bare
source does (TiTok). The answers with the most of it are kept, and of those the pieces with the most of it. Trans-LoRA
filters by a discriminator instead, which needs the adapter's training data.
"""

import math
import tempfile
from collections.abc import Sequence

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from castlora.alignment.positions import AlignedPassage, Batch, batches
from castlora.distillation.objective import chunk_log_probabilities
from castlora.distillation.teacher import predict

PASSAGE_SHARE = 0.5
"""Share of the answered prompts that is kept; TiTok writes twice what it keeps."""
PIECE_SHARE = 0.7
"""Share of the pieces of a kept answer that is learned, as published."""
IGNORED_LABEL = -100

LabelledPassage = dict[str, list[int]]
"""`input_ids`, `attention_mask` and `labels` of a passage in the target's tokens."""


@torch.no_grad()
def contrastive_excess(teacher: PeftModel, passages: Sequence[AlignedPassage], batch_size: int) -> list[Tensor]:
    """How much likelier the adapter makes each piece of text between neighbouring aligned positions.

    Args:
        teacher: source + LoRA
        passages: the text, aligned
        batch_size: passages read at once

    Returns:
        per passage log p_{source + LoRA} - log p_source per source token, in nats, shape (aligned - 1,); -inf for
        pieces of the prompt
    """
    excess = []
    for batch in batches(passages, batch_size, next(teacher.parameters()).device):
        adapted = predict(teacher, batch, "source")
        with teacher.disable_adapter():
            bare = predict(teacher, batch, "source")
        gained = chunk_log_probabilities(adapted.logits, adapted.ids, adapted.positions)
        gained -= chunk_log_probabilities(bare.logits, bare.ids, bare.positions)
        tokens = adapted.positions.diff(dim=-1)
        is_answer = (batch["weights"][:, :-1] == 1) & (tokens > 0)
        excess += list((gained / tokens).where(is_answer, -math.inf).cpu())
    return [row[: len(passage.weights) - 1] for row, passage in zip(excess, passages, strict=True)]


def label_by_excess(
    passages: Sequence[AlignedPassage],
    excess: Sequence[Tensor],
    passage_share: float = PASSAGE_SHARE,
    piece_share: float = PIECE_SHARE,
) -> list[LabelledPassage]:
    """The passages with the largest mean excess, labelled where their answers have the most of it.

    Args:
        passages: the text, aligned
        excess: as `contrastive_excess` gives it
        passage_share: share of the passages to keep
        piece_share: share of the pieces of an answer to label, at least one
    """
    answered = [index for index, row in enumerate(excess) if row.isfinite().any()]
    means = {index: float(excess[index][excess[index].isfinite()].mean()) for index in answered}
    kept = sorted(answered, key=means.__getitem__, reverse=True)[: math.ceil(passage_share * len(answered))]
    return [_label(passages[index], excess[index], piece_share) for index in sorted(kept)]


def learn_labels(
    student: PeftModel, labelled: Sequence[LabelledPassage], steps: int, batch_size: int, rate: float, seed: int
) -> None:
    """Trains the student's adapter on labels.

    Args:
        student: changed in place
        labelled: passages with labels, in the student's tokens
        steps: optimizer steps
        batch_size: passages per step
        rate: peak learning rate
        seed: of the order of the passages
    """
    with tempfile.TemporaryDirectory() as state:
        arguments = TrainingArguments(
            output_dir=state,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(steps / 20),
            weight_decay=0.0,
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        rows = Dataset.from_list(list(labelled))
        Trainer(model=student, args=arguments, train_dataset=rows, data_collator=_collate).train()


def _collate(rows: Sequence[LabelledPassage]) -> Batch:
    padding = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED_LABEL}
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }


def _label(passage: AlignedPassage, excess: Tensor, piece_share: float) -> LabelledPassage:
    pieces = int(excess.isfinite().sum())
    chosen = excess.topk(max(1, math.ceil(piece_share * pieces))).indices.tolist()
    labels = [IGNORED_LABEL] * len(passage.target_ids)
    for piece in chosen:
        tokens = slice(passage.target_positions[piece] + 1, passage.target_positions[piece + 1] + 1)
        labels[tokens] = passage.target_ids[tokens]
    return {"input_ids": passage.target_ids, "attention_mask": [1] * len(labels), "labels": labels}
