"""How alike two models' activations are at paired places, before any update: the fit of a pairing."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from castlora.alignment.positions import Batch, Side, align_passages, batches, counted_places
from castlora.maps.fitting import rows_at
from castlora.model_pair import Models
from castlora.models.capture import capture
from castlora.models.pairing import ModulePair, Pairing
from castlora.report import Similarity
from castlora.text.passages import Passage

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
    (batch,) = batches(aligned, len(aligned), torch.device("cpu"))
    layers = list(_by_layer(pairing))
    with models.teacher.disable_adapter(), student.disable_adapter():
        models.use("source")
        of_sources = [_source_grams(models.source, layer, batch) for layer in layers]
        source_layers = _layer_grams(models.source, batch, "source")
        models.use("target")
        modules: dict[str, float] = {}
        for layer, of_source in zip(layers, of_sources, strict=True):
            modules |= _of_modules(models.target, layer, batch, of_source)
        target_layers = _layer_grams(models.target, batch, "target")
    of_layers = [[float((row * column).sum()) for column in source_layers] for row in target_layers]
    return Similarity(modules, of_layers)


def _by_layer(pairing: Pairing) -> Iterator[list[ModulePair]]:
    """One target layer at a time, so that the activations of few modules are in memory together."""
    by_layer = sorted(pairing.mapped, key=lambda pair: pair.target.layer)
    return (list(pairs) for _, pairs in groupby(by_layer, key=lambda pair: pair.target.layer))


def _source_grams(source: PreTrainedModel, pairs: Sequence[ModulePair], batch: Batch) -> dict[str, list[Tensor]]:
    """Gram matrices of what comes out of the source for each branch, by target module."""
    names = {branch.source_module for pair in pairs for branch in pair.branches}
    with capture(source, names, partial(_rows, batch, "source")) as captured:
        _read(source, batch, "source")
    return {
        pair.target.name: [
            centred_gram(captured[branch.source_module].outputs[:, branch.source_rows]) for branch in pair.branches
        ]
        for pair in pairs
    }


def _of_modules(
    target: PreTrainedModel, pairs: Sequence[ModulePair], batch: Batch, of_source: Mapping[str, Sequence[Tensor]]
) -> dict[str, float]:
    """CKA of each target module with its partners, the mean over its branches."""
    with capture(target, [pair.target.name for pair in pairs], partial(_rows, batch, "target")) as captured:
        _read(target, batch, "target")
    alike = {}
    for pair in pairs:
        outputs, grams = captured[pair.target.name].outputs, of_source[pair.target.name]
        of_branches = [
            float((gram * centred_gram(outputs[:, branch.target_rows])).sum())
            for gram, branch in zip(grams, pair.branches, strict=True)
        ]
        alike[pair.target.name] = sum(of_branches) / len(of_branches)
    return alike


def _layer_grams(model: PreTrainedModel, batch: Batch, side: Side) -> list[Tensor]:
    # The first hidden states are the embeddings.
    states = (_read(model, batch, side, with_hidden=True).hidden_states or ())[1:]
    return [centred_gram(_rows(batch, side, after_layer)) for after_layer in states]


def _read(model: PreTrainedModel, batch: Batch, side: Side, with_hidden: bool = False) -> CausalLMOutputWithPast:
    output: CausalLMOutputWithPast = model(
        input_ids=batch[f"{side}_ids"].to(model.device),
        attention_mask=batch[f"{side}_mask"].to(model.device),
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
