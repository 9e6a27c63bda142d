"""What a step of distillation costs beside the passes through the models that it cannot do without."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from castlora.adapters.live import attach_lora, lora_maps
from castlora.alignment.positions import AlignedPassage, Batch, batches
from castlora.bench.speed.measures import SHORT, TEXTS, SpeedSettings
from castlora.bench.speed.models import Subject
from castlora.bench.speed.timing import Clock, Ratio, Side
from castlora.config import DEFAULT
from castlora.distillation.distill import Student
from castlora.distillation.rehearsal import Rehearsal, rehearsed
from castlora.distillation.teacher import LiveTeacher, RecordedTeacher, Teacher, predict
from castlora.distillation.training import DistillationTrainer

STEP_TARGET = 1.10
_REHEARSED = 64


def measure_steps(settings: SpeedSettings, device: torch.device) -> list[Ratio]:
    """Seconds of a step over those of its passes: with a teacher that runs, remembered, and with rehearsal too."""
    subject = settings.subject(device)
    teacher, student = teacher_and_student(subject, settings.rank)
    rehearsal = rehearse(subject, student, settings.seed)
    ratios = []
    for text in TEXTS:
        count = settings.batch_size * (1 + SHORT * settings.repeats)
        passages = subject.passages(count, settings.length, text, settings.seed)
        recorded = RecordedTeacher(teacher.model, passages, with_hidden=False)
        both, alone = "teacher forward, student forward and backward", "student forward and backward"
        for name, own_teacher, kept, bare, target in (
            ("teacher runs", teacher, None, both, STEP_TARGET),
            ("teacher recorded", recorded, None, alone, STEP_TARGET),
            ("teacher recorded, with rehearsal", recorded, rehearsal, alone, None),
        ):
            steps, passes = time_steps(
                own_teacher, student, subject, passages, settings.batch_size, settings.seed, Clock(device), kept
            )
            tokens = settings.batch_size * settings.length * (2 if own_teacher is teacher else 1)
            ratios.append(
                Ratio(
                    "distillation step",
                    f"{name}, {text}",
                    Side("step", tokens, steps),
                    Side(bare, tokens, passes),
                    of_rates=False,
                    target=target,
                )
            )
    return ratios


def rehearse(subject: Subject, student: Student, seed: int) -> Rehearsal:
    """Text for the student to rehearse, with what the bare target predicts on it, which is looked up."""
    text = subject.passages(_REHEARSED, DEFAULT.rehearsal_tokens, "running text", seed)
    passages = [rehearsed(passage.target_ids) for passage in text]
    with student.model.disable_adapter():
        recorded = RecordedTeacher(student.model, passages, with_hidden=False)
        return Rehearsal(recorded, passages, recorded, held_out=())


def teacher_and_student(subject: Subject, rank: int) -> tuple[LiveTeacher, Student]:
    """Source + LoRA, and the target with the plain LoRA that the default recipe trains; both change the models."""
    source = attach_lora(subject.source, subject.factors, rank)
    for name in subject.factors:
        _, lora_b = lora_maps(source, name)
        torch.nn.init.normal_(lora_b.weight, std=0.01)
    adapted = [pair.target.name for pair in subject.pairing.mapped]
    widths = subject.shape.target.width, subject.shape.source.width
    student = Student(attach_lora(subject.target, adapted, rank), *widths, with_head=False)
    return LiveTeacher(source.eval(), with_hidden=False), student.to(subject.target.device).eval()


def time_steps(
    teacher: Teacher,
    student: Student,
    subject: Subject,
    passages: Sequence[AlignedPassage],
    batch_size: int,
    seed: int,
    clock: Clock,
    rehearsal: Rehearsal | None = None,
) -> tuple[list[float], list[float]]:
    """Trains once through the passages, and after each step makes its bare passes over the same batch.

    Args:
        teacher: live, whose pass is then one of the bare ones, or recorded
        student: is trained
        subject: both models
        passages: one batch more than what counts
        batch_size: passages per step
        seed: of the Trainer
        clock: takes the times
        rehearsal: what is read beside them, if anything, as often as in a transfer

    Returns:
        seconds of each step, and of its passes, the first step left out
    """
    weight = DEFAULT.rehearsal_weight if rehearsal else 0.0
    recipe = replace(DEFAULT, steps=len(passages) // batch_size, batch_size=batch_size, rehearsal_weight=weight)
    passes = _BarePasses(teacher, student, batches(passages, batch_size, subject.target.device), clock)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=recipe.steps,
            per_device_train_batch_size=batch_size,
            logging_strategy="no",
            save_strategy="no",
            seed=seed,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=subject.target.device.type == "cuda",
        )
        trainer = DistillationTrainer(teacher, student, passages, subject.shared, recipe, arguments, rehearsal)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(passes)
        trainer.train()
    return passes.steps[1:], passes.passes[1:]


class _BarePasses(TrainerCallback):
    """Takes the time of each step from the end of the one before, less that of the bare passes in between."""

    def __init__(self, teacher: Teacher, student: Student, read: Iterator[Batch], clock: Clock) -> None:
        self.teacher, self.student, self.read, self.clock = teacher, student, read, clock
        self.steps: list[float] = []
        self.passes: list[float] = []
        self.started = 0.0

    def on_train_begin(self, *_arguments: Any, **_options: Any) -> None:
        """The first step begins."""
        self.started = self.clock.now()

    def on_step_end(self, *_arguments: Any, **_options: Any) -> None:
        """Ends the step, and makes its bare passes."""
        self.steps.append(self.clock.now() - self.started)
        batch = next(self.read)
        self.passes.append(self.clock.seconds(lambda: self._pass(batch)))
        self.student.zero_grad()
        self.started = self.clock.now()

    def _pass(self, batch: Batch) -> None:
        if isinstance(self.teacher, LiveTeacher):
            self.teacher.predict(batch)
        predict(self.student.model, batch, "target").logits.sum().backward()
