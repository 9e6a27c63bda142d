"""What each part of the recipe adds: pairs of methods of the benchmark that differ in one thing."""

from collections.abc import Sequence
from dataclasses import dataclass

from castlora.bench.results import Comparison, PooledCell, compare
from castlora.config import Regime


@dataclass(frozen=True)
class Part:
    """A change to the recipe, measured as one method beside another."""

    change: str
    regime: Regime
    method: str
    """The method that has it."""
    without: str
    """The method that does not."""


@dataclass(frozen=True)
class MeasuredPart:
    """A part, and the lift that it adds."""

    part: Part
    added: Comparison


_RIDGE = "ridge start, rehearsed"
_SINGLE, _GENERIC = "ridge start, single sentences", "ridge start, generic formats"
_DISTILLED = "paper start, nonlinear, distilled"
PARTS = (
    Part("a closed-form start instead of a fresh LoRA", "general", "ridge start", "fresh"),
    Part("a closed-form start instead of a fresh LoRA", "format", "ridge start", "fresh"),
    Part("a closed-form start instead of a fresh LoRA", "prompts", "ridge start", "fresh"),
    Part("a closed-form start instead of a fresh LoRA, both rehearsed", "general", "default", "fresh, rehearsed"),
    Part("a closed-form start instead of a fresh LoRA, both rehearsed", "format", "default", "fresh, rehearsed"),
    Part("a closed-form start instead of a fresh LoRA, both rehearsed", "prompts", _RIDGE, "fresh, rehearsed"),
    Part("a closed-form start instead of the default's, both rehearsed", "prompts", _RIDGE, "default"),
    Part("a closed-form start instead of random maps", "general", "ridge start", "paper start"),
    Part("a closed-form start instead of random maps", "format", "ridge start", "paper start"),
    Part("a closed-form start instead of random maps", "prompts", "ridge start", "paper start"),
    Part("folded factors trained instead of the maps", "format", _SINGLE, f"{_SINGLE}, maps"),
    Part("prompts instead of running text", "general", "ridge start", "ridge start, running text"),
    Part("formats that the adapter listens to instead of common ones", "general", _SINGLE, _GENERIC),
    Part("the KL divergence alone taught in the paper's recipe", "general", "paper, KL alone", "paper"),
    Part("hidden states alone taught in the paper's recipe", "general", "paper, MSE alone", "paper"),
    Part("nonlinear maps in the paper's recipe", "general", "paper, nonlinear", "paper"),
    Part("the choice of telling prompts", "format", _SINGLE, "ridge start, any prompts"),
    Part("up to three sentences, of 32 candidates, instead of one, of 8", "general", "ridge start", _SINGLE),
    Part("up to three sentences, of 32 candidates, instead of one, of 8", "format", "ridge start", _SINGLE),
    Part("the tokens of the prompts taught too", "general", "default, prompts taught", "default"),
    Part("the tokens of the prompts taught too", "format", "default, prompts taught", "default"),
    Part("the tokens of the prompts taught too", "prompts", "default, prompts taught", "default"),
    Part("hidden states taught too, inside prompts", "general", "default, hidden states", "default"),
    Part("hidden states taught too, inside prompts", "format", "default, hidden states", "default"),
    Part("hidden states taught too, inside prompts", "prompts", "default, hidden states", "default"),
    Part("rehearsal of what the bare target writes", "general", "default", "ridge start"),
    Part("rehearsal of what the bare target writes", "format", "default", "ridge start"),
    Part("rehearsal of what the bare target writes", "prompts", "default", "fresh"),
    Part("rehearsal of what the bare target writes, closed-form start", "prompts", _RIDGE, "ridge start"),
    Part("nonlinear maps instead of linear ones", "prompts", "paper start, nonlinear", "paper start"),
    Part("a plain LoRA taught by nonlinear maps, instead of linear maps", "prompts", _DISTILLED, "paper start"),
)


def measured_parts(cells: Sequence[PooledCell]) -> list[MeasuredPart]:
    """The parts whose two methods were both run on some cells and seeds."""
    compared = ((part, _added(part, cells)) for part in PARTS)
    return [MeasuredPart(part, added) for part, added in compared if added is not None]


def _added(part: Part, cells: Sequence[PooledCell]) -> Comparison | None:
    of_regime = [cell for cell in cells if cell.regime == part.regime]
    return compare(*([cell for cell in of_regime if cell.method == name] for name in (part.method, part.without)))
