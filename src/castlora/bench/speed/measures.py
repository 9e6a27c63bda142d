"""The measures of the speed benchmark: serving, and the closed-form start."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from castlora.adapters.factors import LowRank, write_portable
from castlora.adapters.live import attach_lora
from castlora.alignment.positions import AlignedPassage, batches, thinned
from castlora.bench.speed.models import SHAPES, Subject, TextKind, random_maps
from castlora.bench.speed.timing import Clock, Ratio, Side, interleaved
from castlora.config import DEFAULT, ShapeName
from castlora.maps.cast_layer import CastLayer
from castlora.maps.fitting import STATISTICS_BATCH, SiteMoments, ridge_factors, solve_in_parts
from castlora.maps.starts import cast_layer, fold_maps
from castlora.models.pairing import Pairing

TEXTS: tuple[TextKind, ...] = ("answered prompts", "running text")
THINNED = "running text, one place of eight"
_PLACES_PER_COUNTED = 8
"""As `castlora fit` has it by default: 100,000 places where 4096 passages of 256 tokens have some 800,000."""
SERVING_TARGET, FIT_TARGET = 1.0, 1.15
SHORT = 4
"""What takes little time is repeated that much more often."""
_GENERATED_TOKENS = 32


@dataclass(frozen=True)
class SpeedSettings:
    """How much is measured."""

    shape: ShapeName
    seed: int
    repeats: int
    """Repetitions that count."""
    rank: int
    """Rank of the source adapter."""
    length: int
    """Tokens of a passage."""
    batch_size: int
    """Passages of a step, and of a request."""
    passages: int
    """Passages that the maps are fitted on."""
    doublings: int
    """Of each number that growth is measured against."""
    threads: int
    """Threads of torch on a processor."""

    def subject(self, device: torch.device) -> Subject:
        """Models and adapter, new."""
        return Subject.build(SHAPES[self.shape], self.rank, self.seed, device)


def measure_serving(settings: SpeedSettings, device: torch.device) -> list[Ratio]:
    """Tokens per second with a transferred adapter, over those with a plain LoRA and with live CAST layers."""
    subject = settings.subject(device)
    transferred, plain, unfolded = served_models(subject)
    drawn = subject.passages(settings.batch_size, settings.length, "running text", settings.seed)
    ids = torch.tensor([passage.target_ids for passage in drawn], device=device)

    def forward(model: nn.Module) -> Callable[[], Tensor]:
        return lambda: model(input_ids=ids, use_cache=False).logits

    def generation(model: Any) -> Callable[[], Tensor]:
        length = dict(min_new_tokens=_GENERATED_TOKENS, max_new_tokens=_GENERATED_TOKENS)
        return lambda: model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length
        )

    models = {"transferred adapter": transferred, "plain LoRA": plain, "unfolded CAST layers": unfolded}
    ratios = []
    with torch.no_grad():
        for name, work, tokens in (
            ("forward", forward, ids.numel()),
            ("generation", generation, len(ids) * _GENERATED_TOKENS),
        ):
            works = {label: work(model) for label, model in models.items()}
            seconds = interleaved(Clock(device), works, SHORT * settings.repeats)
            own, other, live = (Side(label, tokens, seconds[label]) for label in works)
            ratios += [
                Ratio("serving", name, own, other, of_rates=True, target=SERVING_TARGET),
                Ratio("serving", name, own, live, of_rates=True),
            ]
    return ratios


def served_models(subject: Subject) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Copies of the target with an adapter that was folded and written, with a plain LoRA, and with the live layers."""
    folded: dict[str, LowRank] = {}
    unfolded = deepcopy(subject.target)
    for pair in subject.pairing.mapped:
        maps = random_maps(pair, subject.factors)
        folded |= fold_maps(Pairing((pair,), subject.pairing.layer_map, ()), subject.factors, maps)
        (branch,) = pair.branches
        live = cast_layer(branch, subject.factors, maps[pair.target.name, 0])
        module = unfolded.get_submodule(pair.target.name)
        module.register_forward_hook(_adding(live.to(unfolded.device, unfolded.dtype)))
    rank = max(lora.rank for lora in folded.values())
    with TemporaryDirectory() as folder:
        write_portable(Path(folder), folded, subject.target_slots, rank, "target", None)
        transferred = PeftModel.from_pretrained(deepcopy(subject.target), folder)
    plain = attach_lora(deepcopy(subject.target), folded, rank)
    return transferred.eval(), plain.eval(), unfolded


def _adding(layer: CastLayer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda _module, arguments, output: output + layer(arguments[0])


def measure_fit(settings: SpeedSettings, device: torch.device) -> list[Ratio]:
    """Seconds of the closed-form start over those of the forward passes that it cannot do without."""
    subject = settings.subject(device)
    texts: dict[str, list[AlignedPassage]] = {
        text: subject.passages(settings.passages, settings.length, text, settings.seed) for text in TEXTS
    }
    places = sum(len(passage.weights) for passage in texts["running text"])
    texts[THINNED] = thinned(texts["running text"], places // _PLACES_PER_COUNTED, settings.seed)
    ratios = []
    for text, passages in texts.items():
        tokens = 2 * settings.length * len(passages)
        works: dict[str, Callable[[], object]] = {
            "statistics and factors": partial(fit, subject, passages),
            "statistics": partial(count, subject, passages),
            "forward passes": partial(read, subject, passages),
        }
        seconds = interleaved(Clock(device), works, settings.repeats)
        whole, statistics, bare = (Side(name, tokens, seconds[name]) for name in works)
        ratios += [
            Ratio("fit", text, whole, bare, of_rates=False, target=FIT_TARGET),
            Ratio("fit", text, statistics, bare, of_rates=False),
        ]
    return ratios


def fit(subject: Subject, passages: Sequence[AlignedPassage]) -> None:
    """The factors that a transfer begins with."""
    _solve(subject, passages, lambda moments: ridge_factors(moments, subject.pairing, subject.factors, DEFAULT.ridge))


def count(subject: Subject, passages: Sequence[AlignedPassage]) -> None:
    """The statistics alone."""
    _solve(subject, passages, lambda _moments: {})


def _solve(
    subject: Subject, passages: Sequence[AlignedPassage], solve: Callable[[SiteMoments], dict[str, LowRank]]
) -> None:
    solve_in_parts(subject.source, subject.target, subject.pairing, subject.factors, passages, solve)


@torch.no_grad()
def read(subject: Subject, passages: Sequence[AlignedPassage]) -> None:
    """Forward passes of both models, in the same batches."""
    for batch in batches(passages, STATISTICS_BATCH, subject.target.device):
        subject.source(input_ids=batch["source_ids"], attention_mask=batch["source_mask"], use_cache=False)
        subject.target(input_ids=batch["target_ids"], attention_mask=batch["target_mask"], use_cache=False)
