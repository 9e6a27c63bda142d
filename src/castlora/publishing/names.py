"""Names and commands as they may be published: nothing of the machine, no access tokens."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from castlora.publishing.markdown import LONGEST_NAME, code

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LOCAL_PATH = re.compile(r"[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:")
_FOLDERS = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\](?:[^/\\\s'\"]+[/\\])+")
_ACCESS_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def is_hub_id(name: str) -> bool:
    """Whether the name is surely a Hub id: "owner/name", and nothing local goes by it."""
    return bool(_HUB_ID.fullmatch(name)) and not _exists(name)


def public_name(name: str) -> str:
    """Returns a name without what it tells about the user's machine: a local path loses its folders."""
    is_local = _LOCAL_PATH.match(name) or _exists(name) or name.count("/") > 1
    return _redact(re.split(r"[/\\]", name.rstrip("/\\"))[-1] if is_local else name)


def public_command(arguments: Sequence[str]) -> str:
    """Quotes a command line for a POSIX shell, without the folders of local paths and without access tokens."""
    return shlex.join(map(_public_argument, arguments))


def _public_argument(argument: str) -> str:
    option, equals, value = argument.partition("=")
    if argument.startswith("-") and equals:
        return f"{option}={_public_argument(value)}"
    return public_name(argument) if _LOCAL_PATH.match(argument) or _exists(argument) else _redact(argument)


def _redact(text: str) -> str:
    return _ACCESS_TOKEN.sub("hf_…", _FOLDERS.sub("", text))


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except OSError:  # longer than a path can be
        return False


def slug(name: str) -> str:
    """A name without any character that means something to YAML, a shell or Markdown."""
    last = public_name(name).split("/")[-1]
    return re.sub(r"[^\w.-]+", "-", last, flags=re.ASCII).strip("-")[:LONGEST_NAME] or "adapter"


def quoted_name(name: str) -> str:
    """Writes a name as `public_name` gives it, for Markdown."""
    return code(public_name(name))
