"""Records of the benchmark, pooled: the lift of each method on each pair and skill, and its mean."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from castlora.bench.methods import METHODS
from castlora.config import REGIMES, Regime
from castlora.lift import Lift, bootstrap_interval, lift_with_interval

METHOD_ORDER = tuple(METHODS)
DEFAULT_METHOD = METHOD_ORDER[0]

References = dict[tuple[str, str], dict[str, Any]]
"""(pair, skill) → model → figures."""


@dataclass(frozen=True)
class PooledCell:
    """All seeds of one method on one pair, skill and text."""

    pair: str
    skill: str
    regime: str
    method: str
    seeds: int
    score: float
    nll: float | None
    """Mean negative log-likelihood of the right completions, in nats; None where a task does not say."""
    lift: Lift
    lift_by_seed: dict[int, float]
    """Lift of each seed; empty where there is nothing to gain."""
    text_loss_added: float | None
    """What the adapter adds to the bare target's loss on held-out text, in nats per token; None where not measured."""


def read_results(folder: Path) -> tuple[References, list[dict[str, Any]]]:
    """References by (pair, skill), and all runs."""
    references, runs = {}, []
    for path in sorted(folder.glob("*/*/*.json")):
        record = json.loads(path.read_text())
        if path.name == "references.json":
            references[record["pair"], record["skill"]] = record["references"]
        else:
            runs.append(record)
    return references, runs


def make_cells(references: References, runs: Iterable[dict[str, Any]]) -> list[PooledCell]:
    """Pools the seeds of every cell; the interval resamples items and seeds."""
    grouped: dict[tuple[str, str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        grouped[run["pair"], run["skill"], run["regime"], run["method"]].append(run)
    cells = []
    for (pair, skill, regime, method), group in sorted(grouped.items()):
        reference = references[pair, skill]
        lift = lift_with_interval(_items([reference["bare target"]]), _items(group), _items([reference["retrained"]]))
        score = float(np.mean([run["score"] for run in group]))
        likelihoods = [run["nll"] for run in group if run["nll"] is not None]
        nll = float(np.mean(likelihoods)) if likelihoods else None
        bare, retrained = (reference[name]["score"] for name in ("bare target", "retrained"))
        by_seed = {run["seed"]: (run["score"] - bare) / (retrained - bare) for run in group} if lift.countable else {}
        added = text_loss_added(reference["bare target"], group)
        cells.append(PooledCell(pair, skill, regime, method, len(group), score, nll, lift, by_seed, added))
    return cells


def text_loss_added(bare: dict[str, Any], runs: Iterable[dict[str, Any]]) -> float | None:
    """Mean difference to the bare target's loss on held-out text, in nats per token; None where not measured."""
    losses = [run["text_loss"] for run in runs if "text_loss" in run]
    return float(np.mean(losses)) - float(bare["text_loss"]) if losses and "text_loss" in bare else None


@dataclass(frozen=True)
class Comparison:
    """A method beside another, on the pairs and skills that both were run on, over the seeds that both have."""

    cells: int
    above: float
    """Mean of its lift minus the other's."""
    ci95: tuple[float, float]
    """Bootstrap interval over pairs and skills."""
    ahead: int
    """Cells where it is above the other."""
    behind: int


@dataclass(frozen=True)
class MeanLift:
    """A method under one regime, averaged over the pairs and skills on which it was run."""

    regime: Regime
    method: str
    cells: int
    lift: float
    ci95: tuple[float, float]
    """Bootstrap interval over pairs and skills."""
    ratio: float
    comparison: Comparison | None
    """With the reference method; None for that one itself and where it has no seed of a cell in common."""


def reference_method(cells: Sequence[PooledCell]) -> str:
    """The method that the others are compared with: the default, or what was run that stands nearest to it."""
    run = {cell.method for cell in cells}
    return next((method for method in METHOD_ORDER if method in run), DEFAULT_METHOD)


def mean_lifts(cells: Sequence[PooledCell]) -> list[MeanLift]:
    """The means of all methods, by regime; cells where retraining gains too little are left out."""
    means, reference = [], reference_method(cells)
    for regime in REGIMES:
        countable = [cell for cell in cells if cell.regime == regime and cell.lift.countable]
        of_reference = [cell for cell in countable if cell.method == reference]
        for method in METHOD_ORDER:
            group = [cell for cell in countable if cell.method == method]
            if not group:
                continue
            lifts = np.array([cell.lift.lift for cell in group])
            means.append(
                MeanLift(
                    regime,
                    method,
                    len(group),
                    float(lifts.mean()),
                    bootstrap_interval(lifts),
                    float(np.mean([cell.lift.ratio for cell in group])),
                    compare(group, of_reference) if method != reference else None,
                )
            )
    return means


def compare(cells: Iterable[PooledCell], with_cells: Iterable[PooledCell]) -> Comparison | None:
    """Compares two methods where both were run with the same seeds; None where they were not.

    Args:
        cells: of the one method, all under one regime
        with_cells: of the other
    """
    others = {(cell.pair, cell.skill): cell.lift_by_seed for cell in with_cells}
    above = []
    for cell in cells:
        other = others.get((cell.pair, cell.skill), {})
        seeds = cell.lift_by_seed.keys() & other.keys()
        if seeds:
            above.append(np.mean([cell.lift_by_seed[seed] - other[seed] for seed in seeds]))
    if not above:
        return None
    differences = np.array(above)
    ahead, behind = int((differences > 0).sum()), int((differences < 0).sum())
    return Comparison(len(above), float(differences.mean()), bootstrap_interval(differences), ahead, behind)


@dataclass(frozen=True)
class Drift:
    """What a method does under one regime to the perplexity on held-out text, over the cells where it was measured."""

    regime: Regime
    method: str
    cells: int
    perplexity: float
    """Geometric mean of perplexity / perplexity of the bare target."""
    retrained: float
    """The same of the retrained adapters of these cells."""


def drifts(references: References, cells: Sequence[PooledCell]) -> list[Drift]:
    """The drift of all methods, by regime."""
    found = []
    for regime, method in product(REGIMES, METHOD_ORDER):
        group = [cell for cell in cells if (cell.regime, cell.method) == (regime, method)]
        added = {(cell.pair, cell.skill): cell.text_loss_added for cell in group if cell.text_loss_added is not None}
        of_retrained = [
            text_loss_added(references[place]["bare target"], [references[place]["retrained"]]) for place in added
        ]
        if added:
            means = (float(np.exp(np.mean(list(values)))) for values in (added.values(), of_retrained))
            found.append(Drift(regime, method, len(added), *means))
    return found


def _items(group: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([[float(score) for score in run["scores"]] for run in group])
