"""Ways to damage a file: its bytes, its JSON, its tensors, or what it is on disk."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

Mutation = Callable[[Path, random.Random], None]

HOSTILE_TEXTS = (
    "", " ", "../../../escaped", "/etc/passwd", "a\x00b", "\x1b[31mred", "<script>alert(1)</script>", "\u202egnp.exe",
    "\ud800", "🙂" * 50, "x" * 100_000, "(", "(a+)+$", ".*", r"(.*.*.*.*)*(.*.*)*[_a-z.0-9]*!", "{text}", "%s%n", "NaN",
    "lora_A.weight", "LORA",
)  # fmt: skip
HOSTILE_NUMBERS = (0, -1, 1, 2**31, 2**63, 10**400, -(10**9), 0.5, 1e308, float("nan"), float("inf"), True, False)


def hostile_value(chance: random.Random, depth: int = 0) -> Any:
    """A value that a field is unlikely to expect."""
    kind = chance.randrange(7 if depth < 3 else 3)
    if kind == 0:
        return None
    if kind == 1:
        return chance.choice(HOSTILE_TEXTS)
    if kind == 2:
        return chance.choice(HOSTILE_NUMBERS)
    if kind == 3:
        return [hostile_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    if kind == 4:
        return {chance.choice(HOSTILE_TEXTS): hostile_value(chance, depth + 1) for _ in range(chance.randrange(4))}
    if kind == 5:
        return [f"model.layers.{number}.self_attn.q_proj" for number in range(chance.choice((0, 7, 20_000)))]
    return {chance.choice(("q_proj", "^q", "layers.0", "(")): hostile_value(chance, depth + 1)}


def change_bytes(path: Path, chance: random.Random) -> None:
    """Flips, cuts, doubles or inserts bytes."""
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content) + 1)
    kind = chance.randrange(6)
    if kind == 0:
        del content[at:]
    elif kind == 1:
        content[at:at] = chance.randbytes(chance.choice((1, 8, 400)))
    elif kind == 2:
        content = content * 2
    elif kind == 3:
        content = bytearray(chance.randbytes(chance.choice((0, 1, 8, 4000))))
    else:
        # The beginning is where formats keep their sizes.
        near = min(len(content), chance.choice((8, 200, len(content))))
        for _ in range(chance.choice((1, 4, 40)) if near else 0):
            content[chance.randrange(near)] = chance.randrange(256)
    path.write_bytes(bytes(content))


def change_lines(path: Path, chance: random.Random) -> None:
    """Changes one line of text: a hostile one in its place, twice the same, or none."""
    lines = path.read_bytes().split(b"\n")
    at = chance.randrange(len(lines))
    text = chance.choice(HOSTILE_TEXTS).encode("utf-8", "surrogatepass")
    lines[at : at + 1] = chance.choice(([], [lines[at]] * 2, [text], [lines[at] + text], [b"\xff\xfe" + lines[at]]))
    path.write_bytes(b"\n".join(lines))


def change_json(path: Path, chance: random.Random) -> None:
    """Changes, adds, renames or drops a field of a JSON object or of one line of JSON; other files keep their text."""
    raw = path.read_bytes().decode("utf-8", "replace")
    lines = raw.split("\n") if path.suffix == ".jsonl" else [raw]
    at = chance.randrange(len(lines))
    try:
        value = json.loads(lines[at])
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict) and value:
        _change_field(value, chance)
    else:
        value = hostile_value(chance)
    lines[at] = json.dumps(value, ensure_ascii=chance.random() < 0.5)
    if chance.random() < 0.05:
        lines[at] = "[" * 200_000
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


def _change_field(fields: dict[str, Any], chance: random.Random) -> None:
    name = chance.choice(list(fields))
    kind = chance.randrange(4)
    inner = fields[name]
    if kind == 0:
        del fields[name]
    elif kind == 1:
        fields[chance.choice(HOSTILE_TEXTS)] = fields.pop(name)
    elif kind == 2 and isinstance(inner, dict) and inner:
        _change_field(inner, chance)
    else:
        fields[name] = hostile_value(chance)


def change_tensors(path: Path, chance: random.Random) -> None:
    """Renames, drops, reshapes, recasts or spoils one tensor of a safetensors file; a damaged one stays as it is."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError):
        return
    if not tensors:
        return
    name = chance.choice(sorted(tensors))
    tensor = torch.atleast_1d(tensors.pop(name))
    kind = chance.randrange(7)
    if kind == 0:
        names = (f"{name}/../../x", name.upper(), f"{name}.x", "x" * 10_000, "base_model.model.x")
        tensors[chance.choice(names)] = tensor
    elif kind == 1:
        tensors[name] = tensor.reshape(-1)[: chance.choice((0, 1, 7))].clone()
    elif kind == 2:
        tensors[name] = torch.cat([tensor, tensor])
    elif kind == 3:
        spoilt = tensor.float().clone()
        spoilt.view(-1)[-1:] = chance.choice((float("nan"), float("inf"), 3e38))
        tensors[name] = spoilt
    elif kind == 4:
        tensors[name] = tensor.to(chance.choice((torch.int8, torch.int64, torch.bool, torch.float64, torch.float16)))
    elif kind == 5:
        tensors[name] = tensor[:0].clone()
    save_file(tensors, path, metadata={"format": "pt"})


def change_header(path: Path, chance: random.Random) -> None:
    """Rewrites the header of a safetensors file: absurd sizes, offsets, shapes, or the same key twice."""
    content = path.read_bytes()
    if len(content) < 8:
        return
    size = struct.unpack("<Q", content[:8])[0]
    body, header = content[8 + size :], content[8 : 8 + size]
    if chance.random() < 0.3:
        length = chance.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1, size + 1, max(size, 1) - 1))
        path.write_bytes(struct.pack("<Q", length) + header + body)
        return
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):
        return
    names = [name for name in entries if isinstance(entries[name], dict) and "shape" in entries[name]]
    if not names:
        return
    name = chance.choice(names)
    entry = entries[name]
    entry[chance.choice(("shape", "data_offsets", "dtype"))] = chance.choice(
        ([2**40, 2**40], [-1, 8], [0, 0], [10**30], "F99", None, [[]], [len(body), 2 * len(body)], 7)
    )
    text = json.dumps(entries)
    if chance.random() < 0.2:
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + body)


def change_kind(path: Path, chance: random.Random) -> None:
    """Makes the file something else: nothing, a folder, or a link to nowhere, to itself or to its folder."""
    path.unlink()
    kind = chance.randrange(5)
    if kind == 1:
        path.mkdir()
    elif kind >= 2:
        path.symlink_to(("nowhere", path.name, ".")[kind - 2])


JSON_MUTATIONS: tuple[Mutation, ...] = (change_json, change_json, change_json, change_bytes, change_lines, change_kind)
TENSOR_MUTATIONS: tuple[Mutation, ...] = (change_tensors, change_tensors, change_header, change_bytes, change_kind)
TEXT_MUTATIONS: tuple[Mutation, ...] = (change_lines, change_lines, change_bytes, change_json, change_kind)
