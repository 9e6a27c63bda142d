"""Timing things side by side: what one costs as a multiple of the other, in one run."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Clock:
    """Seconds of work on a device.

    On a processor these are the processor's seconds, which other programs on the machine do not lengthen; on an
    accelerator the time that passes until its queue is empty.
    """

    device: torch.device

    @property
    def kind(self) -> str:
        """What the seconds are."""
        return "processor seconds" if self.device.type == "cpu" else "elapsed seconds"

    def now(self) -> float:
        """Seconds since some moment, all work before it done."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, work: Callable[[], object]) -> float:
        """How long one piece of work takes."""
        started = self.now()
        work()
        return self.now() - started


def interleaved(clock: Clock, works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each work in each repetition, after one that does not count.

    Every repetition runs all works in a new order, so that neither a slower machine nor the work before favours one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    chance = random.Random(0)
    for repetition in range(-1, repeats):
        for name in chance.sample(list(works), len(works)):
            taken = clock.seconds(works[name])
            if repetition >= 0:
                seconds[name].append(taken)
    return seconds


@dataclass(frozen=True)
class Side:
    """One of two things that are compared."""

    name: str
    tokens: int
    """Tokens of each repetition, the same on both sides."""
    seconds: list[float]
    """One number per repetition."""

    def describe(self) -> dict[str, Any]:
        """What the record keeps."""
        median = float(np.median(self.seconds))
        return {**vars(self), "median_seconds": median, "tokens_per_second": self.tokens / median}


@dataclass(frozen=True)
class Ratio:
    """What one thing costs as a multiple of another, repetition by repetition."""

    measure: str
    name: str
    side: Side
    other: Side
    of_rates: bool
    """Whether tokens per second are compared, so that more is better; otherwise seconds."""
    target: float | None = None
    """What the ratio of seconds should not exceed, or what that of rates should reach with its upper quartile."""

    def describe(self) -> dict[str, Any]:
        """What the record keeps: both sides, the median of the ratios and their quartiles."""
        own, others = np.array(self.side.seconds), np.array(self.other.seconds)
        low, middle, high = np.quantile(others / own if self.of_rates else own / others, [0.25, 0.5, 0.75]).tolist()
        is_met = None if self.target is None else high >= self.target if self.of_rates else middle <= self.target
        return {
            "measure": self.measure,
            "name": self.name,
            "unit": "tokens per second" if self.of_rates else "seconds",
            "sides": [self.side.describe(), self.other.describe()],
            "ratio": middle,
            "quartiles": [low, high],
            "target": self.target,
            "is_met": is_met,
        }
