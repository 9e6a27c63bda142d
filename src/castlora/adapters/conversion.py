"""The same adapter in other forms: portable PEFT, MLX-LM, merged into its base model, GGUF, without a pickle."""

import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from castlora.adapters.base import as_trained
from castlora.adapters.effective import without_start
from castlora.adapters.factors import PORTABLE_RANKS, LowRank, portable_rank, read_factors, write_portable
from castlora.adapters.files import CONFIG_FILE, TOKENIZER_FILES, WEIGHTS_FILE, is_mlx_adapter, open_adapter
from castlora.adapters.live import load_adapter
from castlora.adapters.mlx import mlx_base, read_mlx, write_mlx
from castlora.adapters.unpickling import PICKLED_FILE, read_pickled
from castlora.adapters.vocabulary import tokenizer_of
from castlora.config import Form
from castlora.errors import UserError
from castlora.execution.run_directory import write_whole
from castlora.models.loading import load_config, load_model, reads_images, skeleton
from castlora.models.modules import LinearSlot, linear_slots

GGUF_SCRIPT = "convert_lora_to_gguf.py"
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

logger = logging.getLogger("castlora")


def convert(adapter: str, to: Form, out: str, base: str | None = None, llama_cpp: str | None = None) -> Path:
    """Writes an adapter in another form.

    Args:
        adapter: folder or hub id of a PEFT adapter, or folder of an MLX-LM adapter
        to: `peft`, the plain LoRA that serving engines load, from any other LoRA; `mlx`, an adapter for MLX-LM;
            `merged`, the base model with the adapter in its weights, in the base's own precision; `gguf`, a file for
            llama.cpp, made by its own converter; `safetensors`, the same adapter without its pickle, the only form for
            which one is opened, and only for tensors
        out: folder to write, new or empty; a new file for `gguf`
        base: the adapter's base model, if not the one that its configuration names
        llama_cpp: folder of llama.cpp's sources, for `gguf`

    Returns:
        what was written

    Raises:
        UserError: bad input; nothing has been written.
    """
    place = Path(out)
    if place.exists() and (to == "gguf" or not place.is_dir() or any(place.iterdir())):
        raise UserError(f"--out {out!r} exists; give a new one, nothing is ever overwritten.")
    if (to == "gguf") != (llama_cpp is not None):
        raise UserError("--llama-cpp names the folder of llama.cpp's sources for --to gguf; give both or neither.")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".castlora-", dir=place.parent) as scratch:
            part = Path(scratch) / place.name
            if to == "merged":
                _write_merged(adapter, base, part)
            elif to == "safetensors":
                _write_safetensors(adapter, part)
            elif llama_cpp is not None:
                _write_gguf(adapter, base, part, Path(llama_cpp))
            else:
                _write_adapter(adapter, base, part, to)
            part.replace(place)
    except OSError as error:
        raise UserError(f"--out {out!r} cannot be written ({error.strerror}); give another place.") from error
    logger.info("Wrote %s", out)
    return place


def _write_adapter(adapter: str, base: str | None, part: Path, to: Form) -> None:
    factors, slots, base_name = _plain_factors(adapter, base)
    if to == "mlx":
        write_mlx(part, factors, slots, base_name)
    else:
        rank = max(lora.rank for lora in factors.values())
        if rank > PORTABLE_RANKS[-1]:
            raise UserError(
                f"Adapter {adapter!r} has rank {rank}, above {PORTABLE_RANKS[-1]}, the largest that all serving "
                "engines accept; give --to merged, or --to mlx for MLX-LM."
            )
        write_portable(part, factors, slots, portable_rank(rank), base_name, None)
    _copy_tokenizer(adapter, part)


def _plain_factors(adapter: str, base: str | None) -> tuple[dict[str, LowRank], dict[str, LinearSlot], str]:
    """The factors of a LoRA, the linear modules of its base model, and the base model's name."""
    if is_mlx_adapter(Path(adapter)):
        name = _base_of(adapter, base, mlx_base(Path(adapter)))
        config = load_config(name)
        slots = linear_slots(skeleton(config), config)
        return read_mlx(Path(adapter), slots), slots, name
    files = open_adapter(adapter, with_start=True)
    if not (files.is_plain or files.has_start):
        raise UserError(
            f"Adapter {adapter!r} is of kind {files.kind}, which has no exact low-rank form; give --to merged."
        )
    name = _base_of(adapter, base, files.base_model)
    config = as_trained(files.folder, load_config(name))
    if files.has_start:
        factors = without_start(files, load_model(name, architectures=config.architectures)[0])
    else:
        factors = read_factors(files, config)
    return factors, linear_slots(skeleton(config), config), name


def _write_safetensors(adapter: str, part: Path) -> None:
    folder = Path(adapter)
    for name in (CONFIG_FILE, PICKLED_FILE):
        if not (folder / name).is_file():
            raise UserError(f"Adapter {adapter!r} has no {name}; --to safetensors is for folders that have one.")
    tensors = read_pickled(folder / PICKLED_FILE)
    part.mkdir()
    write_whole(part / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    shutil.copyfile(folder / CONFIG_FILE, part / CONFIG_FILE)
    _copy_tokenizer(adapter, part)


def _write_merged(adapter: str, base: str | None, part: Path) -> None:
    if is_mlx_adapter(Path(adapter)):
        raise UserError(f"Adapter {adapter!r} is one of MLX-LM; convert it with --to peft first.")
    files = open_adapter(adapter)
    name = _base_of(adapter, base, files.base_model)
    model, of_base = load_model(name, architectures=as_trained(files.folder, load_config(name)).architectures)
    adapted = load_adapter(model, adapter, name)
    tokenizer = tokenizer_of(files.folder, of_base, model.config)
    _untie_embeddings(model)
    # Merged in fp32: bf16 would round away what is small beside the weight.
    merged = adapted.merge_and_unload()
    merged.to(load_config(name).dtype or merged.dtype).save_pretrained(part)
    tokenizer.save_pretrained(part)
    _copy_tokenizer(adapter, part)
    if reads_images(model.config):
        _copy_processor(name, part)


def _untie_embeddings(model: PreTrainedModel) -> None:
    """Gives input and output embeddings that share a matrix one each, where an adapter changes either."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    inward, outward = map(_base_layer, ends)
    if inward.weight is outward.weight and (inward, outward) != ends:
        outward.weight = nn.Parameter(outward.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _base_layer(module: nn.Module | BaseTunerLayer) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _write_gguf(adapter: str, base: str | None, part: Path, llama_cpp: Path) -> None:
    script = llama_cpp / GGUF_SCRIPT
    if not script.is_file():
        raise UserError(f"--llama-cpp {str(llama_cpp)!r} has no {GGUF_SCRIPT}; give the folder of llama.cpp's sources.")
    files = open_adapter(adapter)
    # llama.cpp's converter names what it cannot hold by its line of code.
    *_, name = _plain_factors(adapter, base)
    base_option = "--base" if Path(name).is_dir() else "--base-model-id"
    command = [sys.executable, str(script), base_option, name, "--outfile", str(part), "--outtype", "f32"]
    done = subprocess.run([*command, str(files.folder)], capture_output=True, text=True)
    if done.returncode or not part.is_file():
        lines = done.stderr.strip().splitlines() or ["it wrote nothing"]
        raise UserError(
            f"{GGUF_SCRIPT} cannot convert {adapter!r}: {lines[-1][:300].rstrip('.')}; see its requirements."
        )


def _base_of(adapter: str, given: str | None, named: str) -> str:
    if not (given or named):
        raise UserError(f"Adapter {adapter!r} does not name its base model; give it with --base.")
    return given or named


def _copy_processor(base: str, part: Path) -> None:
    """Copies what says how images are prepared, without which engines do not load a model that reads them."""
    is_folder = Path(base).is_dir()
    folder = Path(base) if is_folder else Path(snapshot_download(base, allow_patterns=list(_PROCESSOR_FILES)))
    for name in _PROCESSOR_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, part / name)


def _copy_tokenizer(adapter: str, part: Path) -> None:
    for name in TOKENIZER_FILES:
        if (Path(adapter) / name).is_file() and not (part / name).exists():
            shutil.copyfile(Path(adapter) / name, part / name)
