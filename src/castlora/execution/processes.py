"""The processes that run one transfer together; without a launcher there is one, and nothing here does anything.

Each reads its share of the text for the statistics and of every batch of the training. All else is the main process's:
it looks, decides and writes, and the others take over what it has found.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch import Tensor

from castlora.errors import UserError
from castlora.execution.launcher import is_launched, local_process_count, process_count
from castlora.execution.sharding import follow, leading

LONGEST_WAIT = timedelta(days=7)
"""While the main process chooses text or compares answers, the others wait. Where it ends, the launcher ends them."""
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Process:
    """One of the processes that share a transfer."""

    index: int
    count: int
    """How many processes there are."""
    device: torch.device
    """The accelerator of this process if there is one."""

    @property
    def is_main(self) -> bool:
        """Whether it decides and writes for all."""
        return self.index == 0


def this_process() -> Process:
    """This process among all; the first call joins them."""
    state = _joined()
    return Process(state.process_index, state.num_processes, torch.device(state.device))


def wait_for_all() -> None:
    """Returns when every process has come here."""
    _joined().wait_for_everyone()


@contextmanager
def in_turn() -> Iterator[None]:
    """Lets one process of a machine after the other do what needs much of the machine's memory for a while."""
    before = _joined().local_process_index
    for _ in range(before):
        wait_for_all()
    yield
    for _ in range(local_process_count() - before):
        wait_for_all()


def leave() -> None:
    """Takes leave of the other processes, when no more is to be shared."""
    _joined().destroy_process_group()


def from_main(find: Callable[[], _Found]) -> _Found:
    """What the main process finds, for all.

    Args:
        find: called by the main process alone; what it returns can be pickled

    Raises:
        UserError: the one that the main process met, in every process.
    """
    here = this_process()
    if here.count == 1:
        return find()
    outcome: list[Any] = [None]
    if here.is_main:
        with leading():
            try:
                outcome = [find()]
            except UserError as error:
                outcome = [error]
    else:
        follow()
    broadcast_object_list(outcome)
    (found,) = outcome
    if isinstance(found, UserError):
        raise found
    return cast(_Found, found)


def from_all(found: _Found) -> list[_Found]:
    """What each process has found, in the order of the processes, for all."""
    _joined()
    return list(gather_object([found]))


def share_of_batch(batch_size: int) -> int:
    """Passages of each batch that one process reads; each finds bad input alone, since it need not join the others.

    Raises:
        UserError: the processes cannot share a batch equally.
    """
    count = process_count()
    if batch_size % count:
        raise UserError(
            f"batch_size is {batch_size}, which {count} processes cannot share equally; give a multiple of {count}."
        )
    return batch_size // count


def add_up(tensor: Tensor) -> None:
    """Replaces a tensor by the sum of those that the processes have in its place."""
    if this_process().count > 1:
        torch.distributed.all_reduce(tensor)


def share_of_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Part of `weighted_mean` over the values of all processes, whose mean over the processes it is.

    Gradients are averaged over processes. Were each to take the mean of its own values, those of a process with few
    would count too much.

    Args:
        values: of this process, shape (n,); n may differ between processes
        weights: shape (n,)

    Returns:
        scalar; gradients flow into the values of this process only
    """
    total = weights.sum()
    add_up(total)
    return this_process().count * (values * weights).sum() / total.clamp_min(torch.finfo(weights.dtype).tiny)


def _joined() -> Any:
    on_processor = parse_flag_from_env("ACCELERATE_USE_CPU") or (is_launched() and not _has_accelerator())
    return PartialState(cpu=on_processor, timeout=LONGEST_WAIT)


def _has_accelerator() -> bool:
    """Whether processes can have an accelerator each; those of Apple's machines share one and cannot reduce on it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type != "mps"
