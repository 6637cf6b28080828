"""Reading images and labels.

Notation: H W an image's size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import InputError

ORIENTATION_TAGS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # of Image.info


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn what PIL raises into an InputError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: expected an image, found another or a damaged file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # damaged bytes raise many types; PIL also refuses gigantic images
        raise InputError(f"{path}: expected an image, found another or a damaged file ({error})") from None


def decode(path: Path, rows: int | None = None) -> Image.Image:
    """Decode an image file in its own mode.

    Args:
        rows: decode only the first rows of a PNG; the rows below may be black. PNG decoding takes most of the time
            per crop.

    Raises:
        InputError: the file is not an image, or is truncated.
    """
    with named_errors(path):
        image = Image.open(path)
        if rows and image.format == "PNG" and not image.info.keys() & {"interlace", *ORIENTATION_TAGS}:
            codec, (left, top, right, bottom), *rest = image.tile[0]
            image.tile = [(codec, (left, top, right, min(rows, bottom)), *rest)]
        image.load()
    return image


def read_header(path: Path) -> tuple[str, tuple[int, int]]:
    """PIL's mode and the size (W, H) of an image, upright as ``read_image`` returns it, without decoding it.

    Raises:
        InputError: the file is not an image.
    """
    with named_errors(path), Image.open(path) as image:
        tagged = image.info.keys() & ORIENTATION_TAGS  # else getexif would decode a PNG
        turned = tagged and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return image.mode, image.size[::-1] if turned else image.size


def read_image(path: Path, rows: int | None = None) -> Image.Image:
    """Read an image as 8-bit RGB, rotated as its EXIF orientation says. See ``decode``."""
    return to_rgb(decode(path, rows))


def read_frames(path: Path) -> Iterator[Image.Image]:
    """The frames of an animated GIF, PNG or WebP, or the image of another file. As ``read_image``."""
    image = decode(path)
    for i in range(count_frames(path)):
        try:
            image.seek(i)
            frame = to_rgb(image)
        except Exception as error:  # damaged bytes raise many types
            raise InputError(f"{path}: frame {i} cannot be read ({error})") from None
        yield frame


def count_frames(path: Path) -> int:
    """1 also for a camera's JPEG of several images (MPO), and for a file that cannot be read."""
    try:
        with Image.open(path) as image:
            return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception:  # damaged bytes raise many types; ``decode`` says what is wrong
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright. Gray, palette, 16-bit and transparent images are converted."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits per channel, which PIL would clip instead of scale
        image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def read_label(path: Path) -> Image.Image:
    """Read a label: one channel of 8 bits. The indices of a palette image and the bits of a 1-bit image are the values.

    Raises:
        InputError: the file has several channels or more bits; and as ``decode``.
    """
    image = decode(path)
    if image.mode not in ("L", "P", "1"):
        raise InputError(f"{path}: expected a label with one 8-bit channel, found mode {image.mode}")
    return image if image.mode == "L" else Image.fromarray(np.asarray(image).astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W), a label as uint8 (H, W)."""
    x = torch.from_numpy(np.array(image))
    return x.permute(2, 0, 1) if x.ndim == 3 else x
