"""Regular expressions in the configurations of adapters, which anybody may have written."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

from peft import PeftConfig

from castlora.errors import UserError

_SECONDS = 5
_FIELDS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save")
_PLAIN = re.compile(r"[\w.-]*")
# PEFT's own form for the keys of tables; what ends in time within it does so in PEFT's other forms.
_MATCH = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        compiled = re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError):
        continue
    for name in names:
        compiled.match(name)
"""


def check_patterns(adapter: str, config: PeftConfig, modules: Iterable[str]) -> None:
    """Makes sure that PEFT will be able to match a configuration's regular expressions with a model's modules.

    Python's matcher can take longer than anyone lives, and nothing in its own process can stop it.

    Args:
        adapter: what the user called the adapter
        config: its configuration
        modules: names of the base model's modules

    Raises:
        UserError: the expressions take too long.
    """
    patterns = list(_patterns(config))
    if not patterns:
        return
    request = json.dumps([[pattern for _, pattern in patterns], list(modules)])
    try:
        subprocess.run([sys.executable, "-I", "-c", _MATCH], input=request, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        fields = " and ".join(dict.fromkeys(field for field, _ in patterns))
        raise UserError(
            f"Adapter {adapter!r}: the regular expressions in {fields} cannot be matched within {_SECONDS} seconds; "
            "name modules by their last part, as q_proj."
        ) from None


def _patterns(config: PeftConfig) -> Iterator[tuple[str, str]]:
    values = config.to_dict()
    for field in _FIELDS:
        value = values.get(field)
        entries = value if isinstance(value, list | set | tuple | dict) else [value]
        for pattern in entries:
            if isinstance(pattern, str) and not _PLAIN.fullmatch(pattern):
                yield field, pattern
