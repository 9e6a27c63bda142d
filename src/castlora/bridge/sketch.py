"""Sketching a model: its activations at places of a text that any other model can be read at too."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from castlora import __version__
from castlora.alignment.grid import draw_grid, on_grid_alone
from castlora.alignment.positions import AlignedPassage, batches
from castlora.alignment.tokens import ByteTokenizer
from castlora.bridge.sketch_files import (
    DTYPE,
    INPUTS,
    MODEL_FOLDER,
    SKETCH_FILE,
    ModelSite,
    SiteTensors,
    SketchPlan,
    part_name,
    plan_sketch,
    write_part,
)
from castlora.config import check_above_zero, check_seed
from castlora.errors import UserError
from castlora.execution.launcher import process_count
from castlora.execution.processes import from_main, this_process, wait_for_all
from castlora.execution.run_directory import RunDirectory, check_output, hold_to_inputs, open_run, write_whole
from castlora.maps.fitting import STATISTICS_BATCH, activations_of
from castlora.model_pair import Loading
from castlora.models.loading import context_length
from castlora.models.modules import Role
from castlora.publishing.names import public_name
from castlora.teaching.curriculum import TextSource
from castlora.text.passages import HUB_DEFAULT, Passage, cut_passages, passages_sha256, read_documents

logger = logging.getLogger("castlora")

_PASSAGES_PER_PART = 256
_BYTES_PER_TOKEN = 4
"""Of common tokenizers in English; `places` are about as many as asked for where it is so."""


def sketch(
    model: str,
    out: str,
    text: str | None = None,
    roles: Sequence[Role] | None = None,
    passages: int = 4096,
    passage_bytes: int = 1024,
    places: int = 32768,
    seed: int = 0,
    sharded: bool = False,
) -> Path:
    """Keeps the activations of one model at a grid of places of general text, for `castlora.join`.

    The grid is drawn in bytes of the text and knows no tokenizer, so that sketches of any two models over the same text
    share the places where both end a token. For N models N readings then give the bridges between all of them.

    Called again with the same arguments after an interruption, it continues where it was. Where a launcher such as
    torchrun has started several processes on one machine, each calls it with the same arguments, and they share the
    text.

    Args:
        model: folder or hub id
        out: folder to write; it must not hold anything else
        text: general text, a .txt or .jsonl file (may be gzipped) or a hub data set; by default allenai/c4
        roles: of the modules that are read, as ("q", "v"); by default all
        passages: how much text is read
        passage_bytes: bytes of a passage, at most; what exceeds the context of the model is not read
        places: how many places are kept, about; several times the width of the model
        seed: of the draw of the text and of the grid
        sharded: whether each of several processes keeps only its part of the model's layers (FSDP2); the main one then
            reads all of the text

    Returns:
        the folder

    Raises:
        UserError: bad input; nothing has been written.
    """
    check_seed(seed)
    check_above_zero(passages=passages, passage_bytes=passage_bytes, places=places)
    loading = Loading(sharded=sharded)
    loading.check(is_plain=True, processes=process_count())
    request: dict[str, Any] = {
        "model": model, "text": text, "roles": list(roles) if roles else None, "passages": passages,
        "passage_bytes": passage_bytes, "places": places, "seed": seed, "castlora_version": __version__,
    }  # fmt: skip
    check_output(out, request)
    started = time.monotonic()
    plan = plan_sketch(model, roles)
    from_main(TextSource(text).check)
    drawn = from_main(partial(_draw, text or HUB_DEFAULT, passages, passage_bytes, seed))
    parts = [drawn[start : start + _PASSAGES_PER_PART] for start in range(0, len(drawn), _PASSAGES_PER_PART)]
    loaded, tokenizer = loading.load(model, None, None)
    spelled = ByteTokenizer.from_tokenizer(tokenizer)
    share = places * _BYTES_PER_TOKEN / sum(len(passage.text.encode()) for passage in drawn)

    with ExitStack() as held:
        # The main process holds the folder, until all are done.
        run = from_main(lambda: held.enter_context(open_run(out, request, plan.bytes_per_place * places)))
        digest = passages_sha256(drawn)
        from_main(partial(hold_to_inputs, run.state, {"--text": digest}))
        run.parts.mkdir(exist_ok=True)

        def keep(number: int) -> None:
            # An interrupted run has kept some.
            if not (run.parts / part_name(number)).exists():
                aligned, on_grid = _on_grid(parts[number], number * _PASSAGES_PER_PART, spelled, plan, share, seed)
                _keep_part(run.parts / part_name(number), on_grid, _activations(loaded, plan, aligned))

        _share_parts(len(parts), keep, sharded)
        described = {**request, "text": text and public_name(text), "text_sha256": digest, "passages": len(drawn)}
        from_main(partial(_publish, run, plan, {**described, "parts": len(parts)}))
    logger.info("Wrote %s after %.0f s", out, time.monotonic() - started)
    return Path(out)


def _share_parts(count: int, keep: Callable[[int], None], sharded: bool) -> None:
    """Has each part kept by one of the processes; a model that they hold together is read by the main one alone."""
    here = this_process()
    numbers = range(count) if sharded else range(here.index, count, here.count)
    for number in tqdm(numbers, desc="parts", unit="part"):
        if sharded:
            from_main(partial(keep, number))
        else:
            keep(number)
    wait_for_all()


def _draw(text: str, passages: int, passage_bytes: int, seed: int) -> list[Passage]:
    drawn = cut_passages(read_documents(text), passages, passage_bytes, seed)
    if len(drawn) < 2:
        raise UserError(f"The text yields {len(drawn)} passages, at least 2 are needed; give more text.")
    return drawn


def _on_grid(
    passages: Sequence[Passage], first: int, tokenizer: ByteTokenizer, plan: SketchPlan, share: float, seed: int
) -> tuple[list[AlignedPassage], Tensor]:
    """Passages of a part that have places, and those places: number of the passage, and bytes of it read by then."""
    aligned, places = [], []
    longest = context_length(plan.config)
    texts = [passage.text for passage in passages]
    for number, (text, encoded) in enumerate(zip(texts, tokenizer.encode_batch(texts), strict=True), first):
        on_grid = draw_grid(len(text.encode()), number, share, seed)
        read, ends = on_grid_alone(encoded, on_grid, longest)
        if len(ends):
            aligned.append(read)
            places += [(number, end) for end in ends.tolist()]
    return aligned, torch.tensor(places, dtype=torch.long).reshape(-1, 2)


def _activations(model: PreTrainedModel, plan: SketchPlan, aligned: Sequence[AlignedPassage]) -> SiteTensors:
    """What the modules of each input take and make at the places of passages, as it is kept."""
    kept: dict[ModelSite, dict[str, list[Tensor]]] = {
        site: {name: [torch.empty(0, width)] for name, width in widths.items()} for site, widths in plan.widths.items()
    }
    for batch in batches(aligned, STATISTICS_BATCH, torch.device("cpu")):
        read = activations_of(model, list(plan.slots), batch, "target", None)
        for site, slots in plan.sites.items():
            # Modules that read the same input do so from one tensor.
            kept[site][INPUTS].append(read[slots[0].name].inputs.to("cpu", DTYPE))
            for slot in slots:
                kept[site][slot.name].append(read[slot.name].outputs.to("cpu", DTYPE))
    return {site: {name: torch.cat(rows).to(DTYPE) for name, rows in of_site.items()} for site, of_site in kept.items()}


def _keep_part(folder: Path, places: Tensor, activations: SiteTensors) -> None:
    """Writes a part, in full or not at all."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unfinished.mkdir(exist_ok=True)
    write_part(unfinished, places, activations)
    unfinished.replace(folder)


def _publish(run: RunDirectory, plan: SketchPlan, description: dict[str, Any]) -> None:
    """Puts all parts and what describes them into the folder."""
    run.finished.mkdir()
    for number in range(description["parts"]):
        (run.parts / part_name(number)).replace(run.finished / part_name(number))
    plan.config.save_pretrained(run.finished / MODEL_FOLDER)
    write_whole(run.finished / SKETCH_FILE, json.dumps(description, indent=1))
    run.publish()
