"""The page of `python -m benchmarks.bridges`: what shared maps carry by themselves, and what they save as a start."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from castlora.bench.plots import Curve
from castlora.bench.results import make_cells, read_results
from castlora.bench.tables import measured_with
from castlora.config import Start
from castlora.maps.scaling import SOLVED_SCALES

PAIR = "llama-s:mistral-s"
BRIDGES: dict[str, Start] = {"bridge": "ridge", "bridge, last layer solved": "readout"}
"""Methods that start from shared maps → the start that they replace the maps of."""
STARTS = (*BRIDGES, "ridge start, rehearsed", "default, last layer solved", "fresh, rehearsed")
"""Methods that differ in what they start from."""
BRIDGE_BATCH, BATCH = 16, 4
"""Passages at a step of the maps' training, and of the trainings that start from them."""
_INTRODUCTION = f"""
Can maps be learned once for a pair of models, and then move adapters that they have never seen? Here maps from
`{PAIR.split(":")[0]}` to `{PAIR.split(":")[1]}` were trained on five adapters along unlabelled prompts of their skills,
a random adapter at each step of {BRIDGE_BATCH} prompts, from their closed form. Then they moved the adapter of a sixth
skill. One seed; `python -m benchmarks.bridges` runs and renders it.
"""


@dataclass(frozen=True)
class Found:
    """What was measured."""

    lifts: dict[int, dict[str, float]]
    """Mean over the skills by number of steps and method."""
    bridges: list[dict[str, Any]]
    """How the maps were learned; one record for each skill that was left out."""
    runs: list[dict[str, Any]]
    """Records of the trainings that start from the maps or beside them."""

    @classmethod
    def read(cls, out: Path, skills: Sequence[str]) -> "Found":
        """Reads the records of a folder."""
        lifts, trained = {}, []
        for folder in sorted((out / "steps").iterdir(), key=lambda folder: int(folder.name)):
            references, runs = read_results(folder)
            of_method = defaultdict(list)
            for cell in make_cells(references, runs):
                of_method[cell.method].append(cell.lift.lift)
            lifts[int(folder.name)] = {method: float(np.mean(of_method[method])) for method in STARTS}
            trained += runs
        learned = [json.loads((out / "learned" / f"{skill}.json").read_text(encoding="utf-8")) for skill in skills]
        return cls(lifts, learned, trained)

    def curves(self) -> list[Curve]:
        """A curve per start."""
        return [Curve(start, [(steps, of[start]) for steps, of in self.lifts.items()]) for start in STARTS]


def render(found: Found, chart_name: str) -> str:
    """The page: what shared maps carry by themselves, and what they save as a start."""
    bridges = found.bridges
    skills = [bridge["skill"] for bridge in bridges]
    carried = [
        "| steps | KL, adapters seen | KL, unseen | next tokens as source + LoRA's, unseen | "
        + " | ".join(f"lift, {skill} unseen" for skill in skills)
        + " |",
        "|---" * (4 + len(skills)) + "|",
    ]
    for points in zip(*(bridge["points"] for bridge in bridges), strict=True):
        kl, agreement = (np.mean([point["unseen"][name] for point in points]) for name in ("kl", "agreement"))
        seen = np.mean([point["seen_kl"] for point in points])
        lifts = " | ".join(f"{_lift(bridge, point):.2f}" for bridge, point in zip(bridges, points, strict=True))
        carried.append(f"| {points[0]['step']} | {seen:.2f} | {kl:.2f} | {100 * agreement:.0f} % | {lifts} |")
    saved = ["| steps | " + " | ".join(STARTS) + " |", "|---" * (1 + len(STARTS)) + "|"]
    for steps, lifts_of in found.lifts.items():
        saved.append(f"| {steps} | " + " | ".join(f"{lifts_of[start]:.2f}" for start in STARTS) + " |")
    bare = np.mean([bridge["points"][0]["bare_kl"] for bridge in bridges])
    sections = [
        "# Maps shared by many adapters",
        _INTRODUCTION.strip(),
        "## What they carry by themselves",
        "By the number of steps that the maps were trained for: KL divergence from source + LoRA on held-out prompts, "
        f"in nats (the bare target's from the unseen: {bare:.2f}), and the lift of each skill that was left out. Of "
        f"{len(SOLVED_SCALES)} scales of the update, 0 among them, the one is taken that fits held-out prompts of the "
        "skill best.",
        "\n".join(carried),
        "## What they save as a start",
        f"Mean lift over the skills left out by the number of steps of {BATCH} prompts of the skill, by the default "
        "recipe: from the shared maps (`bridge`), from the closed form of the skill's own prompts "
        "(`ridge start, rehearsed`), from each with the target's last layer solved for these prompts, and from a plain "
        "LoRA (`fresh, rehearsed`). Every "
        "number is a training of its own, with a schedule of its own.",
        f"![Lift by steps and start]({chart_name})",
        "\n".join(saved),
        "## Environment",
        measured_with([*bridges, *found.runs]),
    ]
    return "\n\n".join(sections) + "\n"


def _lift(bridge: Mapping[str, Any], point: Mapping[str, Any]) -> float:
    bare, retrained = (bridge["references"][name]["score"] for name in ("bare target", "retrained"))
    return float((point["score"] - bare) / (retrained - bare))
