"""The first part of a transfer alone, which needs no target: prompts with the answers of source + LoRA, in a file."""

import logging
from dataclasses import asdict
from pathlib import Path

from transformers import set_seed

from castlora import __version__
from castlora.adapters.files import open_adapter
from castlora.config import Bits, TextTuning, check_seed, resolve_recipe
from castlora.errors import UserError
from castlora.execution.launcher import process_count
from castlora.execution.parts import Parts
from castlora.execution.processes import from_main
from castlora.execution.run_directory import check_output_file, hold_to_inputs, open_file_run
from castlora.model_pair import Loading, load_teacher
from castlora.plan import plan_transfer
from castlora.teaching.curriculum import TextSource, prompt_formats, teach_text
from castlora.teaching.taught import write_taught

logger = logging.getLogger("castlora")


def teach(
    adapter: str,
    out: str,
    source: str | None = None,
    text: str | None = None,
    prompt_format: str | None = None,
    prompts: str | None = None,
    chat: bool = False,
    seed: int = 0,
    tuning: TextTuning | None = None,
    source_bits: Bits | None = None,
    sharded: bool = False,
) -> Path:
    """Writes prompts with the answers of source + LoRA, for transfers to any number of targets.

    The first part of a transfer, which needs no target: text is drawn, put into prompt formats, chosen and answered.
    Called again with the same arguments after an interruption, it continues where it was.

    Args:
        adapter: folder or hub id of a PEFT LoRA
        out: JSON lines file to write: `prompt`, or the `messages` of a chat, and `answer`
        source: base model of the adapter, if not the one that its configuration names
        text: general text, a .txt or .jsonl file (may be gzipped) or a hub data set; by default allenai/c4
        prompt_format: the adapter's prompt format with a `{text}` slot, filled from the general text
        prompts: file of unlabelled prompts of the task, instead of general text
        chat: whether prompts are messages of a user, which each model reads in its own chat template
        seed: of the draw and of the answers
        tuning: how much text, and how long
        source_bits: 4 (NF4) or 8, for a source whose layers are quantized by bitsandbytes, as one that QLoRA trained on
        sharded: whether each of several processes keeps only its part of the source's layers (FSDP2); all of them call
            this, and the main one asks and writes

    Returns:
        the file

    Raises:
        UserError: bad input; nothing has been written.
    """
    check_seed(seed)
    recipe = resolve_recipe("default", None, None, None, tuning or TextTuning())
    if not recipe.write_answers:
        raise UserError("write_answers is false, so that there is nothing to teach; leave it out.")
    request = {
        "adapter": adapter, "source": source, "text": text, "prompt_format": prompt_format, "prompts": prompts,
        "chat": chat, "seed": seed, "resolved_recipe": asdict(recipe), "castlora_version": __version__,
        "source_bits": source_bits,
    }  # fmt: skip
    check_output_file(out, request)
    text_source = TextSource(text, prompt_format, prompts, chat)
    text_source.check()
    set_seed(seed)
    base = source or open_adapter(adapter).base_model
    plan = plan_transfer(adapter, base, source)
    loading = Loading(source_bits=source_bits, sharded=sharded)
    if sharded:
        loading.check(plan.adapter.is_plain, process_count())
    models = load_teacher(plan, loading)

    def ask() -> int:
        with open_file_run(out, request) as state:
            hold_to_inputs(state, {"--adapter": plan.adapter.fingerprint(), **text_source.fingerprints()})
            parts = Parts(state / "parts")
            formats = prompt_formats(models, text_source, recipe, seed, parts)
            passages = teach_text(models, text_source, formats, recipe, seed, parts)
            write_taught(state / Path(out).name, passages, plan.adapter.weights_sha256)
        return len(passages)

    # Of a source that it holds in full, the main process may be asking alone while the others wait.
    logger.info("Wrote %d answered prompts to %s", from_main(ask) if sharded else ask(), out)
    return Path(out)
