"""The error that a user can mend."""

BAD_INPUT = 2
"""Exit code of a command that met one."""


class UserError(ValueError):
    """Bad input; the message is one sentence that names the field or file and the fix.

    The command line prints the message and exits with code 2. What no terminal can print in it, such as a name from a
    file, is written out.
    """

    def __init__(self, message: str) -> None:
        # A line end is none of a name's: whoever wrote it into a sentence is to see it.
        super().__init__("\n".join(map(_printable, message.split("\n"))))


class ResumableError(UserError):
    """What ends a run for now, such as a network that is down: all that was computed stays, for the same command."""


def _printable(text: str) -> str:
    """A terminal obeys or cannot encode what is not printable."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def first_line(error: Exception) -> str:
    """What a library's error says in short, to be quoted in a sentence of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:200].rstrip(".:")
