"""Finding and reading the files of a data set, the data sets of training and evaluation, and the order of training.

Cityscapes' layout (https://arxiv.org/abs/1604.01685), or a plain one, with folders of any depth below a split:

    ROOT/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png       image
    ROOT/gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png        label, or where there is none
    ROOT/gtFine/SPLIT/CITY/NAME_gtFine_labelTrainIds.png   label that is mapped already

    ROOT/images/SPLIT/NAME.jpg                             image (no folders train and val: a fifth is val)
    ROOT/labels/SPLIT/NAME.png                             label: ids or colors of classes.json
    ROOT/classes.json                                      the classes; optional in Cityscapes' layout

Labels are mapped to train ids as they are read, so nothing is written beside them.

Notation: H W an image's size, h w the crop's.
"""

import itertools
import os
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm.contrib.concurrent import thread_map

from .. import InputError
from .classes import IGNORE_INDEX, ClassTable
from .transforms import NO_CHANGE, crop_image, sample_crop, sample_photometric

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")  # in any case
PIXEL_BYTES = 4  # of an RGB image and its label in a batch
TRAIN_IDS = "_gtFine_labelTrainIds.png"


class Sample(NamedTuple):
    image: Path
    label: Path


# ---- finding files ---------------------------------------------------------------------------------------------------


def image_folder(root: Path) -> Path:
    """ROOT/images if there is one and no ROOT/leftImg8bit, which is the default."""
    plain, cityscapes = Path(root, "images"), Path(root, "leftImg8bit")
    return plain if plain.is_dir() and not cityscapes.is_dir() else cityscapes


def split_folder(root: Path, split: str) -> Path:
    """Where the images of a split are: ROOT/images itself if it has no folders of splits."""
    folder, names = image_folder(root), ("train", "val", "test", "training", "validation", "valid")
    whole = folder.name == "images" and not any((folder / name).is_dir() for name in names)
    return folder if whole else folder / split


def label_paths(image: Path, root: Path) -> list[Path]:
    """Where the label of an image may be. The first that exists counts."""
    folder = Path(*image.relative_to(root).parts[1:-1])  # SPLIT/CITY
    if image_folder(root).name == "images":
        return [root / "labels" / folder / f"{image.stem}.png"]
    name = image.name.removesuffix("_leftImg8bit.png")
    return [root / "gtFine" / folder / (name + ending) for ending in ("_gtFine_labelIds.png", TRAIN_IDS)]


def list_files(folder: Path) -> list[Path]:
    """The regular files below a folder, without hidden ones, sorted. Links are followed, each folder is listed once."""
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
        if real not in seen:
            files += [Path(parent, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(path for path in files if path.is_file())


def find_images(root: Path | str, split: str) -> list[Path]:
    """All images of a split, sorted.

    Raises:
        InputError: there are none, or two have the same label.
    """
    root, folder = Path(root), split_folder(root, split)
    endings = IMAGE_SUFFIXES if image_folder(root).name == "images" else ("_leftImg8bit.png",)
    images = [path for path in list_files(folder) if path.name.lower().endswith(tuple(map(str.lower, endings)))]
    if folder.name == "images":  # by the name, so that an image stays where it is when others are added
        if split not in ("train", "val"):
            raise InputError(f"--split {split}: expected train or val, as {folder} has no folders of splits")
        drawn = [path for path in images if (zlib.crc32(os.fsencode(path.stem)) % 5 == 0) == (split == "val")]
        if images and not drawn:
            raise InputError(f"{folder}: none of {len(images)} names is drawn for {split}: make folders train and val")
        images = drawn
    if not images:
        raise InputError(
            f"{folder}: expected images ({', '.join(endings)}), found none; ocrnet/data/datasets.py shows the layouts, "
            f"and train.py --demo needs no data"
        )
    first: dict[Path, Path] = {}
    for image in images:
        other = first.setdefault(label_paths(image, root)[0], image)
        if other != image:
            raise InputError(f"{image}: expected one image of this name, found {other} too")
    return images


def find_samples(root: Path | str, split: str) -> list[Sample]:
    """All images of a split with their labels, sorted.

    Raises:
        InputError: there are no images, a label is missing, or the plain layout has no classes.json.
    """
    root, samples = Path(root), []
    if image_folder(root).name == "images" and not (root / "classes.json").exists():
        raise InputError(f"{root / 'classes.json'}: expected the classes of this data set; see ocrnet/data/classes.py")
    for image in find_images(root, split):
        paths = label_paths(image, root)
        found = [path for path in paths if path.exists()]
        if not found:
            raise InputError(f"{image}: expected a label {' or '.join(map(str, paths))}, found none")
        samples.append(Sample(image, found[0]))
    return samples


# ---- reading files ---------------------------------------------------------------------------------------------------


def open_image(path: Path) -> Image.Image:
    """Decode an image file in its own mode, rotated as its EXIF orientation says.

    Raises:
        InputError: the file is not an image, or is truncated.
    """
    try:
        image = Image.open(path)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # damaged bytes raise many types; PIL also refuses gigantic images
        raise InputError(f"{path}: expected an image, found another or a damaged file ({error})") from None


def read_image(path: Path | str) -> Image.Image:
    """Read an image as 8-bit RGB. Gray, palette, 16-bit and transparent images are converted."""
    image = open_image(path)
    if image.mode == "F" or (image.mode == "I" and image.getextrema()[1] > 65535):
        raise InputError(f"{path}: expected 8 or 16 bits per channel, found mode {image.mode}")
    if image.mode.startswith("I"):  # 16 bits per channel, which PIL would clip instead of scale
        image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def read_label(path: Path | str, table: ClassTable) -> np.ndarray:
    """Read a label as train ids, uint8 (H, W).

    Its values are the ids of the table: 8 bits, the indices of a palette, or 0 and 1 of a 1-bit image. An RGB label has
    the colors of the table. A palette, or an RGB label whose channels are equal, may have either. In a file
    ``..._labelTrainIds.png`` the values are train ids already.

    Raises:
        InputError: a value or color is not in the table, or the file is a JPEG; and as ``open_image``.
    """
    image, palette = open_image(path), None
    if image.mode not in ("1", "L", "P", "RGB", "RGBA") or image.format == "JPEG":
        found = "a JPEG, which changes values" if image.format == "JPEG" else f"mode {image.mode}"
        raise InputError(f"{path}: expected a label of one 8-bit channel, or RGB, found {found}")
    label = np.array(image.convert("RGB") if image.mode == "RGBA" else image, np.uint8)
    grays = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    if label.ndim == 3 and (label == label[..., :1]).all():
        label, palette = label[..., 0], grays
    elif image.mode == "P":
        palette = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
        palette = None if np.array_equal(palette, grays[: len(palette)]) else palette
    try:
        if Path(path).name.endswith(TRAIN_IDS):
            table, palette = ClassTable([label._replace(id=label.train_id) for label in table.labels]), None
        return table.to_train_ids(label, palette)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_sample(sample: Sample, table: ClassTable) -> tuple[Image.Image, np.ndarray]:
    """The image, and its train ids, uint8 (H, W).

    Raises:
        InputError: their sizes differ; and as ``read_image`` and ``read_label``.
    """
    image, label = read_image(sample.image), read_label(sample.label, table)
    if label.shape != (image.height, image.width):
        found = f"{label.shape[1]}x{label.shape[0]}"
        raise InputError(f"{sample.label}: expected {image.width}x{image.height} as its image, found {found}")
    return image, label


def median_size(samples: Sequence[Sample], count: int = 100) -> list[int]:
    """[H, W], the medians of ``count`` images."""
    sizes = []
    for sample in samples[:: -(-len(samples) // count)]:
        with Image.open(sample.image) as image:  # reads the header only
            sizes.append(image.size[::-1])
    return np.median(sizes, axis=0).astype(int).tolist()


def count_pixels(label: np.ndarray, num_classes: int) -> np.ndarray:
    """Train ids (H, W) -> pixels of each class, the ignored ones last, int64 (K + 1,)."""
    counts = np.bincount(label.ravel(), minlength=256)
    return np.append(counts[:num_classes], counts[IGNORE_INDEX])


def count_classes(samples: Sequence[Sample], table: ClassTable, show: bool = True) -> list[int]:
    """The pixels of each class in all labels. ``show`` a progress bar."""
    counts = thread_map(
        lambda sample: count_pixels(read_label(sample.label, table), len(table)), samples,
        desc="counting", disable=None if show else True,
    )  # fmt: skip
    return sum(counts, start=np.zeros(len(table) + 1, np.int64))[:-1].tolist()


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---- data sets -------------------------------------------------------------------------------------------------------


@dataclass
class TrainDataset(Dataset):
    """Random crops. Item (epoch, index) is (image, label, photometric) of one sample:

    image uint8 (3, h, w), label uint8 (h, w), and the parameters of its photometric distortion, float32 (5,), which
    ``transforms.preprocess`` applies on the device. The item depends only on seed, epoch and index, not on the rank or
    the worker that reads it.

    Args:
        crop_size: (h, w).
        scale_range: range of the random resizing.
        color_jitter: sample a photometric distortion.
    """

    samples: Sequence[Sample]
    table: ClassTable
    crop_size: tuple[int, int]
    seed: int
    scale_range: tuple[float, float] = (0.5, 2.0)
    color_jitter: bool = True

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        epoch, index = key
        rng = random.Random(f"{self.seed} {epoch} {index}")
        image, label = read_sample(self.samples[index], self.table)  # (H, W)
        params, label = sample_crop(label, self.crop_size, rng, self.scale_range)  # label (h, w)
        photometric = torch.tensor(sample_photometric(rng) if self.color_jitter else NO_CHANGE)
        return crop_image(image, params, self.crop_size), label, photometric


@dataclass
class EvalDataset(Dataset):
    """Whole images. Item i is (image, label) of sample i: uint8 (3, H, W) and uint8 (H, W)."""

    samples: Sequence[Sample]
    table: ClassTable

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = read_sample(self.samples[index], self.table)
        return to_tensor(image), torch.from_numpy(label)


@dataclass
class InfiniteSampler(Sampler):
    """An infinite sequence of (epoch, index) in which every epoch is a new shuffle.

    Rank r of R takes every R-th entry from r on, so that R processes with batch size b see, step by step, the images
    of one process with batch size R * b. Nothing is padded or dropped at the end of an epoch. ``start`` entries of the
    whole sequence are skipped, so that a run resumes in the middle of an epoch.

    >>> one, two = (InfiniteSampler(size=3, seed=0, rank=rank, world_size=2) for rank in (0, 1))
    >>> [epoch for epoch, index in itertools.islice(one, 4)], [epoch for epoch, index in itertools.islice(two, 4)]
    ([0, 0, 1, 2], [0, 1, 1, 2])
    """

    size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    start: int = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        shuffled = None
        for position in itertools.count(self.start + self.rank, self.world_size):
            epoch, place = divmod(position, self.size)
            if epoch != shuffled:
                order = list(range(self.size))
                random.Random(f"{self.seed} {epoch}").shuffle(order)
                shuffled = epoch
            yield epoch, order[place]
