"""Adapters on disk: finding them, and reading and accepting their configurations."""

import hashlib
import json
import reprlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from castlora.adapters.unpickling import PICKLED_FILE
from castlora.errors import UserError, first_line
from castlora.execution.run_directory import check_finished, fingerprint
from castlora.models.loading import LIBRARY_ERRORS
from castlora.text.chat import TEMPLATE_FILE

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TRANSLATION_FILE = "translation.json"
"""What was done to an adapter that went over a bridge."""
NEEDED_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES = (*NEEDED_TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", TEMPLATE_FILE)
"""Of the tokenizer that an adapter was trained with, where that lies in its folder."""
_READ_FILES = [CONFIG_FILE, WEIGHTS_FILE, TRANSLATION_FILE, *TOKENIZER_FILES, f"*/{CONFIG_FILE}"]
"""Of a repository on the hub; configurations in folders tell that it holds adapters there."""
_CARRIED_FIELDS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "init_lora_weights",
    "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "layers_to_transform", "layers_pattern",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
    "modules_to_save", "bias", "lora_bias", "trainable_token_indices", "target_parameters",
}  # fmt: skip
"""Fields of a LoRA configuration that do not keep it from being carried; any other may change what it computes."""
REPEATABLE_STARTS = {"pissa": "PiSSA", "olora": "OLoRA"}
"""Starts that move a part of the base model's weights into the factors, by a rule without chance or data."""
_MOST_ENTRIES = 4000
"""Entries of a list or a table of a configuration."""


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
        kind = REPEATABLE_STARTS.get(str(self.config.init_lora_weights), "LoRA")
        return "DoRA" if self.config.use_dora else kind

    @property
    def has_start(self) -> bool:
        """Whether it fits a base model that its start has changed, which is to be repeated."""
        return self.kind in REPEATABLE_STARTS.values()

    @property
    def weights_sha256(self) -> str:
        """Digest of its weights, by which it is known in whatever folder it lies."""
        with (self.folder / WEIGHTS_FILE).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def fingerprint(self) -> str:
        """Tells whether another adapter has come to lie in its folder."""
        files = (self.folder / name for name in (CONFIG_FILE, *TOKENIZER_FILES))
        return fingerprint(*files) + self.weights_sha256

    @property
    def base_model(self) -> str:
        """The base model that the adapter names in its configuration; may be empty."""
        return self.config.base_model_name_or_path or ""


def find_adapter(name_or_path: str, revision: str | None = None) -> Path:
    """The folder of an adapter, which has a configuration and weights in safetensors.

    Raises:
        UserError: it cannot be found, lacks a file, is one of MLX-LM, or its run is not finished.
    """
    folder = _adapter_folder(name_or_path, revision)
    check_finished(folder)
    if not (folder / CONFIG_FILE).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
        if inside:
            names = ", ".join(map(repr, inside[:8]))
            where = "name" if Path(name_or_path).is_dir() else "download it and name"
            raise UserError(f"{name_or_path!r} holds adapters in folders ({names}); {where} the folder of one of them.")
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
        if not Path(name_or_path).is_dir():
            # Pickled weights are not even downloaded.
            raise UserError(
                f"Adapter {name_or_path!r} has no {WEIGHTS_FILE}; if it has {PICKLED_FILE}, download it and make a "
                "safe copy: castlora convert --adapter FOLDER --to safetensors --out NEW."
            )
        raise UserError(f"Adapter {name_or_path!r} has no {WEIGHTS_FILE}; give the folder that PEFT saved.")
    return folder


def open_adapter(name_or_path: str, revision: str | None = None, with_start: bool = False) -> AdapterFiles:
    """Finds an adapter and reads its configuration, without touching its weights.

    Args:
        name_or_path: folder or hub id
        revision: of the hub id
        with_start: whether to take one that needs its start repeated

    Raises:
        UserError: it cannot be found, or uses a feature that cannot be carried.
    """
    folder = find_adapter(name_or_path, revision)
    config = _read_config(name_or_path, folder / CONFIG_FILE)
    _refuse_unsupported(name_or_path, config)
    files = AdapterFiles(name_or_path, folder, config)
    if files.has_start and not with_start:
        raise UserError(
            f"Adapter {name_or_path!r}: {files.kind} changed the base model before training; make a plain LoRA of it "
            "first: castlora convert --adapter FOLDER --to peft --base MODEL --out NEW."
        )
    return files


def _adapter_folder(name_or_path: str, revision: str | None) -> Path:
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.exists() or name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise UserError(f"Adapter {name_or_path!r} is not a folder; give the folder that PEFT saved, or a hub id.")
    try:
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=_READ_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"Adapter {name_or_path!r} is neither a folder here nor reachable on the hub.") from error


def _read_config(name: str, path: Path) -> PeftConfig:
    written = read_fields(name, path)
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


def read_fields(name: str, path: Path) -> dict[str, Any]:
    """The fields of an adapter's configuration, before PEFT reads them.

    Raises:
        UserError: the file is no JSON object, or a field of it holds what PEFT would not come to an end with.
    """
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
    if not isinstance(written.get("modules_to_save"), list | None):
        # PEFT would take a text for a list of letters.
        raise UserError(f"Adapter {name!r}: modules_to_save in {CONFIG_FILE} is no list of names; write it as one.")
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
    if not isinstance(config, LoraConfig):
        return
    start = config.init_lora_weights
    if start not in (True, False, "gaussian", "orthogonal", "eva", *REPEATABLE_STARTS) or (
        config.use_dora and start in REPEATABLE_STARTS
    ):
        raise UserError(
            f"Adapter {name!r}: init_lora_weights={start!r} changed the base model before training, so that these "
            "weights fit no published one; save it again from the training run with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it."
        )
    plain = LoraConfig()
    for field in fields(LoraConfig):
        value = getattr(config, field.name)
        if field.name not in _CARRIED_FIELDS and value and value != getattr(plain, field.name):
            raise UserError(
                f"Adapter {name!r}: {field.name}={reprlib.repr(value)} cannot be carried yet; "
                "retrain as a plain LoRA without it."
            )
