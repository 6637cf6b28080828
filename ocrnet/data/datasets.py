"""Finding and reading the files of a data set, the data sets of training and evaluation, and the order of training.

Cityscapes' layout (https://arxiv.org/abs/1604.01685), or a plain one, with folders of any depth below a split:

    ROOT/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png       image
    ROOT/gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png        label, or where there is none
    ROOT/gtFine/SPLIT/CITY/NAME_gtFine_labelTrainIds.png   label that is mapped already

    ROOT/images/SPLIT/NAME.jpg                             image (no folders train and val: a fifth is val)
    ROOT/labels/SPLIT/NAME.png                             label, or .tif, .bmp: ids or colors of classes.json
    ROOT/classes.json                                      the classes; optional in Cityscapes' layout

Notation: H W an image's size, h w the crop's.
"""

import itertools
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from .. import InputError
from .classes import CITYSCAPES, IGNORE_INDEX, ClassTable
from .transforms import NO_CHANGE, crop_image, sample_crop, sample_photometric

IMAGE_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".webp", ".jpg", ".jpeg")  # in any case
PIXEL_BYTES = 4  # of an RGB image and its label in a batch
TRAIN_IDS = "_gtFine_labelTrainIds.png"
LAYOUTS = {  # folder of images -> endings of images, folder of labels, endings of labels: the first that exists counts
    "images": (IMAGE_SUFFIXES, "labels", IMAGE_SUFFIXES),
    "leftImg8bit": (("_leftImg8bit.png",), "gtFine", ("_gtFine_labelIds.png", TRAIN_IDS)),
}
SPLIT_LIKE = re.compile("(train|val|test)(ing|id|idation)?([^a-z].*)?", re.IGNORECASE)  # Train, validation, val2017


class Sample(NamedTuple):
    image: Path
    label: Path


# ---- finding files ---------------------------------------------------------------------------------------------------


def image_folder(root: Path) -> Path:
    """ROOT/images if there is one and no ROOT/leftImg8bit, which is the default."""
    plain, cityscapes = Path(root, "images"), Path(root, "leftImg8bit")
    return plain if plain.is_dir() and not cityscapes.is_dir() else cityscapes


def split_folder(root: Path, split: str) -> Path:
    """Where the images of a split are: ROOT/images itself if it has no folders of splits.

    Raise InputError if it is not there, and others are named like splits.
    """
    folder = image_folder(root)
    names = sorted(path.name for path in folder.glob("*") if SPLIT_LIKE.fullmatch(path.name) and path.is_dir())
    if folder.name == "images" and not names:
        return folder
    if not (folder / split).is_dir() and not {*names} <= {"train", "val", "test"}:
        raise InputError(f"{folder / split}: expected this folder, found {', '.join(names)}: rename images and labels")
    return folder / split


def list_files(folder: Path, endings: Sequence[str]) -> dict[str, list[Path]]:
    """The files below a folder by their path in it without one of these endings, and then in the order of the endings.

    The case of endings does not count. Hidden files are left out, links are followed, each folder is listed once.
    """
    files, seen, found = [], set(), {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
        if real not in seen:
            files += [Path(parent, name) for name in names if not name.startswith(".")]
        seen.add(real)
    for ending, path in itertools.product(endings, sorted(files)):
        if path.name.lower().endswith(ending.lower()) and path.is_file():
            found.setdefault(str(path.relative_to(folder))[: -len(ending)], []).append(path)
    return found


def find_images(root: Path | str, split: str) -> dict[Path, str]:
    """All images of a split, sorted -> their paths below its folder without endings, which their labels have too.

    Raise InputError if there are none, or two have the same label.
    """
    folder, endings = split_folder(Path(root), split), LAYOUTS[image_folder(root).name][0]
    files = list_files(folder, endings)
    for first, *others in files.values():
        if others:
            raise InputError(f"{first}: expected one image of this name, found {others[0]} too")
    images = {path: stem for stem, (path,) in sorted(files.items(), key=lambda item: item[1])}
    if folder.name == "images":  # by the name, so that an image stays where it is when others are added
        if split not in ("train", "val"):
            raise InputError(f"--split {split}: expected train or val, as {folder} has no folders of splits")
        images = {x: y for x, y in images.items() if (zlib.crc32(os.fsencode(x.stem)) % 5 == 0) == (split == "val")}
    if not images:
        raise InputError(
            f"{folder}: expected images of {split} ({', '.join(endings)}), found none among {len(files)}; "
            f"ocrnet/data/datasets.py shows the layouts, and train.py --demo needs no data"
        )
    return images


def find_samples(root: Path | str, split: str) -> list[Sample]:
    """All images of a split with their labels, sorted. Raise InputError if one has none, and as ``find_images``."""
    images, parent = find_images(root, split), image_folder(root)
    _, name, endings = LAYOUTS[parent.name]
    folder = Path(root, name, split_folder(root, split).relative_to(parent))
    labels = list_files(folder, endings)
    for image, stem in images.items():
        if stem not in labels:
            raise InputError(f"{image}: expected a label {folder / stem}{endings[0]}, found none")
    return [Sample(image, labels[stem][0]) for image, stem in images.items()]


# ---- reading files ---------------------------------------------------------------------------------------------------


def open_image(path: Path) -> Image.Image:
    """Decode an image in its own mode, rotated as its EXIF orientation says. Raise InputError if it is damaged."""
    try:
        image = Image.open(path)
        # 16 bits per channel, of which PIL keeps the upper 8 unless the mode is I
        image.info["deep"] = ";16" in str(image.tile)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # damaged bytes raise many types; PIL also refuses gigantic images
        raise InputError(f"{path}: expected an image, found another or a damaged file ({error})") from None


def read_image(path: Path | str) -> Image.Image:
    """Read an image as 8-bit RGB. Integers of 16 and 32 bits are scaled from 16 bits, or not if all are below 256."""
    image = open_image(path)
    if image.mode in ("F", "LAB") or (image.mode == "I" and image.getextrema()[1] > 65535):
        raise InputError(f"{path}: expected 8 or 16 bits per channel, found mode {image.mode}")
    if image.info["deep"] and image.mode[0] != "I" and not image.convert("RGB").getbbox():
        raise InputError(f"{path}: expected channels of 8 bits, found 16 bits with values below 256")
    if image.mode.startswith("I"):  # PIL would clip instead of scale
        values = np.asarray(image, np.float64)
        image = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def open_label(path: Path | str) -> Image.Image:
    """Decode a label to mode L, P or RGB, without alpha. Raise InputError if it has another or values beyond 255."""
    image, problem = open_image(path), ""
    if image.format in ("JPEG", "MPO"):
        problem = "a JPEG, which changes values"
    elif image.mode[0] in "1IF":  # one channel of 1, 16 or 32 bits
        values = np.asarray(image)
        small = values.astype(np.uint8)
        image, other = Image.fromarray(small), values[values != small]
        problem = f"value {other[0]}" if other.size else ""
    elif image.mode not in ("L", "LA", "P", "RGB", "RGBA") or image.info["deep"]:
        problem = f"mode {image.mode}" + " of 16 bits" * image.info["deep"]
    if problem:
        raise InputError(f"{path}: expected a label of one channel with values 0 .. 255, or 8-bit RGB, found {problem}")
    return image.convert(image.mode.removesuffix("A"))


def read_label(path: Path | str, table: ClassTable) -> np.ndarray:
    """Read a label as train ids, uint8 (H, W).

    Its values are the ids of the table: of one channel, of the indices of a palette, or 0 and 1 of a 1-bit image. An
    RGB label has the colors of the table. A palette, or an RGB label whose channels are equal, may have either. In a
    file ``..._labelTrainIds.png`` the values are train ids already. Raise InputError if one is not in the table.
    """
    image = open_label(path)
    label, palette = np.array(image), None
    grays = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    if label.ndim == 3 and (label == label[..., :1]).all():
        label, palette = label[..., 0], grays
    elif image.mode == "P":
        palette = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
        palette = None if np.array_equal(palette, grays[: len(palette)]) else palette
    try:
        if Path(path).name.lower().endswith(TRAIN_IDS.lower()):
            table, palette = ClassTable([label._replace(id=label.train_id) for label in table.labels]), None
        return table.to_train_ids(label, palette)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_sample(sample: Sample, table: ClassTable) -> tuple[Image.Image, np.ndarray]:
    """The image, and its train ids, uint8 (H, W). Raise InputError if their sizes differ."""
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


def count_classes(samples: Sequence[Sample], table: ClassTable, show: bool = True) -> list[int]:
    """The pixels of each class in all labels. ``show`` a progress bar."""

    def count(sample: Sample) -> np.ndarray:
        return np.bincount(read_label(sample.label, table).ravel(), minlength=256)

    counts = thread_map(count, samples, desc="counting", disable=None if show else True)
    return sum(counts, start=np.zeros(256, np.int64))[: len(table)].tolist()


def count_values(samples: Sequence[Sample]) -> Counter:
    """Label value, or color (R, G, B) -> its pixels in all labels."""
    counts: Counter = Counter()
    for sample in tqdm(samples, desc="values", disable=None):
        label = open_label(sample.label)
        counts.update({value: count for count, value in label.getcolors(label.width * label.height)})
    return counts


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
    """

    samples: Sequence[Sample]
    table: ClassTable
    crop_size: tuple[int, int]  # (h, w)
    seed: int
    scale_range: tuple[float, float] = (0.5, 2.0)  # of the random resizing
    color_jitter: bool = True  # sample a photometric distortion

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


def check_labels(train_set: TrainDataset, val_set: EvalDataset, print0: Callable, count: int = 50) -> None:
    """Read ``count`` labels of each, or more until they have classes. Print a NOTE of classes that do not occur.

    Raise InputError if all training labels together have fewer than two classes, or those of validation none.
    """
    table, rule = train_set.table, f"{IGNORE_INDEX} is ignored unless a row of classes.json has this id"
    rule += "; without that file values are the ids of Cityscapes" if table is CITYSCAPES else ""
    for samples, least in ((train_set.samples, 2), (val_set.samples, 1)):
        step, pixels = -(-len(samples) // count), np.zeros(len(table), np.int64)
        for start in range(step):
            pixels += count_classes(samples[start::step], table, show=False)
            if np.count_nonzero(pixels) >= least:
                break
        else:
            values = ", ".join(str(value) for value, _ in count_values(samples[::step]).most_common(20))
            raise InputError(
                f"{samples[0].label} and the others: expected pixels of {least} or more classes, "
                f"found {np.count_nonzero(pixels)}, with the values {values}: {rule}"
            )
        missing = [name for name, found in zip(table.names, pixels) if not found]
        if missing and least == 2:
            print0(f"NOTE: no pixel is {', '.join(missing)} in {len(samples[::step])} of {len(samples)} labels: {rule}")


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
