"""How alike two models' activations are at paired places, before any update: the fit of a pairing."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from castlora.capture import capture
from castlora.fitting import rows_at
from castlora.pairing import ModulePair, Pairing
from castlora.positions import Batch, align_passages, batches, counted_places
from castlora.report import Similarity
from castlora.stages import Models
from castlora.teacher import Side
from castlora.text import Passage

_PASSAGES = 16
_PLACES = 256
_FEWEST_PLACES = 4


def centred_gram(rows: Tensor) -> Tensor:
    """The U-centred Gram matrix of activations, scaled to norm 1.

    The inner product of two of them is the debiased CKA (Székely and Rizzo, 2014; Nguyen et al., 2021), which is 0 on
    average where two activations have nothing to do with each other, however few rows there are.

    Args:
        rows: shape (places, width), at least 4 places

    Returns:
        shape (places, places), in fp64; NaN where all rows are alike
    """
    rows = rows.double()
    count = len(rows)
    gram = (rows @ rows.T).fill_diagonal_(0)
    of_row = gram.sum(0) / (count - 2)
    centred = gram - of_row[:, None] - of_row[None, :] + gram.sum() / ((count - 1) * (count - 2))
    centred.fill_diagonal_(0)
    scaled: Tensor = centred / centred.norm()
    return scaled


def cka(x: Tensor, y: Tensor) -> float:
    """Debiased linear CKA of two activations at the same places.

    Args:
        x: shape (places, width of x), at least 4 places
        y: shape (places, width of y)

    Example:
        >>> x = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
        >>> rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))[0]
        >>> round(cka(x, 3 * x @ rotation), 6)
        1.0
    """
    return float((centred_gram(x) * centred_gram(y)).sum())


@torch.no_grad()
def measure_similarity(
    models: Models, student: PeftModel, pairing: Pairing, passages: Sequence[Passage], max_length: int
) -> Similarity:
    """Compares both bare models on the same places of a text, those inside prompts included.

    Args:
        models: both models; the source carries the adapter
        student: the PEFT model around the target
        pairing: which modules belong together
        passages: held-out text
        max_length: tokens kept per passage, in either tokenizer

    Returns:
        nothing of either kind where the text has fewer than four places
    """
    in_both = models.source_bytes, models.target_bytes
    aligned = list(align_passages(passages[:_PASSAGES], *in_both, max_length, context_weight=1.0))
    if sum(len(passage.weights) for passage in aligned) < _FEWEST_PLACES:
        return Similarity({}, [])
    (batch,) = batches(aligned, len(aligned), next(student.parameters()).device)
    with models.teacher.disable_adapter(), student.disable_adapter():
        modules = {name: value for layer in _by_layer(pairing) for name, value in _of_modules(models, layer, batch)}
        return Similarity(modules, _of_layers(models, batch))


def _by_layer(pairing: Pairing) -> Iterator[list[ModulePair]]:
    """One target layer at a time, so that the activations of few modules are in memory together."""
    by_layer = sorted(pairing.mapped, key=lambda pair: pair.target.layer)
    return (list(pairs) for _, pairs in groupby(by_layer, key=lambda pair: pair.target.layer))


def _of_modules(models: Models, pairs: Sequence[ModulePair], batch: Batch) -> Iterator[tuple[str, float]]:
    sources = {branch.source_module for pair in pairs for branch in pair.branches}
    targets = [pair.target.name for pair in pairs]
    with (
        capture(models.source, sources, partial(_rows, batch, "source")) as in_source,
        capture(models.target, targets, partial(_rows, batch, "target")) as in_target,
    ):
        _read(models.source, batch, "source")
        _read(models.target, batch, "target")
    for pair in pairs:
        outputs = in_target[pair.target.name].outputs
        alike = [
            cka(in_source[branch.source_module].outputs[:, branch.source_rows], outputs[:, branch.target_rows])
            for branch in pair.branches
        ]
        yield pair.target.name, sum(alike) / len(alike)


def _of_layers(models: Models, batch: Batch) -> list[list[float]]:
    in_source, in_target = _layer_grams(models.source, batch, "source"), _layer_grams(models.target, batch, "target")
    return [[float((row * column).sum()) for column in in_source] for row in in_target]


def _layer_grams(model: PreTrainedModel, batch: Batch, side: Side) -> list[Tensor]:
    # The first hidden states are the embeddings.
    states = (_read(model, batch, side, with_hidden=True).hidden_states or ())[1:]
    return [centred_gram(_rows(batch, side, after_layer)) for after_layer in states]


def _read(model: PreTrainedModel, batch: Batch, side: Side, with_hidden: bool = False) -> CausalLMOutputWithPast:
    output: CausalLMOutputWithPast = model(
        input_ids=batch[f"{side}_ids"],
        attention_mask=batch[f"{side}_mask"],
        output_hidden_states=with_hidden,
        use_cache=False,
        logits_to_keep=1,
    )
    return output


def _rows(batch: Batch, side: Side, activations: Tensor) -> Tensor:
    """Activations at places from all over the batch, shape (places, width), on the processor."""
    places = counted_places(batch[f"{side}_positions"], batch["weights"] > 0)
    every = -(-len(places[0]) // _PLACES)
    return rows_at(activations, len(batch[f"{side}_ids"]), (places[0][::every], places[1][::every])).cpu()
