"""Which serving engines load an adapter as it is: a check that follows the rules of their loaders.

No engine is run. Where each rule comes from stands beside it; engines change, so a rule names the file to look at.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from castlora.adapters.factors import PORTABLE_RANKS
from castlora.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from castlora.errors import UserError, first_line
from castlora.execution.run_directory import check_finished
from castlora.models.modules import layer_index, module_type

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_FLOATS = {"F32", "F16", "BF16"}
_NAME_RULE = "base by name"
_LONGEST_NAME = 200
"""Characters; a hub id has at most 96."""
_ATTENTION = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Finding:
    """A rule that an adapter does not keep."""

    rule: str
    """Name of the rule, one of `RULES`."""
    problem: str
    """What is wrong, as a sentence."""


@dataclass(frozen=True)
class Rule:
    """What loaders ask of an adapter."""

    engines: str
    """Who asks for it."""
    origin: str
    """Where the loaders do: file and function, or page."""
    check: Callable[["_Contents"], Iterator[str]]
    """Yields the ways in which an adapter breaks the rule."""


@dataclass(frozen=True)
class _Contents:
    """An adapter as it lies on disk, without its numbers."""

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    def factors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Module, side and shape of every two-dimensional factor of a LoRA."""
        for key, shape in self.shapes.items():
            match = _FACTOR.fullmatch(key)
            if match and len(shape) == 2:
                yield match["module"], match["side"], shape

    def modules(self) -> list[str]:
        """Adapted modules, in order."""
        return sorted({module for module, _, _ in self.factors()})


def check_portable(folder: str | Path) -> list[Finding]:
    """Checks an adapter against the rules of the engines' loaders.

    Args:
        folder: a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`

    Returns:
        the rules that it breaks; none for an adapter that loads everywhere

    Raises:
        UserError: a file is missing or cannot be read.

    Example:
        An adapter as PEFT wrote it, of the demo:

        >>> from castlora.demonstration.bundle import SKILL, SOURCE, demo_adapters_path
        >>> [finding.rule for finding in check_portable(demo_adapters_path() / SOURCE / SKILL)]
        ['plain scale', 'plain targets']
    """
    contents = _read(Path(folder))
    return [Finding(name, problem) for name, rule in RULES.items() for problem in rule.check(contents)]


def describe(findings: list[Finding]) -> str:
    """The findings as lines for the terminal."""
    if not findings:
        return f"Portable: keeps all {len(RULES)} rules of PEFT, vLLM, SGLang, llama.cpp, LoRAX and TGI."
    lines = [f"Not portable: breaks {len({finding.rule for finding in findings})} of {len(RULES)} rules."]
    for finding in findings:
        rule = RULES[finding.rule]
        lines += [f"- {finding.rule}: {finding.problem}", f"  asked for by {rule.engines} ({rule.origin})"]
    if any(finding.rule != _NAME_RULE for finding in findings):
        lines.append("castlora convert --to peft writes a LoRA in the plain form that engines load.")
    return "\n".join(lines)


def _read(folder: Path) -> _Contents:
    check_finished(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{str(folder)!r} has no {name}; name the folder of a PEFT adapter in safetensors.")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # not a dict
            shapes = {key: tuple(one.get_shape()) for key, one in slices.items()}
            dtypes = {key: str(one.get_dtype()) for key, one in slices.items()}
    except (ValueError, RecursionError, OSError, SafetensorError) as error:
        raise UserError(
            f"The files of {str(folder)!r} cannot be read ({first_line(error)}); copy them again."
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{CONFIG_FILE} in {str(folder)!r} holds no object; copy it again.")
    return _Contents(folder, config, shapes, dtypes)


def _only_factors(adapter: _Contents) -> Iterator[str]:
    strange = sorted(key for key in adapter.shapes if not _FACTOR.fullmatch(key))
    if strange:
        yield f"{len(strange)} tensors are no lora_A.weight or lora_B.weight of a module, such as {strange[0]!r}."
    if not adapter.shapes:
        yield "The file holds no tensor."


def _plain_tensors(adapter: _Contents) -> Iterator[str]:
    for key, shape in sorted(adapter.shapes.items()):
        if len(shape) != 2 or not all(shape):
            yield f"{key!r} has shape {shape}; a factor has two sides above 0."
        if adapter.dtypes[key] not in _FLOATS:
            yield f"{key!r} is stored as {adapter.dtypes[key]}; bf16, fp16 and fp32 are read."


def _one_rank(adapter: _Contents) -> Iterator[str]:
    declared = adapter.config.get("r")
    by_rank: dict[int, list[str]] = defaultdict(list)
    for module, side, shape in adapter.factors():
        by_rank[shape[0] if side == "A" else shape[1]].append(module)
    for rank, modules in sorted(by_rank.items()):
        if rank != declared:
            yield f"r is {declared}, but {modules[0]!r} has rank {rank}."
    for field in ("rank_pattern", "alpha_pattern"):
        if adapter.config.get(field):
            yield f"{field} is {adapter.config[field]!r}; the scale is computed from r and lora_alpha alone."


def _accepted_rank(adapter: _Contents) -> Iterator[str]:
    if adapter.config.get("r") not in PORTABLE_RANKS:
        yield f"r is {adapter.config.get('r')}, none of {', '.join(map(str, PORTABLE_RANKS))}."


def _rank_within_module(adapter: _Contents) -> Iterator[str]:
    for module, side, shape in adapter.factors():
        rank, width = shape if side == "A" else shape[::-1]
        if rank > width:
            yield f"lora_{side} of {module!r} has rank {rank} and only {width} {'in' if side == 'A' else 'out'}puts."


def _both_factors(adapter: _Contents) -> Iterator[str]:
    sides: dict[str, set[str]] = defaultdict(set)
    for module, side, _ in adapter.factors():
        sides[module].add(side)
    for module, found in sorted(sides.items()):
        if found != {"A", "B"}:
            yield f"{module!r} has lora_{found.pop()} alone."


def _plain_scale(adapter: _Contents) -> Iterator[str]:
    alpha = adapter.config.get("lora_alpha")
    if not isinstance(alpha, int) or isinstance(alpha, bool):
        yield f"lora_alpha is {alpha!r}; Ollama reads a whole number."
    elif alpha != adapter.config.get("r"):
        yield f"lora_alpha is {alpha} and r {adapter.config.get('r')}; engines that pad the rank rescale by it."
    if adapter.config.get("use_rslora"):
        yield "use_rslora is true; llama.cpp scales by lora_alpha / r all the same."


def _no_extras(adapter: _Contents) -> Iterator[str]:
    if adapter.config.get("peft_type") != "LORA":
        yield f"peft_type is {adapter.config.get('peft_type')!r}; engines load LORA."
    if adapter.config.get("bias", "none") != "none":
        yield f"bias is {adapter.config['bias']!r}; write it without."
    for field in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication",
                  "target_parameters"):  # fmt: skip
        if adapter.config.get(field):
            yield f"{field} is {adapter.config[field]!r}; write it without."


def _plain_targets(adapter: _Contents) -> Iterator[str]:
    targets = adapter.config.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        yield f"target_modules is {targets!r}; write a list of module names."
        return
    if targets != sorted(targets):
        yield "target_modules is not sorted, so that the same adapter has other bytes each time it is saved."
    for target in targets:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?", target):
            yield f"target_modules names {target!r}; write the end of a module name, such as 'q_proj'."
        elif not any(module == target or module.endswith(f".{target}") for module in adapter.modules()):
            yield f"target_modules names {target!r}, of which there is no tensor."


def _every_layer(adapter: _Contents) -> Iterator[str]:
    layers: dict[str, set[int]] = defaultdict(set)
    for module in adapter.modules():
        layer = layer_index(f"{module}.")
        if layer is not None:
            layers[module_type(module)].add(layer)
    depth = 1 + max((max(found) for found in layers.values()), default=-1)
    for kind, found in sorted(layers.items()):
        absent = sorted(set(range(depth)) - found)
        if absent:
            yield f"{kind!r} is missing in layer {absent[0]} ({len(absent)} of {depth}); fill it with zeros."


def _attention_together(adapter: _Contents) -> Iterator[str]:
    ends = {module.split(".")[-1] for module in adapter.modules()}
    present = [name for name in _ATTENTION if name in ends]
    if present and len(present) < len(_ATTENTION):
        absent = [name for name in _ATTENTION if name not in ends]
        yield f"{' and '.join(present)} without {' and '.join(absent)}; older versions read the three as one matrix."


def _base_by_name(adapter: _Contents) -> Iterator[str]:
    base = adapter.config.get("base_model_name_or_path")
    if not base:
        yield "base_model_name_or_path is empty; llama.cpp's converter finds the base model by it."
    elif not isinstance(base, str) or len(base) > _LONGEST_NAME:
        yield "base_model_name_or_path is no name; write the hub id of the base model."
    elif base.startswith(("/", ".", "~")) or Path(base).is_dir():
        yield "base_model_name_or_path is a folder of one machine; write the hub id of the base model."


def _no_tokenizer(adapter: _Contents) -> Iterator[str]:
    for name in ("added_tokens.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        if (adapter.folder / name).exists():
            yield f"{name} lies beside the adapter and is taken for a changed vocabulary; remove it."


def _finite_scale(adapter: _Contents) -> Iterator[str]:
    rank: Any = adapter.config.get("r")
    alpha: Any = adapter.config.get("lora_alpha")
    try:
        is_finite = math.isfinite(alpha / rank)
    except (TypeError, ZeroDivisionError, OverflowError):
        is_finite = False
    if not is_finite:
        yield f"lora_alpha / r is {alpha!r} / {rank!r}, which is no number."


RULES: dict[str, Rule] = {
    "only factors": Rule(
        "vLLM, llama.cpp, TGI", "vllm/lora/utils.py parse_fine_tuned_lora_name; convert_lora_to_gguf.py", _only_factors
    ),
    "plain tensors": Rule("all", "safetensors header; convert_lora_to_gguf.py get_tensors", _plain_tensors),
    "both factors": Rule("all", "vllm/lora/lora_model.py from_lora_tensors", _both_factors),
    "one rank": Rule(
        "vLLM, llama.cpp, LoRAX, TGI", "vllm/lora/peft_helper.py; src/llama-adapter.h get_scale", _one_rank
    ),
    "accepted rank": Rule("vLLM, LoRAX", "vllm/config/lora.py max_lora_rank", _accepted_rank),
    "rank within module": Rule(
        "Ollama, llama.cpp", "convert_lora_to_gguf.py; ollama convert/convert.go", _rank_within_module
    ),
    "finite scale": Rule("all", "vllm/lora/peft_helper.py", _finite_scale),
    "plain scale": Rule(
        "llama.cpp, Ollama, LoRAX", "src/llama-adapter.h get_scale; lorax adapters/lora.py", _plain_scale
    ),
    "no extras": Rule("vLLM, SGLang, llama.cpp", "vllm/lora/peft_helper.py validate_legal", _no_extras),
    "plain targets": Rule("SGLang", "sglang/srt/lora/lora_config.py", _plain_targets),
    "every layer": Rule("LoRAX, TGI", "text_generation_server/adapters/lora.py", _every_layer),
    "attention together": Rule("older SGLang", "sglang/srt/lora/lora.py normalize_qkv_proj", _attention_together),
    _NAME_RULE: Rule("llama.cpp, hub", "convert_lora_to_gguf.py --base", _base_by_name),
    "no tokenizer": Rule("SGLang, older vLLM", "sglang/srt/lora/lora_config.py added_tokens.json", _no_tokenizer),
}
"""The rules by name."""
