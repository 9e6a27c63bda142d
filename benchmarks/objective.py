"""What the objective needs of memory and time beside torch's own functions: python -m benchmarks.objective.

Large vocabularies make logits the widest tensors of a step. Both ways read the same random logits, each in a process of
its own, and go back once; memory is what the process had at its highest beyond the logits themselves.
"""

import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from jsonargparse import auto_cli
from torch import Tensor

from castlora.bench.grid import environment
from castlora.distillation.divergence import Compared, compare
from castlora.distillation.objective import class_log_probabilities, kl_divergence
from castlora.publishing.manifest import peak_memory_bytes

Way = Literal["castlora", "torch's functions"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Size:
    """Logits of teacher and student, one class for two tokens."""

    tokens: int = 512
    vocabulary: int = 150_000
    compared: float = 0.75
    """Share of the tokens whose predictions are compared."""
    repeats: int = 5


def objective(way: Way, teacher: Compared, student: Compared, classes: int, following: Tensor) -> Tensor:
    """The mean divergence and the mean log-probability of the text, which have one way back."""
    if way == "castlora":
        divergence, text = compare(teacher, student, classes, following=following)
    else:
        logs = [
            class_log_probabilities(one.logits[one.places].float(), one.classes, classes) for one in (teacher, student)
        ]
        divergence = kl_divergence(*logs)
        text = student.logits.float().log_softmax(-1).gather(1, following[:, None])
    return divergence.mean() - text.mean()


def measure(way: Way, precision: Precision, size: Size, threads: int) -> dict[str, float]:
    """Peak memory of the first time there and back, in copies of the student's logits in 32 bits, and the seconds."""
    torch.set_num_threads(threads)
    chance = torch.Generator().manual_seed(0)
    count = size.vocabulary // 2
    of_tokens = torch.arange(size.vocabulary) % count
    drawn = [
        torch.empty(size.tokens, size.vocabulary, dtype=getattr(torch, precision)).normal_(generator=chance)
        for _ in range(2)
    ]
    following = torch.randint(size.vocabulary, (size.tokens,), generator=chance)
    places = (torch.rand(size.tokens, generator=chance) < size.compared).nonzero().squeeze(1)
    teacher, student = (Compared(logits, places, of_tokens) for logits in drawn)
    student.logits.requires_grad_()
    idle, seconds, peak = peak_memory_bytes(), [], 0
    for _ in range(size.repeats):
        started = time.process_time()
        objective(way, teacher, student, count, following).backward()
        seconds.append(time.process_time() - started)
        peak = peak or peak_memory_bytes()
        student.logits.grad = None
    return {"copies": (peak - idle) / (4 * student.logits.numel()), "seconds": median(seconds)}


def main(out: Path = Path("benchmarks/results/objective.json"), threads: int = 1, size: Size = Size()) -> None:
    """Writes what both ways need.

    Args:
        out: file to write
        threads: that each process uses
        size: of the logits
    """
    found = []
    with ProcessPoolExecutor(max_workers=1, max_tasks_per_child=1, mp_context=get_context("spawn")) as processes:
        for precision, way in product(("float32", "bfloat16"), ("castlora", "torch's functions")):
            measured = processes.submit(measure, way, precision, size, threads).result()
            found.append({"precision": precision, "way": way, **measured})
    record = {"size": asdict(size), "threads": threads, "found": found, "environment": environment()}
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
