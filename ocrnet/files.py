"""Files that are written whole or not at all, and never over something of the user's."""

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from . import InputError

SOFTWARE = "OCRNet"  # the mark of the images that this program writes


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path, renamed to ``path`` on success and removed on failure: ``path`` is never incomplete."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_output(path: Path) -> None:
    """Raise InputError if ``path`` exists, unless it is an image or the scores that this program wrote."""
    if path.is_file():  # not a pipe, from which reading would wait
        # PIL raises SyntaxError for bad PNGs
        with contextlib.suppress(OSError, SyntaxError), Image.open(path) as image:
            if image.info.get("Software") == SOFTWARE:
                return
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if {"mIoU", "IoU"} <= json.loads(path.read_text()).keys():
                return
    if path.exists():
        raise InputError(f"{path}: exists, and is not an output of this program: choose another folder or name")
