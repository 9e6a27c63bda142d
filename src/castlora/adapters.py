"""Adapters: reading a PEFT LoRA into factors, and writing the portable PEFT form."""

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from castlora.errors import UserError, first_line
from castlora.models import LIBRARY_ERRORS, LinearSlot, linear_slots, module_type, skeleton
from castlora.unpickling import PICKLED_FILE

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
PORTABLE_RANKS = (8, 16, 32, 64, 128)
"""Ranks that every serving engine accepts."""
_CARRIED_FIELDS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "init_lora_weights",
    "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "layers_to_transform", "layers_pattern",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
"""Fields of a LoRA configuration that do not keep it from being carried; any other may change what it computes."""
_REFUSED_FIELDS = ("modules_to_save", "bias", "trainable_token_indices", "target_parameters")
"""Fields that other kinds of adapters share with LoRA and that change more than the weights of linear maps."""
EFFECTIVE_RANK = 32
"""Rank to which the update of an adapter is cut that is no plain LoRA."""
_MOST_ENTRIES = 4000
"""Entries of a list or a table of a configuration."""
_ATTENTION_INPUTS = (("q",), ("k",), ("v",))
_HINT = "name the base it was trained on with --source"


@dataclass(frozen=True)
class LowRank:
    """The two factors of a low-rank update ΔW = B·A, the scale folded into B."""

    a: Tensor
    """Shape (r, d_in)."""
    b: Tensor
    """Shape (d_out, r)."""

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on disk whose configuration has been read and accepted."""

    name: str
    """What the user called it: a folder or a hub id."""
    folder: Path
    config: PeftConfig

    @property
    def is_plain(self) -> bool:
        """Whether its update is B·A·scale; that of any other adapter is found by merging it into its base model."""
        return self.kind == "LoRA"

    @property
    def kind(self) -> str:
        """What it is called: LoRA, DoRA, or PEFT's name of another kind."""
        if self.config.peft_type != PeftType.LORA:
            return str(PeftType(self.config.peft_type).value)
        assert isinstance(self.config, LoraConfig)
        return "DoRA" if self.config.use_dora else "LoRA"

    @property
    def base_model(self) -> str:
        """The base model that the adapter names in its configuration; may be empty."""
        return self.config.base_model_name_or_path or ""


def find_adapter(name_or_path: str, revision: str | None = None) -> Path:
    """The folder of an adapter, which has a configuration and weights in safetensors.

    Raises:
        UserError: it cannot be found, lacks a file, or is one of MLX-LM.
    """
    folder = _adapter_folder(name_or_path, revision)
    if not (folder / CONFIG_FILE).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
        if inside:
            names = ", ".join(map(repr, inside[:8]))
            raise UserError(f"{name_or_path!r} holds several adapters ({names}); name the folder of one of them.")
        raise UserError(f"Adapter {name_or_path!r} has no {CONFIG_FILE}; give the folder that PEFT saved.")
    if is_mlx_adapter(folder):
        raise UserError(
            f"Adapter {name_or_path!r} is one of MLX-LM; make a PEFT adapter of it first: castlora convert --adapter "
            "FOLDER --to peft --base MODEL --out NEW."
        )
    if not (folder / WEIGHTS_FILE).is_file():
        if (folder / PICKLED_FILE).exists():
            raise UserError(
                f"Adapter {name_or_path!r} has only a pickled {PICKLED_FILE}; make a safe copy of it first: castlora "
                "convert --adapter FOLDER --to safetensors --out NEW."
            )
        raise UserError(f"Adapter {name_or_path!r} has no {WEIGHTS_FILE}; give the folder that PEFT saved.")
    return folder


def open_adapter(name_or_path: str, revision: str | None = None) -> AdapterFiles:
    """Finds an adapter and reads its configuration, without touching its weights.

    Raises:
        UserError: it cannot be found, or uses a feature that cannot be carried.
    """
    folder = find_adapter(name_or_path, revision)
    config = _read_config(name_or_path, folder / CONFIG_FILE)
    _refuse_unsupported(name_or_path, config)
    return AdapterFiles(name_or_path, folder, config)


def read_factors(files: AdapterFiles, base_config: PreTrainedConfig) -> dict[str, LowRank]:
    """Reads the factors of every adapted module of the base model, in fp32.

    Ranks and scales are the ones PEFT itself resolves for this base model. The factors of an adapter that is no plain
    LoRA are zero and stand for the rank that its update is cut to: what it adds depends on the base model's weights.

    Args:
        files: the adapter
        base_config: configuration of its base model

    Returns:
        Module path inside the base model → factors, in the order of the model.

    Raises:
        UserError: the weights are damaged, hold NaN, or do not fit the base model.
    """
    tensors = _read_tensors(files)
    base = skeleton(base_config)
    slots = linear_slots(base, base_config)
    try:
        with torch.device("meta"):
            model = PeftModel(base, files.config)
    except LIBRARY_ERRORS as error:
        raise UserError(
            f"Adapter {files.name!r} does not fit its base model ({first_line(error)}); {_HINT}."
        ) from error
    layers = {n: layer for n, layer in model.get_base_model().named_modules() if isinstance(layer, BaseTunerLayer)}
    for name in layers:
        if name not in slots:
            raise UserError(
                f"Adapter {files.name!r} adapts {name!r}, which is not a linear map of a decoder layer that castlora "
                "knows; retrain without it or add its name to castlora.models.MODULE_ROLES."
            )
    _check_against_base(files, tensors, get_peft_model_state_dict(model, save_embedding_layers=False))
    if not files.is_plain:
        return {name: _zeros(slots[name], min(EFFECTIVE_RANK, slots[name].d_in, slots[name].d_out)) for name in layers}
    factors = {}
    for name, layer in layers.items():
        assert isinstance(layer, LoraLayer)
        a = tensors[f"{KEY_PREFIX}{name}.lora_A.weight"].float()
        b = tensors[f"{KEY_PREFIX}{name}.lora_B.weight"].float()
        factors[name] = LowRank(a, b * layer.scaling["default"])
    return factors


def portable_rank(rank: int) -> int:
    """The smallest rank that every engine accepts and that holds `rank`.

    Raises:
        UserError: there is none.
    """
    for accepted in PORTABLE_RANKS:
        if rank <= accepted:
            return accepted
    raise UserError(f"Rank {rank} is above {PORTABLE_RANKS[-1]}, the largest that serving engines accept.")


def write_portable(
    folder: Path,
    factors: Mapping[str, LowRank],
    slots: Mapping[str, LinearSlot],
    rank: int,
    base: str,
    revision: str | None,
) -> None:
    """Writes the adapter form that every serving engine loads.

    One rank everywhere (zero-padded), `lora_alpha == r`, plain suffixes as targets, every layer
    present (zeros where nothing is mapped), queries, keys and values together, fp32 safetensors.

    Args:
        folder: where `adapter_config.json` and `adapter_model.safetensors` go
        factors: module path → factors; missing modules of an adapted type become zeros
        slots: the linear modules of the base model
        rank: rank of every module, at least that of any factor
        base: hub id of the base model
        revision: its revision, if it is known
    """
    adapted_types = {module_type(name) for name in factors}
    if any(slots[name].roles in _ATTENTION_INPUTS for name in factors):
        adapted_types |= {module_type(name) for name, slot in slots.items() if slot.roles in _ATTENTION_INPUTS}
    tensors = {}
    written = [name for name in slots if module_type(name) in adapted_types]
    for name in written:
        padded = pad_rank(factors[name], rank) if name in factors else _zeros(slots[name], rank)
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = padded.a.float().contiguous()
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = padded.b.float().contiguous()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base,
        revision=revision,
        fan_in_fan_out=any(slots[name].is_conv1d for name in factors),
    )
    # PEFT keeps a set here, whose order on disk would change from run to run.
    config.target_modules = target_suffixes(written, slots)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def target_suffixes(adapted: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The shortest ends of module names that select the adapted types and no others, sorted.

    `q_proj` where that is enough; `attn.c_proj` where `mlp.c_proj` stays unadapted.
    """
    adapted_types = {module_type(name) for name in adapted}
    others = {module_type(name).split(".")[-1] for name in modules if module_type(name) not in adapted_types}
    return sorted({end if (end := name.split(".")[-1]) not in others else name for name in adapted_types})


def pad_rank(factors: LowRank, rank: int) -> LowRank:
    """The same update with zero rows in A and zero columns in B up to `rank`."""
    missing = rank - factors.rank
    a = torch.cat([factors.a, factors.a.new_zeros(missing, factors.a.shape[1])])
    b = torch.cat([factors.b, factors.b.new_zeros(factors.b.shape[0], missing)], dim=1)
    return LowRank(a, b)


def _zeros(slot: LinearSlot, rank: int) -> LowRank:
    return LowRank(torch.zeros(rank, slot.d_in), torch.zeros(slot.d_out, rank))


def _adapter_folder(name_or_path: str, revision: str | None) -> Path:
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.exists() or name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise UserError(f"Adapter {name_or_path!r} is not a folder; give the folder that PEFT saved, or a hub id.")
    try:
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"Adapter {name_or_path!r} is neither a folder here nor reachable on the hub.") from error


def _read_config(name: str, path: Path) -> PeftConfig:
    written = _read_fields(name, path)
    peft_type = written.get("peft_type")
    config: PeftConfig | None = None
    try:
        if peft_type in set(PeftType):
            config = PeftConfig.from_pretrained(str(path.parent))
    except LIBRARY_ERRORS as error:
        raise _not_a_configuration(name, error) from error
    if config is None or config.is_prompt_learning or peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise UserError(
            f"Adapter {name!r}: peft_type is {peft_type!r}; castlora carries adapters that change linear maps, as LORA."
        )
    return config


def _read_fields(name: str, path: Path) -> dict[str, Any]:
    try:
        written: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise _not_a_configuration(name, error) from error
    for field, value in written.items():
        # PEFT compares each entry with each module, and would be at it for hours.
        if isinstance(value, list | dict) and len(value) > _MOST_ENTRIES:
            raise UserError(
                f"Adapter {name!r}: {field} has {len(value)} entries, more than the {_MOST_ENTRIES} that are read; "
                "name modules by their last part, as q_proj."
            )
    return written


def _not_a_configuration(name: str, error: Exception) -> UserError:
    return UserError(f"{CONFIG_FILE} of {name!r} is not a PEFT configuration ({first_line(error)}); copy it again.")


def is_mlx_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of MLX-LM, by its configuration."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "lora_parameters" in config and "peft_type" not in config


def _refuse_unsupported(name: str, config: PeftConfig) -> None:
    for field, value in _unsupported_fields(config):
        raise UserError(
            f"Adapter {name!r}: {field}={reprlib.repr(value)} cannot be carried yet; "
            "retrain as a plain LoRA without it."
        )


def _unsupported_fields(config: PeftConfig) -> Iterable[tuple[str, object]]:
    if not isinstance(config, LoraConfig):
        values = ((field.name, getattr(config, field.name)) for field in fields(config))
        yield from ((name, value) for name, value in values if name in _REFUSED_FIELDS and value not in (None, "none"))
        return
    plain_starts = (True, False, "gaussian", "orthogonal", "eva")
    if config.init_lora_weights not in plain_starts:
        yield "init_lora_weights", config.init_lora_weights
    plain = LoraConfig()
    for field in fields(LoraConfig):
        value = getattr(config, field.name)
        if field.name not in _CARRIED_FIELDS and value and value != getattr(plain, field.name):
            yield field.name, value


def _read_tensors(files: AdapterFiles) -> dict[str, Tensor]:
    path = files.folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{WEIGHTS_FILE} of {files.name!r} is damaged or cut short ({first_line(error)}); copy it again."
        ) from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{WEIGHTS_FILE} of {files.name!r} holds NaN or infinity in {key!r}; use an intact adapter."
            )
    return tensors


def _check_against_base(files: AdapterFiles, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected))
    if missing or surplus:
        lacks = f"lacks {missing[0]!r}" if missing else f"holds {surplus[0]!r}, unknown there"
        raise UserError(f"Adapter {files.name!r} does not fit its base model: it {lacks}; {_HINT}.")
    for key, tensor in expected.items():
        if found[key].shape != tensor.shape:
            raise UserError(
                f"Adapter {files.name!r} does not fit its base model: {key!r} has shape {tuple(found[key].shape)}, "
                f"the base needs {tuple(tensor.shape)}; {_HINT}."
            )
