"""The error that a user can mend."""


class UserError(ValueError):
    """Bad input; the message is one sentence that names the field or file and the fix.

    The command line prints the message and exits with code 2.
    """
