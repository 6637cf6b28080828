"""Cityscapes' files: making train ids, finding, reading and checking, and the data sets that training reads.

Data set: "The Cityscapes Dataset for Semantic Urban Scene Understanding", https://arxiv.org/abs/1604.01685

    ROOT/leftImg8bit/SPLIT/CITY/CITY_000000_000019_leftImg8bit.png              photo
    ROOT/gtFine/SPLIT/CITY/CITY_000000_000019_gtFine_polygons.json              what was annotated
    ROOT/gtFine/SPLIT/CITY/CITY_000000_000019_gtFine_labelIds.png               the 34 label ids 0 .. 33
    ROOT/gtFine/SPLIT/CITY/CITY_000000_000019_gtFine_labelTrainIds.png          the 19 train ids 0 .. 18, 255 elsewhere
    ROOT/classes.json                                                           other labels than these: classes.py

prepare_cityscapes.py makes the train ids from polygons or label ids. Letters: H W a picture's size, K classes.
"""

import itertools
import json
import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from ..errors import InputError
from .classes import CITYSCAPES, IGNORE, ClassTable, read_classes
from .transforms import NO_CHANGE, cut_photo, draw_box, draw_colour

# ---- train ids -----------------------------------------------------------------------------------------------------


def train_ids_from_polygons(path: Path, table: ClassTable = CITYSCAPES) -> Image.Image:
    """Draw the train ids of a ``_polygons.json``: a one-channel 8-bit picture of imgWidth x imgHeight.

    As cityscapesScripts' createTrainIdLabelImgs: polygons in the file's order, later over earlier, "persongroup" as
    person, deleted ones and those without a label id (licence plates) left out, 255 where there is none.

    Raises:
        InputError: the file is not such a JSON, or names a label that is not in the table.
    """
    try:
        annotation = json.loads(path.read_text())
        size = annotation["imgWidth"], annotation["imgHeight"]
        if size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
            raise InputError(f"{path}: {size[0]}x{size[1]}: expected at most {Image.MAX_IMAGE_PIXELS:,} pixels")
        image = Image.new("L", size, IGNORE)
        draw = ImageDraw.Draw(image)
        for item in annotation["objects"]:
            name = item["label"]
            if item.get("deleted"):
                continue
            if name not in table.by_name and name.endswith("group"):
                name = name[: -len("group")]
            if name not in table.by_name:
                raise InputError(
                    f"{path}: no label {name!r}: expected one of {', '.join(table.by_name)}; or add it to classes.json"
                )
            if table.by_name[name].id >= 0:
                draw.polygon([(x, y) for x, y in item["polygon"]], fill=table.by_name[name].train_id)
    except InputError:
        raise
    except OSError:
        raise
    except Exception as error:  # not JSON, or JSON of any other shape
        raise InputError(f"{path}: not a Cityscapes polygon file ({error!r})") from error
    return image


def train_ids_from_label_ids(path: Path, table: ClassTable = CITYSCAPES) -> Image.Image:
    """Translate a ``_labelIds.png`` through the table. 255, which is -1 in 8 bits, stays: not scored.

    Raises:
        InputError: a value is no label id.
    """
    label_ids = read_label(path)
    known = sorted({label.id for label in table.labels} - {-1})
    values = [v for v, count in enumerate(label_ids.histogram()[:IGNORE]) if count and v not in known]
    if values:
        ids = f"{known[0]} .. {known[-1]}" if known == list(range(len(known))) else ", ".join(map(str, known))
        raise InputError(f"{path}: value {values[0]} is no label id: expected {ids}; other labels need a classes.json")
    return label_ids.point(table.train_id_of.tolist())


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """A file that appears whole or not at all: write to the path given, which is renamed when all went well."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_unfinished(paths: Iterable[Path]) -> None:
    """Remove those of the paths that ``write_whole`` left behind when its process was killed."""
    for path in paths:
        if re.fullmatch(r"\.part\d+", path.suffix):
            path.unlink()


def for_each(work: Callable[[Any], None], items: Sequence, workers: int | None, what: str) -> None:
    """``work`` on every item, in ``workers`` processes (None for one per core), with a bar. Raises what it raises."""
    with ProcessPoolExecutor(workers) as pool:
        done = pool.map(work, items, chunksize=8)
        for _ in tqdm(done, total=len(items), desc=what, disable=None if items else True):
            pass


def write_train_ids(target: Path, table: ClassTable) -> None:
    """Write ``target``, a ``_labelTrainIds.png``, from the polygons beside it or, without them, from labelIds."""
    polygons, label_ids = sources(target)
    if polygons.exists():
        image = train_ids_from_polygons(polygons, table)
    else:
        image = train_ids_from_label_ids(label_ids, table)
    with write_whole(target) as part:
        image.save(part, format="PNG")


def sources(train_ids: Path) -> tuple[Path, Path]:
    """Where a ``_labelTrainIds.png`` may come from: polygons and label ids."""
    stem = train_ids.name.removesuffix("labelTrainIds.png")
    return train_ids.with_name(stem + "polygons.json"), train_ids.with_name(stem + "labelIds.png")


def is_outdated(train_ids: Path, root: Path) -> bool:
    """Whether train ids that could be made again are older than the data set's classes.json."""
    table = root / "classes.json"
    return (
        table.exists()
        and train_ids.stat().st_mtime < table.stat().st_mtime
        and any(path.exists() for path in sources(train_ids))
    )


def write_missing_train_ids(root: Path, workers: int | None = None) -> None:
    """Write every ``_labelTrainIds.png`` that is missing, or older than ``root``'s classes.json, and that polygons or
    labelIds can make.

    Args:
        workers: processes; None for one per core.

    Raises:
        InputError: classes.json is none, or the first broken annotation that was met. What was written before stays.
    """
    table = read_classes(root)
    targets = set()
    for source in ("polygons.json", "labelIds.png"):
        for path in root.glob(f"gtFine/*/*/*_gtFine_{source}"):
            targets.add(path.with_name(path.name[: -len(source)] + "labelTrainIds.png"))
    missing = sorted(target for target in targets if not target.exists() or is_outdated(target, root))
    for_each(partial(write_train_ids, table=table), missing, workers, "writing train ids")


# ---- reading, finding, checking ------------------------------------------------------------------------------------


class Sample(NamedTuple):
    photo: Path
    label: Path


def read_image(path: Path, rows: int | None = None) -> Image.Image:
    """A decoded picture.

    Args:
        rows: how many from the top will be looked at; what is below may stay black.

    Raises:
        InputError: the file is no picture, or ends early.
    """
    try:
        image = Image.open(path)
        if rows and image.format == "PNG" and not image.info.get("interlace"):  # inflating is most of a crop's cost
            codec, (left, top, right, bottom), *rest = image.tile[0]
            image.tile = [(codec, (left, top, right, min(rows, bottom)), *rest)]
        image.load()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a picture, or a broken one") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # bytes of any other origin fail in any way; PIL also refuses gigantic pictures
        raise InputError(f"{path}: not a picture, or a broken one ({error})") from None
    return image


def read_photo(path: Path, rows: int | None = None) -> Image.Image:
    """A picture as 8-bit RGB, whatever it was: grey, palette, 16 bits and transparency are converted."""
    image = read_image(path, rows)
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits a channel: PIL would clip, not scale
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((values / 257).clip(0, 255).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def read_label(path: Path) -> Image.Image:
    """A one-channel 8-bit picture of ids.

    Raises:
        InputError: it has several channels or more bits, so its values are no ids.
    """
    image = read_image(path)
    if image.mode not in ("L", "P"):
        raise InputError(f"{path}: a label has one channel of 8 bits, this one is {image.mode}")
    return image if image.mode == "L" else Image.fromarray(np.asarray(image))  # a palette's indices are the ids


def read_pixels(path: Path, read: Callable[[Path], Image.Image]) -> np.ndarray | Image.Image:
    """A photo or label: its packed copy, uint8 (H, W, 3) or (H, W), not read but mapped, or else what ``read`` gives.

    Raises:
        InputError: the copy is none; and as ``read`` does.
    """
    if not is_packed(path):
        return read(path)
    packed = packed_path(path)
    try:
        return np.load(packed, mmap_mode="r")
    except Exception as error:
        raise InputError(f"{packed}: not a packed picture ({error}): delete it, or pack again") from None


def packed_path(path: Path) -> Path:
    return path.with_suffix(".npy")


def is_packed(path: Path) -> bool:
    packed = packed_path(path)
    return packed.exists() and packed.stat().st_mtime >= path.stat().st_mtime  # an older one is of another picture


def pack(sample: Sample) -> None:
    """Keep copies of a photo and its label that need no inflating: the bytes of their pixels, as numpy saves them."""
    for path, read in ((sample.photo, read_photo), (sample.label, read_label)):
        if not is_packed(path):
            with write_whole(packed_path(path)) as part, open(part, "wb") as file:
                np.save(file, np.asarray(read(path)))


def pack_samples(samples: Sequence[Sample], workers: int | None = None) -> None:
    """``pack`` those that are not yet, in ``workers`` processes (None for one per core).

    Raises:
        InputError: the disk has no room for them.
    """
    missing = [sample for sample in samples if not all(map(is_packed, sample))]
    if missing:
        with Image.open(missing[0].photo) as photo:
            needed = 4 * photo.width * photo.height * len(missing)  # red, green, blue, label
        root = missing[0].photo.parent
        free = shutil.disk_usage(root).free
        if needed > free:
            raise InputError(
                f"packing {len(missing)} pictures needs {needed:,} bytes in {root}, where {free:,} are free: "
                f"make room, or leave out --pack"
            )
    for_each(pack, missing, workers, "packing")


def find_photos(root: Path, split: str) -> list[Path]:
    """All photos of a split, sorted by name.

    Raises:
        InputError: there are none.
    """
    folder = root / "leftImg8bit" / split
    cities = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    # not by glob, which passes over folders that may not be read
    photos = sorted(path for city in cities for path in city.iterdir() if path.name.endswith("_leftImg8bit.png"))
    if not photos:
        raise InputError(
            f"{folder}: no photos: expected CITY/*_leftImg8bit.png; unpack Cityscapes there "
            f"(python prepare_cityscapes.py --help) or try the generated data (python train.py --demo)"
        )
    return photos


def label_path(photo: Path) -> Path:
    """Where the label of a photo ROOT/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png is."""
    root, _, split, city = photo.parents[3], *photo.parts[-4:-1]
    return root / "gtFine" / split / city / photo.name.replace("_leftImg8bit.png", "_gtFine_labelTrainIds.png")


def find_samples(root: Path, split: str) -> list[Sample]:
    """All photos of a split with their labels, sorted by name.

    Raises:
        InputError: there are no photos, or one has no label.
    """
    samples = []
    for photo in find_photos(root, split):
        label = label_path(photo)
        if not label.exists():
            raise InputError(f"{photo}: has no label: expected {label}; run python prepare_cityscapes.py --root {root}")
        if is_outdated(label, root):
            raise InputError(f"{label}: is older than classes.json; run python prepare_cityscapes.py --root {root}")
        samples.append(Sample(photo, label))
    return samples


def class_counts(sample: Sample, num_classes: int) -> list[int]:
    """Check one photo and its label; return the label's pixels of each class, and of 255 as the last entry.

    Raises:
        InputError: sizes differ, or a value is neither a class nor 255.
    """
    label = read_label(sample.label)
    try:
        with Image.open(sample.photo) as photo:  # reads the header alone
            size = photo.size
    except Exception:
        raise InputError(f"{sample.photo}: not a picture, or a broken one") from None
    if size != label.size:
        raise InputError(f"{sample.label}: is {label.width}x{label.height}, its photo is {size[0]}x{size[1]}")
    counts = label.histogram()
    for value in range(num_classes, IGNORE):
        if counts[value]:
            raise InputError(
                f"{sample.label}: {counts[value]} pixels of value {value}: expected train ids 0 .. {num_classes - 1} "
                f"or {IGNORE}; if these are label ids, name the file _labelIds.png and run prepare_cityscapes.py"
            )
    return [*counts[:num_classes], counts[IGNORE]]


def check_samples(samples: Sequence[Sample], num_classes: int, quiet: bool = False) -> np.ndarray:
    """``class_counts`` of all samples, in parallel: (len(samples), K + 1) pixel counts. Raises as it does."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = pool.map(lambda sample: class_counts(sample, num_classes), samples)
        bar = tqdm(counts, total=len(samples), desc="checking labels", disable=quiet or None, leave=False)
        return np.array(list(bar))


# ---- data sets and their order ------------------------------------------------------------------------------------


def to_tensor(image: Image.Image) -> Tensor:
    """A photo as uint8 (3, H, W), a label as uint8 (H, W)."""
    x = torch.from_numpy(np.array(image))
    return x.permute(2, 0, 1) if x.ndim == 3 else x


def read_label_tensor(sample: Sample) -> Tensor:
    """The label of a sample, uint8 (H, W)."""
    return to_tensor(read_label(sample.label))


def instance_path(sample: Sample) -> Path:
    """Where Cityscapes keeps the instances of a sample."""
    return sample.label.with_name(sample.label.name.replace("labelTrainIds", "instanceIds"))


def read_instances(sample: Sample) -> Tensor:
    """int32 (H, W): 1000 (k + 1) + j for instance j = 0 .. 999 of class k; 0 for what is in none or is not scored."""
    ids = np.asarray(read_image(instance_path(sample))).astype(np.int32)  # 1000 * label id + number, or a label id
    train_ids = CITYSCAPES.train_id_of[ids // 1000].astype(np.int32)
    inside = (ids > 1000) & (train_ids != IGNORE)
    return torch.from_numpy(np.where(inside, 1000 * (train_ids + 1) + ids % 1000, 0))


class WholeImages(Dataset):
    """For scoring: item i is photo uint8 (3, H, W) and label uint8 (H, W) of sample i, untouched.

    With ``instances`` also the instances, int32 (H, W): see ``read_instances``.
    """

    def __init__(self, samples: Sequence[Sample], instances: bool = False):
        self.samples = samples
        self.instances = instances

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        sample = self.samples[index]
        instances = (read_instances(sample),) if self.instances else ()
        return to_tensor(read_photo(sample.photo)), read_label_tensor(sample), *instances


class RandomCrops(Dataset):
    """For training: item (epoch, i) is a random crop of sample i and the colour change drawn for it.

    photo uint8 (3, h, w), label uint8 (h, w), colour float32 (5,): see ``transforms``. What comes out depends on seed,
    epoch and i alone: not on the rank, the worker or what was drawn before.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        crop: tuple[int, int],
        seed: int,
        scales: tuple[float, float] = (0.5, 2.0),
        colour: bool = True,
    ):
        self.samples = samples
        self.colour = colour
        self.crop = crop
        self.scales = scales
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        epoch, index = key
        rng = random.Random(f"{self.seed} {epoch} {index}")
        sample = self.samples[index]
        label = np.asarray(read_pixels(sample.label, read_label))
        box, label = draw_box(label, self.crop, rng, self.scales)
        photo = read_pixels(sample.photo, partial(read_photo, rows=box.top + box.height))
        colour = torch.tensor(draw_colour(rng) if self.colour else NO_CHANGE)
        return cut_photo(photo, box, self.crop), label, colour


def leave_signals_to_parent(worker: int) -> None:
    """For a loader's process: heed Ctrl-C and SIGTERM from nobody but its parent.

    Terminals and schedulers send them to every process of a run, and the parent needs its loaders to end in order.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def heed_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=heed_parent, daemon=True).start()


class EndlessSampler(Sampler):
    """The order of training: epoch after epoch in a new shuffle, as one endless sequence of (epoch, index).

    Process r of R takes every R-th entry from r on, so that R processes of batch b see, step by step, the same pictures
    as one process of batch R * b; nothing is padded or dropped at an epoch's end. ``start`` entries of the whole
    sequence are skipped, which is how a run goes on in the middle of an epoch.

    >>> one, two = (EndlessSampler(size=3, seed=0, rank=rank, world_size=2) for rank in (0, 1))
    >>> [epoch for epoch, index in itertools.islice(one, 4)], [epoch for epoch, index in itertools.islice(two, 4)]
    ([0, 0, 1, 2], [0, 1, 1, 2])
    """

    def __init__(self, size: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0):
        self.size = size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        shuffled = None
        for position in itertools.count(self.start + self.rank, self.world_size):
            epoch, place = divmod(position, self.size)
            if epoch != shuffled:
                order = list(range(self.size))
                random.Random(f"{self.seed} {epoch}").shuffle(order)
                shuffled = epoch
            yield epoch, order[place]
