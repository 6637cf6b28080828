"""Where the files of a data set are: in Cityscapes' layout, or in a plain one.

Cityscapes' (https://arxiv.org/abs/1604.01685):

    ROOT/leftImg8bit/SPLIT/CITY/CITY_000000_000019_leftImg8bit.png          image
    ROOT/gtFine/SPLIT/CITY/CITY_000000_000019_gtFine_polygons.json          annotation, or without one
    ROOT/gtFine/SPLIT/CITY/CITY_000000_000019_gtFine_labelIds.png           annotation: label ids
    ROOT/gtFine/SPLIT/CITY/CITY_000000_000019_gtFine_labelTrainIds.png      label, written by prepare_cityscapes.py

Plain:

    ROOT/images/SPLIT/ANY/FOLDERS/NAME.jpg      image: .jpg, .jpeg or .png
    ROOT/labels/SPLIT/ANY/FOLDERS/NAME.png      annotation: ids or colors of classes.json
    ROOT/train_ids/SPLIT/ANY/FOLDERS/NAME.png   label, written by prepare_cityscapes.py
    ROOT/classes.json                           the classes; optional in Cityscapes' layout
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from .classes import CITYSCAPES, ClassTable


class Sample(NamedTuple):
    image: Path
    label: Path  # train ids


class Layout(NamedTuple):
    """Folders below the root, and endings of file names."""

    images: str
    image_endings: tuple[str, ...]
    label: tuple[str, str]
    annotations: tuple[tuple[str, str], ...]  # the first that exists counts


CITYSCAPES_LAYOUT = Layout(
    images="leftImg8bit",
    image_endings=("_leftImg8bit.png",),
    label=("gtFine", "_gtFine_labelTrainIds.png"),
    annotations=(("gtFine", "_gtFine_polygons.json"), ("gtFine", "_gtFine_labelIds.png")),
)
PLAIN_LAYOUT = Layout(
    images="images",
    image_endings=(".png", ".jpg", ".jpeg"),
    label=("train_ids", ".png"),
    annotations=(("labels", ".png"),),
)


def find_layout(root: Path) -> Layout:
    """The plain layout if there is a folder ``images`` and no ``leftImg8bit``, else Cityscapes'."""
    is_plain = (root / PLAIN_LAYOUT.images).is_dir() and not (root / CITYSCAPES_LAYOUT.images).is_dir()
    return PLAIN_LAYOUT if is_plain else CITYSCAPES_LAYOUT


def walk(folder: Path) -> Iterator[Path]:
    """The files below a folder, without hidden ones. Raises OSError for folders without permission, unlike rglob."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from walk(path)
        else:
            yield path


def replace_ending(path: Path, root: Path, ending: str, target: tuple[str, str]) -> Path:
    """ROOT/FOLDER/SPLIT/.../NAME + ``ending`` with the folder and ending of ``target``."""
    folder, new_ending = target
    return Path(root, folder, *path.relative_to(root).parts[1:-1], path.name[: -len(ending)] + new_ending)


def is_image(path: Path, layout: Layout) -> bool:
    return path.name.lower().endswith(tuple(ending.lower() for ending in layout.image_endings))


def label_path(image: Path, root: Path, layout: Layout) -> Path:
    """The train ids of an image of the data set ``root``."""
    ending = next(ending for ending in layout.image_endings if image.name.lower().endswith(ending.lower()))
    return replace_ending(image, root, ending, layout.label)


def annotation_paths(label: Path, root: Path, layout: Layout) -> list[Path]:
    """Where the annotation may be from which these train ids are made. The first that exists counts."""
    return [replace_ending(label, root, layout.label[1], target) for target in layout.annotations]


def find_annotation(label: Path, root: Path, layout: Layout) -> Path | None:
    """The annotation of these train ids. None if it does not exist."""
    return next((path for path in annotation_paths(label, root, layout) if path.exists()), None)


def classes_time(root: Path, layout: Layout) -> float:
    """When classes.json was written, in seconds; 0 without one. Older train ids are outdated.

    Raises:
        InputError: there is none in the plain layout.
    """
    path = root / "classes.json"
    if path.exists():
        return path.stat().st_mtime
    if layout is PLAIN_LAYOUT:
        raise InputError(f"{path}: expected the classes of this data set; see ocrnet/data/README.md")
    return 0.0


def has_labels(root: Path, split: str, table: ClassTable) -> bool:
    """Whether a split has labels. Those of Cityscapes' test split are dummies; another test split may have none."""
    layout = find_layout(root)
    is_cityscapes = layout is CITYSCAPES_LAYOUT and table.names == CITYSCAPES.names
    return split != "test" or ((root / layout.annotations[0][0] / split).is_dir() and not is_cityscapes)


def find_splits(root: Path) -> list[str]:
    """The names of the splits.

    Raises:
        InputError: there are none.
    """
    folder = root / find_layout(root).images
    paths = folder.iterdir() if folder.is_dir() else ()
    splits = sorted(path.name for path in paths if path.is_dir() and not path.name.startswith("."))
    if not splits:
        raise InputError(f"{folder}: expected folders train and val, found none; see ocrnet/data/README.md")
    return splits


def list_images(root: Path, split: str) -> list[Path]:
    """All images of a split, sorted. Empty if there are none.

    Raises:
        InputError: two have the same label.
    """
    layout, first = find_layout(root), {}  # label -> image
    folder = root / layout.images / split
    images = sorted(path for path in walk(folder) if is_image(path, layout)) if folder.is_dir() else []
    for image in images:
        label = label_path(image, root, layout)
        if first.setdefault(label, image) != image:
            raise InputError(f"{image}: expected one image named {label.stem}, found {first[label]} too")
    return images


def find_images(root: Path, split: str) -> list[Path]:
    """As ``list_images``.

    Raises:
        InputError: there are none; and as ``list_images``.
    """
    images, layout = list_images(root, split), find_layout(root)
    if not images:
        raise InputError(
            f"{root / layout.images / split}: expected *{' or *'.join(layout.image_endings)}, found no images; see "
            f"ocrnet/data/README.md, or try the generated data (python train.py --demo)"
        )
    return images


def find_samples(root: Path, split: str) -> list[Sample]:
    """All images of a split with their labels, sorted by name.

    Raises:
        InputError: there are no images, a label is missing or older than classes.json, or the plain layout has no
            classes.json.
    """
    layout = find_layout(root)
    samples = [Sample(image, label_path(image, root, layout)) for image in find_images(root, split)]
    outdated, remedy = classes_time(root, layout), f"run python prepare_cityscapes.py --data-path {root}"
    for image, label in samples:
        if not label.exists():
            if not find_annotation(label, root, layout):
                paths = " or ".join(map(str, annotation_paths(label, root, layout)))
                remedy = f"it is made from {paths}, which does not exist"
            raise InputError(f"{image}: expected a label {label}, found none; {remedy}")
        if label.stat().st_mtime < outdated and find_annotation(label, root, layout):
            raise InputError(f"{label}: is older than classes.json; {remedy}")
    return samples


def find_stale_labels(root: Path) -> list[Path]:
    """The train ids of all splits that can be made and are missing or older than classes.json.

    In the plain layout also those that are older than their annotation. (In Cityscapes' they may come from elsewhere.)

    Raises:
        InputError: there are no splits, or the plain layout has no classes.json.
    """
    layout, stale = find_layout(root), []
    outdated = classes_time(root, layout)
    for image in (image for split in find_splits(root) for image in list_images(root, split)):
        label = label_path(image, root, layout)
        annotation = find_annotation(label, root, layout)
        if annotation:
            edited = annotation.stat().st_mtime if layout is PLAIN_LAYOUT else 0.0
            if not label.exists() or label.stat().st_mtime < max(outdated, edited):
                stale.append(label)
    return stale


def find_sample(image: Path) -> tuple[Sample, Path] | None:
    """The sample of an image with a label, and the root of its data set. None for an image without."""
    image = Path(os.path.abspath(image))  # links stay
    for folder in image.parents:
        root, layout = folder.parent, find_layout(folder.parent)
        if folder.name == layout.images and is_image(image, layout):
            label = label_path(image, root, layout)
            if label.exists():
                return Sample(image, label), root
    return None
