"""The stages of a transfer, each from plain inputs to plain results; `pipeline` strings them together."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from castlora.answers import write_answers
from castlora.chat import Conversation, ask, chat_passages, read_conversations
from castlora.config import Recipe
from castlora.distill import DistillationTrainer, LossProgress, SealCheckpoints, Student
from castlora.effective import effective_update
from castlora.errors import UserError
from castlora.format_search import FILLINGS, find_formats
from castlora.maps import balance
from castlora.models import best_device, context_length, load_model
from castlora.plan import Plan
from castlora.positions import AlignedPassage, align_passages, bytes_per_token
from castlora.selection import most_informative, mutual_information, predict_first_tokens
from castlora.starts import (
    attach_lora,
    collect_moments,
    fold_maps,
    paper_maps,
    parametrize_by_maps,
    ridge_maps,
    start_from_factors,
)
from castlora.teacher import RECORD_BYTES, LiveTeacher, RecordedTeacher, Teacher, record_bytes
from castlora.text import (
    GENERIC_FORMATS,
    HUB_DEFAULT,
    SLOT,
    Passage,
    candidate_formats,
    check_prompt_format,
    cut_passages,
    draw_fillings,
    fill_formats,
    join_sentences,
    read_documents,
    read_prompts,
)
from castlora.tokens import ByteTokenizer
from castlora.vocabulary import SharedVocabulary

logger = logging.getLogger("castlora")

HELD_OUT_PASSAGES = 64
_SAMPLE_FOR_LENGTH = 64
_BATCHES_SORTED_TOGETHER = 8
_STATISTICS_PASSAGES = 1024
_PROMPT_BATCH = 64


@dataclass(frozen=True)
class Models:
    """Both models in memory. The source carries the adapter; the target is bare until a student is made of it."""

    source: PreTrainedModel
    """The base model inside the teacher; the teacher's adapter acts in it unless it is disabled."""
    teacher: PeftModel
    target: PreTrainedModel
    source_tokenizer: PreTrainedTokenizerFast
    target_tokenizer: PreTrainedTokenizerFast
    source_bytes: ByteTokenizer
    target_bytes: ByteTokenizer
    shared: SharedVocabulary


@dataclass(frozen=True)
class TextSource:
    """Where the text comes from, as the user named it."""

    text: str | None = None
    prompt_format: str | None = None
    prompts: str | None = None
    chat: bool = False
    """Whether prompts are messages, which both models read in their own chat templates."""

    @property
    def regime(self) -> str:
        """What is known about the task: nothing, the format of its prompts, or prompts themselves."""
        if self.prompts is not None:
            return "unlabelled prompts"
        if self.prompt_format is not None:
            return "prompt format"
        return "chat template" if self.chat else "general text"

    @property
    def known_formats(self) -> Sequence[str]:
        """What general text is put into, as far as that is known; a chat template needs nothing around the text."""
        if self.prompts is not None:
            return ()
        if self.prompt_format is not None:
            return (self.prompt_format,)
        return (SLOT,) if self.chat else ()

    def check(self) -> None:
        """Raises a UserError if the text cannot be read, before anything slow begins."""
        if self.prompts is not None and self.prompt_format is not None:
            raise UserError("--prompts and --prompt-format are two sources of prompts; give one of them.")
        if self.prompts is not None and self.text is not None:
            logger.warning("--text %r is not read: --prompts are given.", self.text)
        if self.prompt_format is not None:
            check_prompt_format(self.prompt_format)
        if self.prompts is not None and self.chat:
            read_conversations(self.prompts, 1, seed=0)
        elif self.prompts is not None:
            read_prompts(self.prompts, 1, seed=0)
        else:
            next(read_documents(self.text or HUB_DEFAULT))


def load_models(plan: Plan) -> Models:
    """Loads both models and applies the adapter to the source."""
    device = best_device()
    source, source_tokenizer = load_model(plan.source, plan.source_revision, device)
    target, target_tokenizer = load_model(plan.target, None, device)
    teacher = PeftModel.from_pretrained(source, str(plan.adapter.folder)).eval()
    source_bytes = ByteTokenizer.from_tokenizer(source_tokenizer)
    target_bytes = ByteTokenizer.from_tokenizer(target_tokenizer)
    shared = SharedVocabulary.of(
        source_bytes, target_bytes, plan.source_config.vocab_size, plan.target_config.vocab_size
    )
    return Models(source, teacher, target, source_tokenizer, target_tokenizer, source_bytes, target_bytes, shared)


def prompt_formats(models: Models, text: TextSource, recipe: Recipe, seed: int) -> Sequence[str]:
    """What general text is put into; nothing where prompts are given or text is read as it runs.

    Where the format of the adapter's prompts is not known, those that it listens to are found by asking it.

    Raises:
        UserError: the text cannot be read.
    """
    if text.known_formats or text.prompts is not None or not recipe.write_answers:
        return text.known_formats
    if recipe.format_candidates == 0:
        return GENERIC_FORMATS
    general = text.text or HUB_DEFAULT
    found = find_formats(
        models.teacher,
        models.source_tokenizer,
        models.source_bytes,
        candidate_formats(read_documents(general), recipe.format_candidates),
        draw_fillings(read_documents(general), FILLINGS, seed),
        _longest_prompt(models, recipe),
    )
    return found or GENERIC_FORMATS


def draw_text(models: Models, text: TextSource, formats: Sequence[str], recipe: Recipe, seed: int) -> list[Passage]:
    """The passages of a run: plain text, or prompts that are still without an answer.

    Args:
        models: both models
        text: where the text comes from
        formats: what general text is put into; none to read it as it runs
        recipe: how much text
        seed: of the draw

    Raises:
        UserError: the text cannot be read or is too little.
    """
    count = recipe.passages + HELD_OUT_PASSAGES
    if text.prompts is not None and text.chat:
        passages = _in_templates(models, read_conversations(text.prompts, count, seed))
    elif text.prompts is not None:
        passages = _unanswered(read_prompts(text.prompts, count, seed))
    elif formats:
        candidates = _kept_prompts(recipe) * recipe.candidates
        sentences = draw_fillings(read_documents(text.text or HUB_DEFAULT), candidates, seed)
        prompts = fill_formats(join_sentences(sentences, recipe.sentences, seed), formats)
        passages = _in_templates(models, [ask(prompt) for prompt in prompts]) if text.chat else _unanswered(prompts)
    else:
        max_bytes = _passage_bytes(models, text.text or HUB_DEFAULT, recipe.max_length)
        passages = cut_passages(read_documents(text.text or HUB_DEFAULT), count, max_bytes, seed)
    if len(passages) < 2:
        raise UserError(f"The text yields {len(passages)} passages, at least 2 are needed; give more text.")
    return passages


def teach_text(models: Models, text: TextSource, formats: Sequence[str], recipe: Recipe, seed: int) -> list[Passage]:
    """The text of a run with all that source + LoRA has to say to it: passages are drawn, chosen and answered.

    Raises:
        UserError: the text cannot be read or is too little.
    """
    drawn = draw_text(models, text, formats, recipe, seed)
    logger.info("Text: %s, %d passages", text.regime, len(drawn))
    chosen = choose_prompts(models, drawn, recipe) if formats else drawn
    return answer_prompts(models, chosen, recipe, seed)


def choose_prompts(models: Models, passages: Sequence[Passage], recipe: Recipe) -> list[Passage]:
    """Of more prompts than are to be kept, those that tell most about the skill."""
    if len(passages) <= _kept_prompts(recipe):
        return list(passages)
    first_tokens = predict_first_tokens(
        models.teacher,
        models.source_tokenizer,
        passages,
        _longest_prompt(models, recipe),
        _PROMPT_BATCH,
    )
    distributions = first_tokens.distributions()
    indices = most_informative(distributions, min(_kept_prompts(recipe), len(distributions)))
    logger.info(
        "Kept %d of %d prompts: their answers tell %.2f nats about the prompt, those to all prompts %.2f",
        len(indices), len(distributions), mutual_information(distributions[indices]), mutual_information(distributions),
    )  # fmt: skip
    chosen = {first_tokens.prompts[index] for index in indices.tolist()}
    return [passage for passage in passages if passage in chosen]


def answer_prompts(models: Models, passages: Sequence[Passage], recipe: Recipe, seed: int) -> list[Passage]:
    """Prompts with the answers that source + LoRA writes, in shuffled order; plain text as it is."""
    prompts = [passage for passage in passages if passage.answer_start]
    if not prompts or not recipe.write_answers:
        return list(passages)
    answered = write_answers(
        models.teacher,
        models.source_tokenizer,
        prompts,
        max_new_tokens=recipe.answer_tokens,
        max_prompt_tokens=_longest_prompt(models, recipe),
        batch_size=_PROMPT_BATCH,
        seed=seed,
    )
    shuffled = list(answered)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def align_text(
    models: Models, passages: Sequence[Passage], recipe: Recipe
) -> tuple[list[AlignedPassage], list[AlignedPassage]]:
    """Passages in both tokenizers, split into training and held-out ones.

    Raises:
        UserError: too little text has aligned positions.
    """
    aligned = list(
        align_passages(passages, models.source_bytes, models.target_bytes, recipe.max_length, recipe.context_weight)
    )
    if len(aligned) < 2:
        raise UserError("Too little of the text has positions where both tokenizers agree; give longer text.")
    held_out = max(1, min(HELD_OUT_PASSAGES, len(aligned) // 5))
    return aligned[:-held_out][: recipe.passages], aligned[-held_out:]


def start_student(
    models: Models, plan: Plan, recipe: Recipe, training: Sequence[AlignedPassage], rank: int, seed: int
) -> Student:
    """The target with the LoRA that training starts from.

    The paired modules are adapted, by maps around the frozen source factors or by factors of their own.
    """
    torch.manual_seed(seed)
    maps = None
    if recipe.start != "fresh" and not plan.adapter.is_plain:
        update = effective_update(models.teacher, plan.source_slots, plan.factors)
        logger.info(
            "The maps start from the %s adapter cut to low rank: %.1f %% of its norm is lost.",
            plan.adapter.kind,
            100 * update.lost,
        )
        plan = replace(plan, factors=update.factors)
    if recipe.start == "paper":
        maps = paper_maps(plan.pairing, plan.factors, seed)
    elif recipe.start == "ridge":
        with models.teacher.disable_adapter():
            moments = collect_moments(models.source, models.target, plan.pairing, training[:_STATISTICS_PASSAGES])
        maps = ridge_maps(moments, plan.pairing, recipe.ridge)
    peft_model = attach_lora(models.target, plan.target_modules, rank)
    if maps is not None and recipe.trained == "factors":
        folded = fold_maps(plan.pairing, plan.factors, maps)
        start_from_factors(peft_model, {name: balance(lora) for name, lora in folded.items()})
    elif maps is not None:
        parametrize_by_maps(peft_model, plan.pairing, plan.factors, maps)
    with_head = recipe.mse_weight > 0
    widths = models.target.config.hidden_size, models.teacher.config.hidden_size
    return Student(peft_model, *widths, with_head=with_head).to(best_device())


def hold_teacher(
    models: Models, training: Sequence[AlignedPassage], held_out: Sequence[AlignedPassage], recipe: Recipe
) -> Teacher:
    """The teacher of a run: its predictions are kept where training reads passages again and memory allows."""
    passages = [*training, *held_out]
    with_hidden = recipe.mse_weight > 0
    is_read_again = recipe.steps * recipe.batch_size > len(training)
    if is_read_again and record_bytes(models.source.config, passages, with_hidden) <= RECORD_BYTES:
        return RecordedTeacher(models.teacher, passages, with_hidden)
    return LiveTeacher(models.teacher, with_hidden)


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
) -> list[dict[str, float]]:
    """Trains to the last step, from the checkpoint if one is given.

    Returns:
        the log: `step`, `loss` and the parts of the loss, averaged since the entry before
    """
    arguments = TrainingArguments(
        output_dir=str(state_folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        logging_steps=max(1, recipe.steps // 50),
        save_strategy="no" if quiet else "steps",
        save_steps=max(1, recipe.steps // 10),
        save_total_limit=2,
        seed=seed,
        report_to="none",
        disable_tqdm=quiet,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    examples = reading_order(training, recipe.steps * recipe.batch_size, recipe.batch_size, seed)
    trainer = DistillationTrainer(teacher, student, examples, shared, recipe, arguments)
    trainer.add_callback(SealCheckpoints())
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
    lengths = [max(len(passage.source_ids), len(passage.target_ids)) for passage in training]
    order: list[AlignedPassage] = []
    while len(order) < count:
        indices = get_length_grouped_indices(lengths, batch_size, _BATCHES_SORTED_TOGETHER, generator)
        order += [training[index] for index in indices]
    return order[:count]


def _unanswered(prompts: Sequence[str]) -> list[Passage]:
    return [Passage(prompt, len(prompt.encode())) for prompt in prompts]


def _in_templates(models: Models, conversations: Sequence[Conversation]) -> list[Passage]:
    return chat_passages(conversations, models.source_tokenizer, models.target_tokenizer)


def _kept_prompts(recipe: Recipe) -> int:
    """Prompts made of general text that a run uses, the held-out ones included."""
    return recipe.filled_passages + HELD_OUT_PASSAGES


def _longest_prompt(models: Models, recipe: Recipe) -> int:
    """Tokens of the longest prompt that leaves room for an answer."""
    return min(recipe.max_length, context_length(models.source.config) - recipe.answer_tokens)


def _passage_bytes(models: Models, text: str, max_length: int) -> int:
    """Bytes of text that fill `max_length` tokens of the tokenizer that needs more of them."""
    sample = cut_passages(read_documents(text), _SAMPLE_FOR_LENGTH, 4 * max_length, seed=0)
    densest = min(bytes_per_token(sample, tokenizer) for tokenizer in (models.source_bytes, models.target_bytes))
    return max(16, int(densest * (max_length - 2)))
