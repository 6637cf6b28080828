"""Cityscapes' files: where they are, their train ids, and a check of them.

Data set: "The Cityscapes Dataset for Semantic Urban Scene Understanding", https://arxiv.org/abs/1604.01685

    ROOT/leftImg8bit/SPLIT/CITY/CITY_000000_000019_leftImg8bit.png              image
    ROOT/gtFine/SPLIT/CITY/CITY_000000_000019_gtFine_polygons.json              annotation
    ROOT/gtFine/SPLIT/CITY/CITY_000000_000019_gtFine_labelIds.png               the 34 label ids 0 .. 33
    ROOT/gtFine/SPLIT/CITY/CITY_000000_000019_gtFine_labelTrainIds.png          label: 19 train ids 0 .. 18, else 255
    ROOT/classes.json                                                           other classes than these: classes.py

Train ids are made from polygons, or from label ids where there are no polygons.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ..errors import InputError
from ..files import atomic_write, parallel_map
from .classes import CITYSCAPES, IGNORE_INDEX, ClassTable, read_classes
from .images import read_label


class Sample(NamedTuple):
    image: Path
    label: Path


# ---- train ids -------------------------------------------------------------------------------------------------------


def train_ids_from_polygons(path: Path, table: ClassTable = CITYSCAPES) -> Image.Image:
    """Draw the train ids of a ``_polygons.json`` as an 8-bit image of imgWidth x imgHeight.

    Follows cityscapesScripts' createTrainIdLabelImgs: later polygons cover earlier ones, "persongroup" is drawn as
    person, deleted objects and labels without an id (license plates) are skipped, and the rest is 255.

    Raises:
        InputError: the file is not such a JSON, or has a label that is not in the table.
    """
    try:
        annotation = json.loads(path.read_text())
        size = annotation["imgWidth"], annotation["imgHeight"]
        if size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
            raise InputError(f"{path}: expected at most {Image.MAX_IMAGE_PIXELS:,} pixels, found {size[0]}x{size[1]}")
        image = Image.new("L", size, IGNORE_INDEX)
        draw = ImageDraw.Draw(image)
        for item in annotation["objects"]:
            name = item["label"]
            if item.get("deleted"):
                continue
            if name not in table.by_name and name.endswith("group"):
                name = name.removesuffix("group")
            if name not in table.by_name:
                expected = ", ".join(table.by_name)
                raise InputError(f"{path}: expected a label of {expected}, found {name!r}; or add it to classes.json")
            if table.by_name[name].id >= 0:
                draw.polygon([(x, y) for x, y in item["polygon"]], fill=table.by_name[name].train_id)
    except (InputError, OSError):
        raise
    except Exception as error:  # not JSON, or JSON of another structure
        raise InputError(f"{path}: expected a Cityscapes polygon file ({error!r})") from error
    return image


def train_ids_from_label_ids(path: Path, table: ClassTable = CITYSCAPES) -> Image.Image:
    """Map a ``_labelIds.png`` to train ids. The value 255, which is -1 in 8 bits, stays ignored.

    Raises:
        InputError: a value is not a label id of the table.
    """
    label_ids = read_label(path)
    known = sorted({label.id for label in table.labels} - {-1})
    unknown = [v for v, count in enumerate(label_ids.histogram()[:IGNORE_INDEX]) if count and v not in known]
    if unknown:
        ids = f"{known[0]} .. {known[-1]}" if known == list(range(len(known))) else ", ".join(map(str, known))
        raise InputError(f"{path}: expected label ids {ids}, found {unknown[0]}; other labels need a classes.json")
    return label_ids.point(table.train_id_of.tolist())


def annotations_of(train_ids: Path) -> tuple[Path, Path]:
    """The polygons and the label ids beside a ``_labelTrainIds.png``."""
    stem = train_ids.name.removesuffix("labelTrainIds.png")
    return train_ids.with_name(stem + "polygons.json"), train_ids.with_name(stem + "labelIds.png")


def write_train_ids(target: Path, table: ClassTable) -> None:
    """Write one ``_labelTrainIds.png``."""
    polygons, label_ids = annotations_of(target)
    image = (
        train_ids_from_polygons(polygons, table) if polygons.exists() else train_ids_from_label_ids(label_ids, table)
    )
    with atomic_write(target) as part:
        image.save(part, format="PNG")


def is_outdated(train_ids: Path, root: Path) -> bool:
    """Whether train ids are older than the classes.json of their data set and can be made again."""
    table = root / "classes.json"
    return (
        table.exists()
        and train_ids.stat().st_mtime < table.stat().st_mtime
        and any(path.exists() for path in annotations_of(train_ids))
    )


def write_missing_train_ids(root: Path, workers: int | None = None) -> None:
    """Write every ``_labelTrainIds.png`` that is missing or outdated, in ``workers`` processes (None: one per core).

    Raises:
        InputError: classes.json or an annotation is invalid. Files written before stay.
    """
    table, targets = read_classes(root), set()
    for source in ("polygons.json", "labelIds.png"):
        for path in root.glob(f"gtFine/*/*/*_gtFine_{source}"):
            targets.add(path.with_name(path.name.removesuffix(source) + "labelTrainIds.png"))
    missing = sorted(target for target in targets if not target.exists() or is_outdated(target, root))
    parallel_map(ProcessPoolExecutor(workers), partial(write_train_ids, table=table), missing, "writing train ids")


# ---- finding and checking --------------------------------------------------------------------------------------------


def find_images(root: Path, split: str) -> list[Path]:
    """All images of a split, sorted by name.

    Raises:
        InputError: there are none.
    """
    folder = root / "leftImg8bit" / split
    cities = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    # iterdir raises for folders without read permission, glob skips them
    images = sorted(path for city in cities for path in city.iterdir() if path.name.endswith("_leftImg8bit.png"))
    if not images:
        raise InputError(
            f"{folder}: expected CITY/*_leftImg8bit.png, found no images; unpack Cityscapes there "
            f"(python prepare_cityscapes.py --help) or try the generated data (python train.py --demo)"
        )
    return images


def label_path(image: Path) -> Path:
    """The label of ROOT/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png."""
    root, _, split, city = image.parents[3], *image.parts[-4:-1]
    return root / "gtFine" / split / city / image.name.replace("_leftImg8bit.png", "_gtFine_labelTrainIds.png")


def has_labels(split: str, table: ClassTable) -> bool:
    """Whether the labels of a split are public. Those of Cityscapes' test split are dummies."""
    return split != "test" or table.names != CITYSCAPES.names


def find_samples(root: Path, split: str) -> list[Sample]:
    """All images of a split with their labels, sorted by name.

    Raises:
        InputError: there are no images, or a label is missing or outdated.
    """
    samples = [Sample(image, label_path(image)) for image in find_images(root, split)]
    for image, label in samples:
        remedy = f"run python prepare_cityscapes.py --data-path {root}"
        if not label.exists():
            raise InputError(f"{image}: expected a label {label}, found none; {remedy}")
        if is_outdated(label, root):
            raise InputError(f"{label}: is older than classes.json; {remedy}")
    return samples


def class_counts(sample: Sample, num_classes: int) -> list[int]:
    """Check an image and its label. Return the label's pixels per class, with those of 255 as the last entry.

    Raises:
        InputError: the sizes differ, or a value is neither a class nor 255.
    """
    label = read_label(sample.label)
    try:
        with Image.open(sample.image) as image:  # reads only the header
            size = image.size
    except Exception:
        raise InputError(f"{sample.image}: expected an image, found another or a damaged file") from None
    if size != label.size:
        expected, found = "x".join(map(str, size)), "x".join(map(str, label.size))
        raise InputError(f"{sample.label}: expected {expected} as its image, found {found}")
    counts = label.histogram()
    for value in range(num_classes, IGNORE_INDEX):
        if counts[value]:
            raise InputError(
                f"{sample.label}: expected train ids 0 .. {num_classes - 1} or {IGNORE_INDEX}, found {counts[value]} "
                f"pixels of {value}; if these are label ids, name the file _labelIds.png and run prepare_cityscapes.py"
            )
    return [*counts[:num_classes], counts[IGNORE_INDEX]]


def check_samples(samples: Sequence[Sample], num_classes: int, quiet: bool = False) -> np.ndarray:
    """``class_counts`` of all samples, in parallel: (len(samples), K + 1) pixel counts."""
    count, pool = partial(class_counts, num_classes=num_classes), ThreadPoolExecutor(os.cpu_count())
    return np.array(parallel_map(pool, count, samples, "checking labels", quiet))
