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
        if path.is_dir():
            yield from walk(path)
        elif not path.name.startswith("."):
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


def find_labels(root: Path) -> list[Path]:
    """The train ids of all annotations under ``root``, sorted, whether they exist or not."""
    layout, labels = find_layout(root), set()
    for folder, ending in layout.annotations:
        files = walk(root / folder) if (root / folder).is_dir() else ()
        labels |= {replace_ending(path, root, ending, layout.label) for path in files if path.name.endswith(ending)}
    return sorted(labels)


def is_outdated(label: Path, root: Path, layout: Layout) -> bool:
    """Whether train ids are older than the classes.json of their data set and can be made again."""
    table = root / "classes.json"
    return (
        table.exists()
        and label.stat().st_mtime < table.stat().st_mtime
        and any(path.exists() for path in annotation_paths(label, root, layout))
    )


def has_labels(root: Path, split: str, table: ClassTable) -> bool:
    """Whether a split has labels. Those of Cityscapes' test split are dummies; another test split may have none."""
    labels = root / find_layout(root).annotations[0][0] / split
    return split != "test" or (table.names != CITYSCAPES.names and labels.is_dir())


def find_images(root: Path, split: str) -> list[Path]:
    """All images of a split, sorted.

    Raises:
        InputError: there are none, or two have the same label.
    """
    layout = find_layout(root)
    folder = root / layout.images / split
    images = sorted(path for path in walk(folder) if is_image(path, layout)) if folder.is_dir() else []
    if not images:
        raise InputError(
            f"{folder}: expected *{' or *'.join(layout.image_endings)}, found no images; see python "
            f"prepare_cityscapes.py --help, or try the generated data (python train.py --demo)"
        )
    first = {}  # label -> image
    for image in images:
        label = label_path(image, root, layout)
        if first.setdefault(label, image) != image:
            raise InputError(f"{image}: expected one image named {label.stem}, found {first[label]} too")
    return images


def find_samples(root: Path, split: str) -> list[Sample]:
    """All images of a split with their labels, sorted by name.

    Raises:
        InputError: there are no images, or a label is missing or outdated.
    """
    layout = find_layout(root)
    samples = [Sample(image, label_path(image, root, layout)) for image in find_images(root, split)]
    remedy = f"run python prepare_cityscapes.py --data-path {root}"
    for image, label in samples:
        if not label.exists():
            annotations = annotation_paths(label, root, layout)
            if not any(path.exists() for path in annotations):
                remedy = f"it is made from {' or '.join(map(str, annotations))}, which does not exist"
            raise InputError(f"{image}: expected a label {label}, found none; {remedy}")
        if is_outdated(label, root, layout):
            raise InputError(f"{label}: is older than classes.json; {remedy}")
    return samples


def find_sample(image: Path) -> tuple[Sample, Path] | None:
    """The sample of an image with a label, and the root of its data set. None for an image without."""
    image = image.resolve()
    for folder in image.parents:
        root, layout = folder.parent, find_layout(folder.parent)
        if folder.name == layout.images and is_image(image, layout):
            label = label_path(image, root, layout)
            if label.exists():
                return Sample(image, label), root
    return None
