"""Proxy tuning, arXiv 2401.08565: what the source's update of its predictions adds to the target's, at inference.

It needs three models for every answer and yields no adapter, so it is an oracle: how much the difference between source
+ LoRA and source can carry, if nothing is lost on the way into the target's weights.
"""

from collections.abc import Sequence

import numpy as np
from peft import PeftModelForCausalLM
from transformers import PreTrainedTokenizerFast

from castlora.errors import UserError
from castlora.evaluation.accuracy import Evaluation, choice_log_likelihoods, judge_choices
from castlora.evaluation.tasks import TaskItem
from castlora.models.completions import CausalLM


def evaluate_logit_delta(
    target: CausalLM,
    target_tokenizer: PreTrainedTokenizerFast,
    teacher: PeftModelForCausalLM,
    source_tokenizer: PreTrainedTokenizerFast,
    items: Sequence[TaskItem],
    strength: float = 1.0,
) -> Evaluation:
    """Scores log p = log p_target + strength · (log p_{source + LoRA} - log p_source) on items with choices.

    The sum is taken over whole choices, which compares models with unlike tokenizers too, and normalised over the
    choices of an item: `nll` is that of the right choice among them.

    Args:
        target: the bare target
        target_tokenizer: its tokenizer
        teacher: source + LoRA
        source_tokenizer: its tokenizer
        items: items with choices
        strength: weight of the difference

    Raises:
        UserError: items have no choices.
    """
    if items[0].choices is None:
        raise UserError("The logit-delta oracle compares choices, and the task has none; give items with 'choices'.")
    of_target = choice_log_likelihoods(target, target_tokenizer, items)
    of_teacher = choice_log_likelihoods(teacher, source_tokenizer, items)
    with teacher.disable_adapter():
        of_source = choice_log_likelihoods(teacher, source_tokenizer, items)
    summed = [
        bare + strength * (adapted - before)
        for bare, adapted, before in zip(of_target, of_teacher, of_source, strict=True)
    ]
    return judge_choices(items, [row - np.logaddexp.reduce(row) for row in summed])
