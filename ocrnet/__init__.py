"""OCRNet in plain PyTorch: models, data, and what training and evaluation need around them."""


class InputError(ValueError):
    """User-facing error, printed without a traceback. Names the file or flag, what was expected and what was found."""
