"""Packed copies: uncompressed pixels (``.npy``) beside an image or label, memory-mapped instead of decoded.

Notation: H W an image's size.
"""

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InputError
from ..files import atomic_write, parallel_map
from .images import read_image, read_label


def packed_path(path: Path) -> Path:
    """NAME.npy for NAME.png, and NAME.jpg.npy for NAME.jpg."""
    return path.with_suffix(".npy") if path.suffix == ".png" else path.with_name(path.name + ".npy")


def is_packed(path: Path) -> bool:
    """Whether a packed copy exists that is not older than the file itself."""
    packed = packed_path(path)
    return packed.exists() and packed.stat().st_mtime >= path.stat().st_mtime


def read_pixels(path: Path, read: Callable[[Path], Image.Image]) -> np.ndarray | Image.Image:
    """The packed copy of an image or label, uint8 (H, W, 3) or (H, W), memory-mapped; without one ``read(path)``.

    Raises:
        InputError: the packed copy is damaged; and as ``read``.
    """
    if not is_packed(path):
        return read(path)
    try:
        return np.load(packed_path(path), mmap_mode="r")
    except Exception as error:
        raise InputError(f"{packed_path(path)}: expected a packed image ({error}): delete it, or pack again") from None


def pack(sample: tuple[Path, Path]) -> None:
    """Write the packed copies of an image and its label."""
    for path, read in zip(sample, (read_image, read_label)):
        if not is_packed(path):
            with atomic_write(packed_path(path)) as part, open(part, "wb") as file:
                np.save(file, np.asarray(read(path)))


def pack_samples(samples: Sequence[tuple[Path, Path]], workers: int | None = None) -> None:
    """Pack the samples that are not packed yet, in ``workers`` processes (None: one per core).

    Raises:
        InputError: the disk has too little space.
    """
    missing = [sample for sample in samples if not all(map(is_packed, sample))]
    if missing:
        with Image.open(missing[0][0]) as image:
            needed = 4 * image.width * image.height * len(missing)  # 3 bytes of RGB, 1 of the label
        folder = missing[0][0].parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"--pack: needs {needed:,} bytes in {folder}, found {free:,} free: make room, or leave out"
            )
    parallel_map(ProcessPoolExecutor(workers), pack, missing, "packing")
