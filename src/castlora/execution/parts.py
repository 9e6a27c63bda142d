"""Parts of a long stage that outlive the process: what an interrupted run has computed is not computed again."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from castlora.execution.run_directory import write_whole

_DIGEST_CHARACTERS = 64


@dataclass(frozen=True)
class Parts:
    """A folder of parts, each a file that names what it was computed from."""

    folder: Path | None = None
    """None keeps nothing."""

    def json(self, name: str, inputs: Sequence[str], compute: Callable[[], Any]) -> Any:
        """What was kept under a name, or what is computed now.

        Args:
            name: of the part
            inputs: what it is computed from; what was kept for others is computed anew
            compute: gives a value that JSON takes
        """
        kept = self._read(name, inputs)
        if kept is not None:
            return json.loads(kept)
        value = compute()
        self._write(name, inputs, json.dumps(value).encode())
        return value

    def tensors(self, name: str, inputs: Sequence[str], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The same for tensors on the processor."""
        kept = self._read(name, inputs)
        if kept is not None:
            return load(kept)
        value = compute()
        self._write(name, inputs, save(value))
        return value

    def under(self, name: str) -> "Parts":
        """A folder of its own for the parts of another stage."""
        return Parts(self.folder and self.folder / name)

    def _read(self, name: str, inputs: Sequence[str]) -> bytes | None:
        if self.folder is None or not (self.folder / name).is_file():
            return None
        content = (self.folder / name).read_bytes()
        digest, kept = content[:_DIGEST_CHARACTERS], content[_DIGEST_CHARACTERS:]
        return kept if digest == _digest(inputs, kept) else None

    def _write(self, name: str, inputs: Sequence[str], content: bytes) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / name, _digest(inputs, content) + content)


NOTHING_KEPT = Parts()


def _digest(inputs: Sequence[str], content: bytes) -> bytes:
    """Tells a part that is damaged, or was computed from something else."""
    return hashlib.sha256(json.dumps(list(inputs)).encode() + content).hexdigest().encode()
