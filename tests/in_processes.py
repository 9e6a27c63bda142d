"""What each of several processes does for `test_processes.py`.

in_processes.py WORD...    castlora, with an adapter that only the main process has
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_recomputation import gradients as gradients_of
from test_recomputation import recompute
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from castlora.adapters.factors import LowRank
from castlora.adapters.live import attach_lora
from castlora.alignment.positions import AlignedPassage
from castlora.alignment.vocabulary import SharedVocabulary
from castlora.cli import main
from castlora.config import PAPER
from castlora.distillation.distill import Student, total_loss
from castlora.distillation.rehearsal import BareTarget, rehearsed
from castlora.distillation.teacher import LiveTeacher
from castlora.distillation.training import collate_lessons, lessons
from castlora.errors import UserError
from castlora.execution.launcher import process_count
from castlora.execution.processes import from_all, from_main, leave, share_of_batch, share_of_mean, this_process
from castlora.maps.fitting import SiteMoments, solve_in_parts
from castlora.models.loading import load_sharded
from castlora.models.modules import linear_slots
from castlora.models.pairing import pair_modules

BATCH = 8


def parts(source: Path, target: Path) -> dict[str, Tensor]:
    """The statistics that all processes have together, and the loss and the gradients of one batch."""
    torch.set_num_threads(1)
    return {**statistics(source, target), **gradients(source, target)}


def statistics(source: Path, target: Path) -> dict[str, Tensor]:
    """Sums over 40 passages, which are three batches: one of four processes has none."""
    models = [tiny.load(source), tiny.load(target)]
    slots = [linear_slots(model, model.config) for model in models]
    factors = {slot.name: LowRank(torch.ones(2, slot.d_in), torch.ones(slot.d_out, 2)) for slot in slots[0].values()}

    def keep(moments: SiteMoments) -> dict[str, Tensor]:
        sites = {"input": moments.inputs, "output": moments.outputs}
        return {
            f"{kind} {site} {field}": tensor
            for kind, of_sites in sites.items()
            for site, of_site in of_sites.items()
            for field, tensor in vars(of_site).items()
        }

    passages = tiny.aligned(source.name, target.name, 40)
    return solve_in_parts(*models, pair_modules(*slots, factors), factors, passages, keep)


def gradients(source: Path, target: Path) -> dict[str, Tensor]:
    """Of a batch whose passages have unlike numbers of positions that count, with all parts of the objective.

    Two of its passages come with one that the target rehearses, so that of four processes two have none.
    """
    recipe = replace(PAPER, chunk_weight=1.0, rehearsal_weight=0.5)
    teacher = LiveTeacher(tiny.load(source), with_hidden=True)
    base = tiny.load(target)
    torch.manual_seed(0)
    adapted = attach_lora(base, tiny.LINEAR_MODULES[target.name], 4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    student = Student(adapted, base.config.hidden_size, teacher.model.config.hidden_size, with_head=True)
    families = [tiny.family(path.name) for path in (source, target)]
    tokenizers = [tiny.ByteTokenizer.from_tokenizer(tokenizer) for _, tokenizer in families]
    shared = SharedVocabulary.of(*tokenizers, *(config.vocab_size for config, _ in families))

    here = this_process()
    share = share_of_batch(BATCH)
    all_lessons = lessons(_uneven(source.name, target.name), [rehearsed([5, 6, 7, 8, 9]), rehearsed([9, 8, 7])])
    batch, own = collate_lessons(all_lessons[here.index * share : (here.index + 1) * share]).values()
    kept = (BareTarget(adapted).predict(own), own) if own else None
    model = DistributedDataParallel(student, find_unused_parameters=True) if here.count > 1 else student
    losses = model(teacher.predict(batch), batch, shared, recipe, share_of_mean, kept)
    loss = total_loss(losses, recipe)
    loss.backward()
    of_processes = from_all(loss.item())
    learned = {name: parameter.grad for name, parameter in student.trainable().items()}
    return {**learned, "loss": torch.tensor(sum(of_processes) / len(of_processes))}


def _uneven(source: str, target: str) -> list[AlignedPassage]:
    passages = tiny.aligned(source, target, BATCH)
    for number, passage in enumerate(passages):
        passage.weights[:] = [1.0] * len(passage.weights)
        if number < BATCH // 2:
            passage.weights[:-1] = [0.0] * (len(passage.weights) - 1)
    return passages


def errors_of_main() -> list[str]:
    """What each process hears of bad input that the main process alone has seen."""

    def fail() -> None:
        raise UserError(f"process {this_process().index} has seen it.")

    try:
        from_main(fail)
    except UserError as error:
        return from_all(str(error))
    return []


def write_parts(source: Path, target: Path, out: Path) -> None:
    """Writes what `parts` returns."""
    assert this_process().count == process_count() > 1
    found = parts(source, target)
    assert from_main(lambda: this_process().index) == 0
    assert errors_of_main() == ["process 0 has seen it."] * this_process().count
    if this_process().is_main:
        save_file(found, out)
    leave()


def read_in_parts(base: Path, out: Path) -> None:
    """Writes what a sharded model says to all processes, and to the main one alone, and which part each has of it."""
    torch.set_num_threads(1)
    here = this_process()
    model, _ = load_sharded(str(base), None, here.device)
    ids = torch.arange(5, 13)[None]

    def refuse() -> None:
        tiny.logits(model, ids)
        raise UserError("seen after a layer was read.")

    # What the processes read together is each one's own; that of the main one is written.
    said = {"all": tiny.logits(model, ids + here.index)}
    alone = from_main(lambda: [tiny.logits(model, ids), model.generate(input_ids=ids, max_new_tokens=3, min_length=11)])
    said |= {"main": alone[0], "generated": alone[1]}
    with pytest.raises(UserError, match="seen after"):
        from_main(refuse)
    said["again"] = from_main(lambda: tiny.logits(model, ids))
    parts_of_all = [weight.to_local().numel() for weight in model.parameters() if isinstance(weight, DTensor)]
    said["held"] = torch.tensor(from_all(sum(parts_of_all)))
    said["whole"] = torch.tensor(sum(weight.numel() for weight in model.parameters() if isinstance(weight, DTensor)))
    if here.is_main:
        save_file({name: tensor.contiguous() for name, tensor in said.items()}, out)
    leave()


def learn_in_parts(base: Path, out: Path) -> None:
    """Writes the gradients of a LoRA on a sharded model whose layers are computed again, and what is kept for them."""
    torch.set_num_threads(1)
    here = this_process()
    found = {}
    for name in ("kept", "recomputed"):
        model, _ = load_sharded(str(base), None, here.device)
        slots = linear_slots(model, model.config).values()
        torch.manual_seed(0)
        student = attach_lora(model, {slot.name for slot in slots}, 4).eval()
        if name == "recomputed":
            recompute(model)
        learned, kept = gradients_of(student)
        found |= {f"{name} {parameter}": gradient for parameter, gradient in learned.items()}
        found[f"{name} bytes"] = torch.tensor(kept)
    if here.is_main:
        save_file(found, out)
    leave()


if __name__ == "__main__":
    words = sys.argv[1:]
    if not this_process().is_main:
        words[words.index("--adapter") + 1] = "nowhere"
    main(words)
