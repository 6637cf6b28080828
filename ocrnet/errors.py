"""The user-facing error."""


class InputError(ValueError):
    """Invalid input. The message names the file or flag, what was expected and what was found."""
