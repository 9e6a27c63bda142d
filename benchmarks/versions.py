"""How much of a skill reaches the version after the next: one bridge, two in a row, and one joined from sketches.

    python -m benchmarks.versions --tasks TASKS --text CORPUS/train-05.jsonl.gz --zoo ZOO

ZOO is made by `python -m benchmarks.zoo.build`. Nothing is trained. Ways that are already in the record are skipped,
and the record is rendered into docs.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality import ZOO, zoo_models
from benchmarks.zoo.specs import GRID_SKILLS
from castlora import evaluate, fit, join, sketch, translate
from castlora.bench.grid import write_missing
from castlora.bench.spec import SKILL_SLOT, BenchmarkModel
from castlora.bench.tables import mean_with_interval, measured_with
from castlora.bridge.cast_maps import SCALE_BETWEEN_RELATED

ROUTES = ("llama-s:llama-s-next:llama-s-later", "llama-s-later:llama-s-next:llama-s")
_PASSAGE_BYTES = 640
"""What fills 256 tokens of the zoo's tokenizers, as many as a fit reads of a passage."""
_FEW, _DEFAULT, _MANY = 8192, 32768, 131072
_INTRODUCTION = """
A skill goes from S to U, the version after the next, P being the version between. Nothing is trained, and no bridge has
seen an adapter. Each seed draws the text of all bridges and sketches anew. Lift is (moved − bare U) / (adapter
retrained on U − bare U).
"""


@dataclass(frozen=True)
class Bridges:
    """The bridges of a route and a seed, each made when it is first asked for."""

    folder: Path
    models: Mapping[str, BenchmarkModel]
    route: Sequence[str]
    """S, P and U."""
    text: str
    seed: int

    def fitted(self, source: int, target: int) -> Path:
        """Between two of the models, which run side by side."""
        places = self._base(source), self._base(target)
        return self._made(f"{source} to {target}", lambda out: fit(*places, out, self.text, seed=self.seed))

    def joined(self, places: int) -> Path:
        """From S to U, of sketches at about so many places."""
        source, target = (str(self._sketched(number, places)) for number in (0, 2))
        return self._made(f"joined at {places}", lambda out: join(source, target, out))

    def _sketched(self, model: int, places: int) -> Path:
        settings = {"text": self.text, "passage_bytes": _PASSAGE_BYTES, "places": places, "seed": self.seed}
        return self._made(f"{model} at {places}", lambda out: sketch(self._base(model), out, **settings))

    def _base(self, model: int) -> str:
        return self.models[self.route[model]].base

    def _made(self, name: str, make: Callable[[str], Path]) -> Path:
        place = self.folder / name
        return place if place.exists() else make(str(place))


def _over(bridge: Path, adapter: str, out: Path, scale: float | None = None) -> str:
    (moved,) = translate(str(bridge), [adapter], str(out), scale)
    return str(moved)


def _in_a_row(bridges: Bridges, adapter: str, out: Path, scale: float | None) -> str:
    first, second = bridges.fitted(0, 1), bridges.fitted(1, 2)
    return _over(second, _over(first, adapter, out / "halfway", scale), out / "there", scale)


Way = Callable[[Bridges, str, Path], str]
"""Bridges, adapter and a folder to write → the adapter moved to U."""
WAYS: Mapping[str, Way] = {
    "as it is": lambda _bridges, adapter, _out: adapter,
    "one bridge": lambda bridges, adapter, out: _over(bridges.fitted(0, 2), adapter, out),
    "two bridges": lambda bridges, adapter, out: _in_a_row(bridges, adapter, out, None),
    "two bridges, each scaled": lambda bridges, adapter, out: _in_a_row(bridges, adapter, out, SCALE_BETWEEN_RELATED),
    **{
        f"joined sketches, {places} places": lambda bridges, adapter, out, places=places: _over(
            bridges.joined(places), adapter, out
        )
        for places in (_DEFAULT, _FEW, _MANY)
    },
}


@cache
def accuracy(base: str, task: str, adapter: str | None) -> float:
    """Accuracy of a model on the test items of a task; remembered, since all ways are measured by the same two."""
    return float(evaluate(base, task, adapter)["score"])


def measure(models: Mapping[str, BenchmarkModel], way: str, bridges: Bridges, skill: str, task: str) -> dict[str, Any]:
    """Accuracy on U of an adapter of S that went a way, with what lift is measured by."""
    of_source, of_target = (models[bridges.route[end]].adapters.replace(SKILL_SLOT, skill) for end in (0, -1))
    base = models[bridges.route[-1]].base
    with tempfile.TemporaryDirectory() as temporary:
        score = accuracy(base, task, WAYS[way](bridges, of_source, Path(temporary)))
    return {
        "route": ":".join(bridges.route),
        "way": way,
        "skill": skill,
        "seed": bridges.seed,
        "metric": "accuracy",
        "score": score,
        "bare": accuracy(base, task, None),
        "retrained": accuracy(base, task, of_target),
    }


def record_path(out: Path, route: str, way: str, skill: str, seed: int) -> Path:
    """File of one adapter that went one way."""
    return out / route.replace(":", "-") / f"{way.replace(',', '').replace(' ', '-')}.{skill}.seed{seed}.json"


def lift(record: Mapping[str, Any]) -> float:
    """Lift of a record."""
    return float((record["score"] - record["bare"]) / (record["retrained"] - record["bare"]))


def render(records: Sequence[dict[str, Any]]) -> str:
    """The page."""
    cells = list(dict.fromkeys((record["route"], record["skill"]) for record in records))
    found = [way for way in WAYS if any(record["way"] == way for record in records)]
    rows = [f"| S → P → U | skill | {' | '.join(found)} |", "|---" * (2 + len(found)) + "|"]
    means: dict[str, list[float]] = {way: [] for way in found}
    for route, skill in cells:
        written = []
        for way in found:
            lifts = [lift(one) for one in records if (one["route"], one["skill"], one["way"]) == (route, skill, way)]
            written.append(f"{np.mean(lifts):.2f} ({len(lifts)})" if lifts else "–")
            means[way] += [float(np.mean(lifts))] if lifts else []
        rows.append(f"| {route.replace(':', ' → ')} | {skill} | {' | '.join(written)} |")
    rows.append(f"| mean | | {' | '.join(mean_with_interval(means[way]) for way in found)} |")
    closing = "In brackets: seeds. Means are over pairs and skills, with bootstrap 95 % intervals over them."
    parts = ["# The version after the next", " ".join(_INTRODUCTION.split()), "\n".join(rows), closing]
    return "\n\n".join([*parts, "## Environment", measured_with(records)]) + "\n"


def main(
    tasks: Path,
    text: Path,
    out: Path = Path("benchmarks/results/versions"),
    page: Path = Path("docs/versions.md"),
    zoo: Path = ZOO,
    routes: Sequence[str] = ROUTES,
    skills: Sequence[str] = GRID_SKILLS,
    ways: Sequence[str] = tuple(WAYS),
    seeds: Sequence[int] = (0, 1, 2),
) -> None:
    """Runs what is missing of the record, and renders it.

    Args:
        tasks: folder of task files, one folder per skill
        text: general text
        out: folder of the records
        page: Markdown file to write
        zoo: folder of the zoo, with the models that the repository does not hold
        routes: S:P:U, each
        skills: names of skills
        ways: how a skill goes
        seeds: of the draw of the text
    """
    torch.set_num_threads(1)
    disable_progress_bar()
    models = zoo_models(zoo, Path())
    with tqdm(total=len(seeds) * len(routes) * len(ways), desc="ways", unit="way") as progress:
        for seed, route in product(seeds, routes):
            with tempfile.TemporaryDirectory() as temporary:
                bridges = Bridges(Path(temporary), models, route.split(":"), str(text), seed)
                for way in ways:
                    for skill in skills:
                        path = record_path(out, route, way, skill, seed)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        task = str(tasks / skill / "test.jsonl")
                        write_missing(path, partial(measure, models, way, bridges, skill, task))
                    progress.update()
    page.write_text(render([json.loads(path.read_text()) for path in sorted(out.glob("*/*.json"))]), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
