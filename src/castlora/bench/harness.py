"""Scores by lm-evaluation-harness, for skills that are tasks of it (optional: `pip install 'castlora[lm-eval]'`)."""

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from castlora.errors import UserError, first_line
from castlora.lift import bootstrap_interval
from castlora.models.completions import CausalLM

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_METRICS = ("acc", "exact_match")
"""Scores of an item that are 0 or 1, the only ones that lift is taken of; the first that a task has is used."""
_BATCH = 16


def check_task(task: str, folder: str | None) -> None:
    """Makes sure that the harness knows a task, before anything slow begins.

    Args:
        task: its name
        folder: folder with task files of one's own, beside the harness's

    Raises:
        UserError: the harness is not installed or does not know the task.
    """
    if task not in _tasks(folder).all_tasks:
        place = f" or in {folder!r}" if folder else ""
        raise UserError(
            f"--lm-eval {task!r} is no task of lm-evaluation-harness{place}; `lm-eval ls tasks` lists them."
        )


def harness_figures(
    model: CausalLM, tokenizer: PreTrainedTokenizerFast, task: str, folder: str | None, shots: int | None
) -> dict[str, Any]:
    """What a record keeps of a score by the harness.

    Args:
        model: the model to score
        tokenizer: its tokenizer
        task: name of a task or of a group of tasks, whose items are taken together
        folder: folder with task files of one's own
        shots: examples before each item; None for as many as the task has by default

    Raises:
        UserError: the task's data cannot be had, or it scores items by neither accuracy nor exact match.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    was_training = model.training
    try:
        results = simple_evaluate(
            model=HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=_BATCH),
            tasks=[task],
            num_fewshot=shots,
            task_manager=_tasks(folder),
            bootstrap_iters=0,
        )
    # Loading a data set can fail in as many ways as there are hosts, formats and options.
    except Exception as error:
        raise UserError(f"--lm-eval {task!r} cannot be run ({first_line(error)}); see its task file.") from error
    finally:
        model.train(was_training)
    assert results is not None
    metric, scores = item_scores(task, [sample for of_task in results["samples"].values() for sample in of_task])
    return {
        "metric": metric,
        "score": float(scores.mean()),
        "ci95": bootstrap_interval(scores),
        "nll": None,
        "n": len(scores),
        "scores": "".join(str(int(score)) for score in scores),
    }


def item_scores(task: str, samples: list[dict[str, Any]]) -> tuple[str, np.ndarray]:
    """The metric of a task and each item's score, shape (n,), 0 or 1; of several filters of answers the first counts.

    Raises:
        UserError: the items have no such score.
    """
    first = samples[0]["filter"]
    of_filter = [sample for sample in samples if sample["filter"] == first]
    for metric in _METRICS:
        if all(metric in sample and float(sample[metric]) in (0.0, 1.0) for sample in of_filter):
            name = metric if first == "none" else f"{metric}, {first}"
            return name, np.array([float(sample[metric]) for sample in of_filter])
    raise UserError(f"--lm-eval {task!r} gives items no {' or '.join(_METRICS)}; choose a task that does.")


@cache
def _tasks(folder: str | None) -> "TaskManager":
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("--lm-eval needs lm-evaluation-harness; pip install 'castlora[lm-eval]'.") from error
    return TaskManager(include_path=folder)
