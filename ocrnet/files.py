"""Files that are written whole or not at all, and never over something of the user's."""

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from . import InputError

SOFTWARE = "OCRNet"  # the mark of the images that this program writes; their title says what they show
SCORES = {"images", "mIoU", "pixel_accuracy", "IoU", "pixels"}  # the keys of evaluate.py --json


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Raise a failed write, as on a full disk, as an InputError that names ``path``."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: cannot be written ({reason}): free space, or choose another folder") from None


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path, renamed to ``path`` on success and removed on failure: ``path`` is never incomplete.

    Missing folders are made. Where ``path`` is a link, the file that it points to is replaced.

    Raises:
        InputError: the file cannot be written. The old one stays.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f"{target.name}.{SOFTWARE}.part")  # of a process that was killed: is written over
    with named_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())  # before the rename
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def check_output(path: Path, title: str) -> None:
    """Raise InputError if ``path`` exists, and is neither empty nor an earlier version of what is to be written.

    That is an image of this program with this ``title``, or its scores if that is "score file". Nor may an image be
    among those of a data set, which could not be read any more.
    """
    is_image = title != "score file"
    for folder in (*Path(os.path.realpath(path)).parents, *Path(os.path.abspath(path)).parents) if is_image else ():
        beside = folder.parent / "labels", folder.parent / "classes.json"
        if folder.name == "leftImg8bit" or (folder.name == "images" and any(x.exists() for x in beside)):
            raise InputError(f"{path}: is among the images of a data set, {folder}: choose another folder")
    if path.is_file():  # not a pipe, from which reading would wait
        with contextlib.suppress(Exception):  # bytes that are no image or JSON raise many types
            if not path.stat().st_size or (not is_image and json.loads(path.read_text()).keys() == SCORES):
                return
            with Image.open(path) as image:  # images of earlier versions have no title
                if is_image and image.info["Software"] == SOFTWARE and image.info.get("Title", title) == title:
                    return
    if path.exists():
        raise InputError(f"{path}: exists, and is no {title} of this program: choose another folder or name")
