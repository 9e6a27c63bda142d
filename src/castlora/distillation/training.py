"""Training: batches of the two kinds of passages, the Trainer, and its schedule."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from castlora.alignment.positions import AlignedPassage, Batch, Examples, collate
from castlora.alignment.vocabulary import SharedVocabulary
from castlora.config import DEFAULT, Recipe
from castlora.distillation.distill import Student, total_loss
from castlora.distillation.rehearsal import PASSAGES_PER_REHEARSED, Rehearsal
from castlora.distillation.teacher import Teacher
from castlora.distillation.tracking import PROJECT
from castlora.errors import UserError
from castlora.execution.launcher import process_count
from castlora.execution.processes import from_all, from_main, share_of_batch, share_of_mean, wait_for_all
from castlora.execution.run_directory import seal
from castlora.models.loading import best_device

TRAINABLE_FILE = "trainable.safetensors"
WARMUP_FRACTION = 0.05
# With the usual 0.999 the huge gradients of the first steps would keep all later ones small.
ADAM_BETAS = (0.9, 0.98)
# Only models narrower than about 128 would go beyond it, and one of width 64 was seen to lose what it had learned.
_HIGHEST_LEARNING_RATE = 0.01
_BATCHES_SORTED_TOGETHER = 8
_LOGS = 50
_MEASURES = 10
PASSAGES_PER_MEASURE = 64
"""Fewest passages of a training between two measurements, each of which reads twice as many."""

Measure = Callable[[], Mapping[str, float]]
"""Measures the student as it stands, by names that the log takes."""


@dataclass(frozen=True)
class Lesson:
    """What a step reads: a passage, and with some of them one that the target rehearses."""

    passage: AlignedPassage
    rehearsed: AlignedPassage | None


def lessons(passages: Sequence[AlignedPassage], rehearsed: Sequence[AlignedPassage]) -> list[Lesson]:
    """The passages in their order; every fourth comes with the next of those that are rehearsed, again and again."""
    turns = cycle(rehearsed)
    return [
        Lesson(passage, next(turns) if rehearsed and index % PASSAGES_PER_REHEARSED == 0 else None)
        for index, passage in enumerate(passages)
    ]


def collate_lessons(batch: Sequence[Lesson]) -> dict[str, Batch]:
    """The passages of a batch and those that are rehearsed with them, each padded; the latter may be none."""
    rehearsed = [lesson.rehearsed for lesson in batch if lesson.rehearsed]
    return {
        "passages": collate([lesson.passage for lesson in batch]),
        "rehearsed": collate(rehearsed) if rehearsed else {},
    }


class DistillationTrainer(Trainer):
    """A Trainer whose batches hold both models' tokens and whose checkpoints hold only what is trained."""

    def __init__(
        self,
        teacher: Teacher,
        student: Student,
        examples: Sequence[AlignedPassage],
        shared: SharedVocabulary,
        recipe: Recipe,
        arguments: TrainingArguments,
        rehearsal: Rehearsal | None = None,
        measure: Measure | None = None,
    ) -> None:
        optimizer = torch.optim.AdamW(
            _parameter_groups(student, recipe), betas=ADAM_BETAS, weight_decay=0.0, fused=True
        )
        warmup = max(1, round(WARMUP_FRACTION * recipe.steps))
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, recipe.steps)
        # Frozen weights are alike in all processes, or each has its part of them.
        frozen = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(student, frozen)
        # On a machine with several, the Trainer would hand a batch for each to one process.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        self.lessons = lessons(examples, rehearsal.passages if rehearsal else ())
        super().__init__(
            model=student,
            args=arguments,
            data_collator=collate_lessons,
            train_dataset=Examples(self.lessons),
            optimizers=(optimizer, schedule),
        )
        self.teacher = teacher
        self.rehearsal = rehearsal
        self.measure = measure
        self.shared = shared
        self.recipe = recipe
        self.parts: dict[str, list[float]] = {}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The distillation objective on this process's share of a batch; its mean over the processes is the batch's."""
        passages, rehearsed = inputs["passages"], inputs["rehearsed"]
        kept = (self.rehearsal.bare.predict(rehearsed), rehearsed) if self.rehearsal and rehearsed else None
        losses = model(self.teacher.predict(passages), passages, self.shared, self.recipe, share_of_mean, kept)
        for name, loss in losses.items():
            self.parts.setdefault(name, []).append(loss.item())
        loss = total_loss(losses, self.recipe)
        return (loss, losses) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean of each part of the objective since the last report, and at some steps what is measured."""
        of_processes = from_all({name: sum(values) / len(values) for name, values in self.parts.items()})
        means = {name: sum(of_one[name] for of_one in of_processes) / len(of_processes) for name in self.parts}
        self.parts = {}
        is_due = "loss" in logs and self.state.global_step % measuring_steps(self.recipe) == 0
        measured = from_main(self.measure) if self.measure and is_due else {}
        super().log({**logs, **means, **measured}, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.lessons)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        student = self.accelerator.unwrap_model(self.model)
        tensors = {name: parameter.detach().contiguous() for name, parameter in student.trainable().items()}
        save_file(tensors, folder / TRAINABLE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        student = self.accelerator.unwrap_model(model or self.model)
        tensors = load_file(Path(resume_from_checkpoint) / TRAINABLE_FILE)
        with torch.no_grad():
            for name, parameter in student.trainable().items():
                parameter.copy_(tensors[name])


class LossProgress(ProgressCallback):
    """A progress bar that shows the loss, and the score on the run's task, beside the rate and the expected end."""

    score: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Puts the latest loss into the bar instead of printing a line for it."""
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.4f}"}
            self.score = logs.get("task_score", self.score)
            self.training_bar.set_postfix(shown if self.score is None else {**shown, "task": f"{self.score:.3f}"})


class SealCheckpoints(TrainerCallback):
    """Lets a checkpoint that is damaged later be told from one that is as it was written."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Seals the checkpoint that the Trainer has just written; every process writes a file of it."""
        wait_for_all()
        if state.is_world_process_zero:
            seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


def _logging_steps(steps: int) -> int:
    return max(1, steps // _LOGS)


def measuring_steps(recipe: Recipe) -> int:
    """Steps from one measurement to the next: a tenth of all, but passages enough, and a multiple of those logged."""
    logged = _logging_steps(recipe.steps)
    apart = max(recipe.steps // _MEASURES, min(recipe.steps, PASSAGES_PER_MEASURE // recipe.batch_size))
    return max(logged, apart // logged * logged)


def check_batch(recipe: Recipe, sharded: bool) -> None:
    """Looks whether the processes can share every batch.

    Args:
        recipe: of the training
        sharded: whether they hold the target together, so that all have to read it equally often in each step

    Raises:
        UserError: they cannot.
    """
    share_of_batch(recipe.batch_size)
    if sharded and recipe.rehearsal_weight > 0:
        check_rehearsal(recipe.batch_size, process_count())


def check_rehearsal(batch_size: int, processes: int) -> None:
    """Looks whether each of several processes rehearses in every step.

    Raises:
        UserError: some would not.
    """
    multiple = processes * PASSAGES_PER_REHEARSED
    if batch_size % multiple:
        raise UserError(
            f"batch_size is {batch_size}; with --sharded each process rehearses in every step, so give a multiple of "
            f"{multiple}."
        )


def peak_learning_rate(recipe: Recipe, hidden_size: int) -> float:
    """Learning rate of a plain LoRA on a model of this width."""
    by_width = recipe.learning_rate_scale * math.sqrt(recipe.batch_size / DEFAULT.batch_size) / hidden_size
    return min(by_width, _HIGHEST_LEARNING_RATE)


def _parameter_groups(student: Student, recipe: Recipe) -> list[dict[str, Any]]:
    rate = peak_learning_rate(recipe, student.hidden_size)
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in student.trainable().items():
        # Linear maps parametrize PEFT's weights; nonlinear ones stand in their place.
        groups["parametrizations" in name or ".maps." in name].append(parameter)
    rates = {True: rate * recipe.map_learning_rate_ratio, False: rate}
    return [{"params": params, "lr": rates[is_map]} for is_map, params in groups.items() if params]


def train_student(
    teacher: Teacher,
    student: Student,
    shared: SharedVocabulary,
    training: Sequence[AlignedPassage],
    recipe: Recipe,
    seed: int,
    state_folder: Path,
    checkpoint: str | None = None,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    run_name: str | None = None,
    rehearsal: Rehearsal | None = None,
    measure: Measure | None = None,
) -> list[dict[str, float]]:
    """Trains to the last step, from the checkpoint if one is given; not at all where the recipe has no step.

    Returns:
        the log: `step`, `loss` and the parts of the loss, averaged since the entry before; some ten times also what is
        measured there
    """
    if recipe.steps == 0:
        return []
    arguments = TrainingArguments(
        output_dir=str(state_folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=share_of_batch(recipe.batch_size),
        logging_steps=_logging_steps(recipe.steps),
        save_strategy="no" if quiet else "steps",
        save_steps=max(1, recipe.steps // 10),
        save_total_limit=2,
        seed=seed,
        report_to="none",
        project=PROJECT,
        run_name=run_name,
        disable_tqdm=quiet,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=best_device().type == "cpu",
        # Otherwise the gradients are laid out anew after the first step, and those of three or more processes would be
        # added in another order, so that a run that went on would not end in the same bytes.
        ddp_find_unused_parameters=True,
        ddp_broadcast_buffers=False,
    )
    examples = reading_order(training, recipe.steps * recipe.batch_size, recipe.batch_size, seed)
    trainer = DistillationTrainer(teacher, student, examples, shared, recipe, arguments, rehearsal, measure)
    for callback in (SealCheckpoints(), *callbacks):
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback if quiet else ProgressCallback)
    if not quiet:
        trainer.add_callback(LossProgress())
    trainer.train(resume_from_checkpoint=checkpoint)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def reading_order(training: Sequence[AlignedPassage], count: int, batch_size: int, seed: int) -> list[AlignedPassage]:
    """`count` passages: the training set in a new random order each time it is read through.

    Passages of like length stand together, so that batches hold little padding. Laid out in advance, so that a
    resumed run sees what it would have seen.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = [passage.length for passage in training]
    order: list[AlignedPassage] = []
    while len(order) < count:
        indices = get_length_grouped_indices(lengths, batch_size, _BATCHES_SORTED_TOGETHER, generator)
        order += [training[index] for index in indices]
    return order[:count]
