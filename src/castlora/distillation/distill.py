"""Training the student (target + LoRA) to behave like the teacher (source + LoRA)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel, PeftModelForCausalLM
from torch import Tensor, nn
from torch.nn.utils import parametrize

from castlora.alignment.positions import AlignedPassage, Batch, Side, batches, counted_places
from castlora.alignment.vocabulary import SharedVocabulary
from castlora.config import Recipe
from castlora.distillation.divergence import compare
from castlora.distillation.objective import (
    between_positions,
    binary_kl,
    chunk_log_probabilities,
    class_log_probabilities,
    kl_divergence,
    relative_error,
    weighted_mean,
)
from castlora.distillation.rehearsal import drift_per_position
from castlora.distillation.teacher import Predictions, Teacher, predict
from castlora.errors import UserError

_HELD_OUT_BATCH = 16

Mean = Callable[[Tensor, Tensor], Tensor]
"""Mean of values under weights, both of one shape."""


class Student(nn.Module):
    """The target with its trainable LoRA, and the head that compares hidden states."""

    def __init__(self, model: PeftModel, hidden_size: int, teacher_hidden_size: int, with_head: bool) -> None:
        super().__init__()
        self.model = model
        self.hidden_size = hidden_size
        self.hidden_head = nn.Linear(hidden_size, teacher_hidden_size) if with_head else None

    def train(self, mode: bool = True) -> "Student":
        """Keeps dropout off: the teacher's predictions are exact, and noise in the student would only blur them."""
        # The Trainer calls this at every step, and walking through all modules takes longer than it looks.
        return super().train(False) if self.training else self

    def forward(
        self,
        taught: Predictions,
        batch: Batch,
        shared: SharedVocabulary,
        recipe: Recipe,
        mean: Mean = weighted_mean,
        rehearsed: tuple[Predictions, Batch] | None = None,
    ) -> dict[str, Tensor]:
        """The parts of the objective: those of `distillation_losses`, and `rehearsal` where it has a weight.

        All that gradients flow through is inside, as data-parallel training needs it.

        Args:
            taught: predictions of the teacher
            batch: the aligned passages that it has read
            shared: how the vocabularies correspond
            recipe: weights and temperature
            mean: of values (n,) under weights (n,)
            rehearsed: predictions of the bare target, and the passages of its own that it has read; None for none
        """
        losses = distillation_losses(taught, self.predict(batch), batch, self.hidden_head, shared, recipe, mean)
        if recipe.rehearsal_weight > 0:
            losses["rehearsal"] = mean(*self._drift(rehearsed))
        return losses

    def _drift(self, rehearsed: tuple[Predictions, Batch] | None) -> tuple[Tensor, Tensor]:
        """How far the student is from the bare target at each position, in nats, and the weights of the positions."""
        if rehearsed is None:
            nothing = torch.zeros(0, device=next(self.parameters()).device)
            return nothing, nothing
        kept, batch = rehearsed
        counts = batch["weights"] > 0
        with parametrize.cached():
            learned = predict(self.model, batch, "target")
        return drift_per_position(kept, learned, counts), batch["weights"][counts]

    def predict(self, batch: Batch) -> Predictions:
        """What the student predicts on a batch."""
        # PEFT looks at a weight more than once; maps need not be folded each time.
        with parametrize.cached():
            return predict(self.model, batch, "target", self.hidden_head is not None)

    def causal_lm(self) -> PeftModelForCausalLM:
        """The student as the language model that it is."""
        assert isinstance(self.model, PeftModelForCausalLM)
        return self.model

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that training changes, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def check_objective(shared: SharedVocabulary, recipe: Recipe) -> None:
    """Raises a UserError if no part of the objective compares these two models."""
    if shared.is_whole and recipe.kl_weight + recipe.mse_weight == 0:
        raise UserError(
            "chunk_weight compares different tokenizers, and these models have the same one; "
            "give kl_weight or mse_weight a weight."
        )


def read_batch(teacher: Teacher, student: Student, batch: Batch) -> tuple[Predictions, Predictions]:
    """What teacher and student predict on a batch; gradients flow into the student only."""
    return teacher.predict(batch), student.predict(batch)


def distillation_losses(
    taught: Predictions,
    learned: Predictions,
    batch: Batch,
    hidden_head: nn.Module | None,
    shared: SharedVocabulary,
    recipe: Recipe,
    mean: Mean = weighted_mean,
) -> dict[str, Tensor]:
    """The parts of the objective on one batch; those with weight 0 are left out.

    Args:
        taught: predictions of the teacher
        learned: predictions of the student
        batch: the aligned passages that both have read
        hidden_head: compares the student's hidden states with the teacher's; None leaves them out
        shared: how the vocabularies correspond
        recipe: weights and temperature
        mean: of values (n,) under weights (n,)

    Returns:
        `kl` and `chunk` in nats, `mse` as a share of the square of the teacher's hidden states; before weighting
    """
    weights = batch["weights"]
    counts = weights > 0
    with_text = recipe.chunk_weight > 0 and not shared.is_whole
    compared = counts if recipe.kl_weight > 0 else torch.zeros_like(counts)
    divergence, text = _divergence(taught, learned, compared, shared, recipe.temperature, with_text)
    losses = {}
    if recipe.kl_weight > 0:
        losses["kl"] = mean(divergence, weights[counts])
    if hidden_head is not None:
        # Inside prompts too: there they hold what the adapter makes of a question, and the head keeps the target from
        # having to predict questions as the source does.
        teacher_hidden = taught.hidden[counted_places(batch["source_positions"], batch["is_aligned"])].float()
        student_hidden = learned.hidden[counted_places(batch["target_positions"], batch["is_aligned"])].float()
        error = relative_error(hidden_head(student_hidden), teacher_hidden)
        losses["mse"] = mean(error, torch.ones_like(error))
    if with_text:
        losses["chunk"] = _chunk_loss(taught, learned, text, weights, shared, mean)
    return losses


def total_loss(losses: Mapping[str, Tensor], recipe: Recipe) -> Tensor:
    """The weighted sum of the parts."""
    weights = {
        "kl": recipe.kl_weight,
        "mse": recipe.mse_weight,
        "chunk": recipe.chunk_weight,
        "rehearsal": recipe.rehearsal_weight,
    }
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()


@dataclass(frozen=True)
class HeldOut:
    """How close the student is to the teacher on held-out text."""

    loss: float
    """The objective, weighted as in training."""
    kl: float
    """KL divergence per position, in nats, at temperature 1."""
    agreement: float
    """Share of positions where both models' likeliest next token is the same one."""


@torch.no_grad()
def measure_held_out(
    teacher: Teacher, student: Student, examples: Sequence[AlignedPassage], shared: SharedVocabulary, recipe: Recipe
) -> HeldOut:
    """Compares teacher and student on held-out passages; positions count as in training."""
    device = next(student.parameters()).device
    student.eval()
    losses, divergences, agreements, weights, of_batch = [], [], [], [], []
    by_length = sorted(examples, key=lambda passage: passage.length)
    for batch in batches(by_length, _HELD_OUT_BATCH, device):
        counts = batch["weights"] > 0
        taught, learned = read_batch(teacher, student, batch)
        parts = distillation_losses(taught, learned, batch, student.hidden_head, shared, recipe)
        losses.append(total_loss(parts, recipe))
        teacher_next = class_log_probabilities(taught.aligned(counts), shared.source_classes, shared.classes)
        student_next = class_log_probabilities(learned.aligned(counts), shared.target_classes, shared.classes)
        divergences.append(kl_divergence(teacher_next, student_next))
        agreements.append(teacher_next.argmax(-1) == student_next.argmax(-1))
        weights.append(batch["weights"][counts])
        of_batch.append(batch["weights"].sum())
    weight = torch.cat(weights)
    return HeldOut(
        float(weighted_mean(torch.stack(losses), torch.stack(of_batch))),
        float(weighted_mean(torch.cat(divergences), weight)),
        float(weighted_mean(torch.cat(agreements).float(), weight)),
    )


@torch.no_grad()
def shared_mass(
    model: nn.Module,
    examples: Sequence[AlignedPassage],
    side: Side,
    shared_ids: Tensor,
) -> float:
    """Mean probability that a model gives to the shared tokens at the aligned positions."""
    device = next(model.parameters()).device
    masses = [
        predict(model, batch, side).aligned(batch["weights"] > 0).softmax(-1)[:, shared_ids.to(device)].sum(-1)
        for batch in batches(examples, _HELD_OUT_BATCH, device)
    ]
    return float(torch.cat(masses).mean())


def _divergence(
    taught: Predictions,
    learned: Predictions,
    counts: Tensor,
    shared: SharedVocabulary,
    temperature: float,
    with_text: bool,
) -> tuple[Tensor, Tensor]:
    """KL at each place that counts, and the student's log-probability of each next token, shape (batch, kept tokens).

    The divergence is multiplied by temperature², which keeps gradients comparable across temperatures.
    """
    is_one_vocabulary = shared.is_whole and taught.logits.shape[-1] == learned.logits.shape[-1]
    classes = (None, None) if is_one_vocabulary else (shared.source_classes, shared.target_classes)
    teacher, student = (
        read.compared(counts, of_model) for read, of_model in zip((taught, learned), classes, strict=True)
    )
    following = learned.ids.roll(-1, dims=1).flatten() if with_text else None
    divergence, text = compare(teacher, student, shared.classes, temperature, following)
    return divergence * temperature**2, text.view(len(learned.ids), -1)


def _chunk_loss(
    taught: Predictions, learned: Predictions, text: Tensor, weights: Tensor, shared: SharedVocabulary, mean: Mean
) -> Tensor:
    """Chunk divergence over the stretches that classes of tokens leave open.

    These are the ones that a tokenizer cuts into several tokens, and the ones that begin with a target token whose
    class holds others: the class says how likely they are together, and only the text says which of them it is.
    """
    source_lengths, target_lengths = taught.positions.diff(dim=-1), learned.positions.diff(dim=-1)
    teacher = chunk_log_probabilities(taught.logits, taught.ids, taught.positions)
    student = between_positions(text, learned.positions)
    first_tokens = learned.ids.roll(-1, dims=1).gather(1, learned.positions[:, :-1])
    is_ambiguous = shared.target_is_ambiguous.to(first_tokens.device)[first_tokens]
    is_open = (source_lengths > 1) | (target_lengths > 1) | is_ambiguous
    is_chunk = (source_lengths > 0) & (target_lengths > 0)
    # The prediction of a chunk is made at its first position, whose weight it has.
    return mean(binary_kl(teacher, student), weights[:, :-1] * (is_chunk & is_open))
