"""Train ids: labels with the classes 0 .. K-1, and 255 for ignored pixels. Made from annotations, and checked.

An annotation is Cityscapes' polygons, an image of label ids, or an RGB image of the classes' colors.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..errors import InputError
from ..files import atomic_write, parallel_map
from .classes import CITYSCAPES, IGNORE_INDEX, ClassTable, read_classes
from .images import decode, read_header, read_label
from .layout import Sample, find_annotation, find_layout, find_stale_labels

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
    """Map label ids to train ids. The value 255 (-1 in 8 bits) is ignored unless a label of the table has it.

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


def train_ids_from_colors(path: Path, table: ClassTable = CITYSCAPES) -> Image.Image:
    """Map an RGB label to train ids by the colors of the table. An alpha channel is left out.

    Raises:
        InputError: a color is not in the table, or is that of two classes.
    """
    labels = {}  # 0xRRGGBB -> label; of a class and an ignored label, the class
    for label in sorted(table.labels, key=lambda label: label.train_id):
        first = labels.setdefault(int.from_bytes(bytes(label.color), "big"), label)
        if label.train_id not in (first.train_id, IGNORE_INDEX):
            raise InputError(
                f"{path}: expected classes.json with a color per class, {first.name!r} and {label.name!r} have the same"
            )
    known = np.array(sorted(labels), np.int32)
    train_ids = np.array([labels[color].train_id for color in known.tolist()], np.uint8)
    red, green, blue = np.asarray(decode(path).convert("RGB"), np.int32).transpose(2, 0, 1)  # (H, W) each
    colors = (red << 16) + (green << 8) + blue
    index = np.searchsorted(known, colors).clip(max=len(known) - 1)
    unknown = colors[known[index] != colors]
    if unknown.size:
        color = list(int(unknown[0]).to_bytes(3, "big"))
        raise InputError(
            f"{path}: expected the colors of classes.json, found {color}, {unknown.size} pixels of other colors; "
            f"add a row with this color, of train_id {IGNORE_INDEX} to ignore it"
        )
    return Image.fromarray(train_ids[index])


def make_train_ids(annotation: Path, table: ClassTable) -> Image.Image:
    """The train ids of an annotation: polygons, label ids or colors."""
    if annotation.suffix == ".json":
        return train_ids_from_polygons(annotation, table)
    mode, size = read_header(annotation)
    return (train_ids_from_colors if mode in ("RGB", "RGBA") else train_ids_from_label_ids)(annotation, table)


def write_train_ids(target: Path, root: Path, table: ClassTable) -> None:
    """Write one file of train ids from its annotation."""
    image = make_train_ids(find_annotation(target, root, find_layout(root)), table)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as part:
        image.save(part, format="PNG")


def write_missing_train_ids(root: Path, workers: int | None = None) -> None:
    """Write all train ids that are missing or outdated, in ``workers`` processes (None: one per core).

    Raises:
        InputError: classes.json or an annotation is invalid, and as ``find_stale_labels``. Files written before stay.
    """
    write = partial(write_train_ids, root=root, table=read_classes(root))
    parallel_map(ProcessPoolExecutor(workers), write, find_stale_labels(root), "writing train ids")


# ---- checking --------------------------------------------------------------------------------------------------------


def class_counts(sample: Sample, num_classes: int) -> list[int]:
    """Check an image and its label. Return the label's pixels per class, with those of 255 as the last entry.

    Raises:
        InputError: the sizes differ, or a value is neither a class nor 255.
    """
    label = read_label(sample.label)
    mode, size = read_header(sample.image)
    if size != label.size:
        expected, found = "x".join(map(str, size)), "x".join(map(str, label.size))
        raise InputError(f"{sample.label}: expected {expected} as its image, found {found}")
    counts = label.histogram()
    for value in range(num_classes, IGNORE_INDEX):
        if counts[value]:
            raise InputError(
                f"{sample.label}: expected train ids 0 .. {num_classes - 1} or {IGNORE_INDEX}, found {counts[value]} "
                f"pixels of {value}; prepare_cityscapes.py makes train ids from _labelIds.png, or from labels/"
            )
    return [*counts[:num_classes], counts[IGNORE_INDEX]]


def check_samples(samples: Sequence[Sample], num_classes: int, quiet: bool = False) -> np.ndarray:
    """``class_counts`` of all samples, in parallel: (len(samples), K + 1) pixel counts."""
    count, pool = partial(class_counts, num_classes=num_classes), ThreadPoolExecutor(os.cpu_count())
    return np.array(parallel_map(pool, count, samples, "checking labels", quiet))
