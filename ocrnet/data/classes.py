"""The classes of a data set: Cityscapes' table, or the data set's own classes.json.

To train on other classes, write ROOT/classes.json; no code changes. It is a list with one object per annotation value:

    [
        {"name": "road",     "id": 1, "train_id": 0,   "color": [128, 64, 128], "category": "ground"},
        {"name": "pavement", "id": 2, "train_id": 0,   "color": [128, 64, 128], "category": "ground"},
        {"name": "house",    "id": 3, "train_id": 1,   "color": [70, 70, 70],   "category": "built"},
        {"name": "bonnet",   "id": 9, "train_id": 255, "color": [0, 0, 0]}
    ]

    name       its name in _polygons.json
    id         its value in the label, 0 .. 255; -1 for labels that have none and are not drawn (license plates)
    train_id   the class that the network learns, 0 .. K-1, or 255 for ignored pixels. Labels with the same train_id are
               one class, with name, id, color and category of the first
    color      red, green, blue, 0 .. 255: in predictions, and in RGB labels
    category   optional: a group of classes that is also scored as one. Default: the name

Notation: K classes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError

IGNORE_INDEX = 255  # the train id of pixels that neither loss nor score counts


class Label(NamedTuple):
    """A row of classes.json."""

    name: str
    id: int
    train_id: int
    category: str
    color: tuple[int, int, int]


class ClassTable:
    """The labels of a data set, and the K classes among them.

    >>> table = ClassTable([Label("road", 7, 0, "flat", (128, 64, 128)), Label("bonnet", 1, 255, "void", (0, 0, 0))])
    >>> len(table), table.names, table.train_id_of[[7, 1]].tolist()
    (1, ['road'], [0, 255])
    """

    def __init__(self, labels: Sequence[Label]):
        self.labels = list(labels)
        self.by_name = {label.name: label for label in self.labels}
        self.train_id_of = np.full(256, IGNORE_INDEX, np.uint8)  # label id -> train id
        self.palette = np.zeros((256, 3), np.uint8)  # train id -> color; black for ignored pixels
        first = {}  # train id -> label
        for label in self.labels:
            if label.id >= 0:
                self.train_id_of[label.id] = label.train_id
            if label.train_id != IGNORE_INDEX:
                first.setdefault(label.train_id, label)
        classes = [first[k] for k in sorted(first)]
        self.palette[: len(classes)] = [label.color for label in classes]
        self.names = [label.name for label in classes]
        self.ids = [label.id for label in classes]  # train id -> label id
        self.categories = list(dict.fromkeys(label.category for label in classes))
        self.category_of = [self.categories.index(label.category) for label in classes]

    def __len__(self) -> int:
        """K."""
        return len(self.names)

    def rows(self) -> list[dict]:
        """The table as in classes.json. Checkpoints store it."""
        return [label._asdict() for label in self.labels]

    @classmethod
    def from_rows(cls, rows: Any, source: str) -> "ClassTable":
        """The table from ``rows`` as in classes.json. ``source`` names their file in errors.

        Raises:
            InputError: a row is malformed, a name or id is repeated, or the train ids are not 0 .. K-1.
        """
        form = 'expected objects like {"name": "road", "id": 7, "train_id": 0, "color": [128, 64, 128]} in a list'
        labels: list[Label] = []
        for row in rows if isinstance(rows, list) else [rows]:
            found = f"{source}: found {json.dumps(row)}"
            try:
                label = Label(**{"category": row["name"], **row, "color": tuple(row["color"])})
            except (TypeError, KeyError):
                raise InputError(f"{found}: {form}") from None
            numbers = (label.id, label.train_id, *label.color)
            strings = isinstance(label.name, str) and isinstance(label.category, str)
            if not (strings and len(numbers) == 5 and all(type(x) is int for x in numbers)):
                raise InputError(f"{found}: {form}")
            if not (-1 <= label.id < 256 and 0 <= min(numbers[1:]) <= max(numbers[1:]) < 256):
                raise InputError(f"{found}: expected an id of -1 .. 255, and train_id and color of 0 .. 255")
            if label.id < 0 and label.train_id != IGNORE_INDEX:
                raise InputError(f"{found}: expected train_id {IGNORE_INDEX} where the id is -1")
            same = [other for other in labels if other.name == label.name or other.id == label.id >= 0]
            if same:
                raise InputError(f"{source}: {label.name!r} and {same[0].name!r} have the same name or id")
            labels.append(label)
        train_ids = sorted({label.train_id for label in labels} - {IGNORE_INDEX})
        if len(train_ids) < 2 or train_ids != list(range(len(train_ids))):
            raise InputError(f"{source}: expected two or more train ids 0, 1, ... without a gap, found {train_ids}")
        return cls(labels)


def classes_from_meta(state: Any, source: str) -> ClassTable | None:
    """The classes of a checkpoint of mmsegmentation: CLASSES and PALETTE of 0.x, dataset_meta of 1.x. None without.

    Raises:
        InputError: names and colors do not fit each other.
    """
    meta = state.get("meta") if isinstance(state, dict) else None
    if not isinstance(meta, dict):
        return None
    meta = {"classes": meta.get("CLASSES"), "palette": meta.get("PALETTE"), **(meta.get("dataset_meta") or {})}
    names, palette = meta["classes"], meta["palette"]
    if not names or not palette:
        return None
    if list(names) == CITYSCAPES.names:
        return CITYSCAPES  # with its label ids and categories
    if len(names) != len(palette):
        raise InputError(
            f"{source}: expected a color of each class, found {len(names)} names and {len(palette)} colors"
        )
    rows = [
        {"name": name, "id": k, "train_id": k, "color": list(color)}
        for k, (name, color) in enumerate(zip(names, palette))
    ]
    return ClassTable.from_rows(rows, source)


def read_classes(root: Path) -> ClassTable:
    """The classes of the data set under ``root``: its classes.json, or Cityscapes' without one.

    Raises:
        InputError: the file is not JSON; and as ``ClassTable.from_rows``.
    """
    path = Path(root) / "classes.json"
    if not path.exists():
        return CITYSCAPES
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: expected JSON ({error})") from None
    return ClassTable.from_rows(rows, str(path))


# From cityscapesScripts, helpers/labels.py.
CITYSCAPES = ClassTable(
    [
        Label("unlabeled", 0, 255, "void", (0, 0, 0)),
        Label("ego vehicle", 1, 255, "void", (0, 0, 0)),
        Label("rectification border", 2, 255, "void", (0, 0, 0)),
        Label("out of roi", 3, 255, "void", (0, 0, 0)),
        Label("static", 4, 255, "void", (0, 0, 0)),
        Label("dynamic", 5, 255, "void", (111, 74, 0)),
        Label("ground", 6, 255, "void", (81, 0, 81)),
        Label("road", 7, 0, "flat", (128, 64, 128)),
        Label("sidewalk", 8, 1, "flat", (244, 35, 232)),
        Label("parking", 9, 255, "flat", (250, 170, 160)),
        Label("rail track", 10, 255, "flat", (230, 150, 140)),
        Label("building", 11, 2, "construction", (70, 70, 70)),
        Label("wall", 12, 3, "construction", (102, 102, 156)),
        Label("fence", 13, 4, "construction", (190, 153, 153)),
        Label("guard rail", 14, 255, "construction", (180, 165, 180)),
        Label("bridge", 15, 255, "construction", (150, 100, 100)),
        Label("tunnel", 16, 255, "construction", (150, 120, 90)),
        Label("pole", 17, 5, "object", (153, 153, 153)),
        Label("polegroup", 18, 255, "object", (153, 153, 153)),
        Label("traffic light", 19, 6, "object", (250, 170, 30)),
        Label("traffic sign", 20, 7, "object", (220, 220, 0)),
        Label("vegetation", 21, 8, "nature", (107, 142, 35)),
        Label("terrain", 22, 9, "nature", (152, 251, 152)),
        Label("sky", 23, 10, "sky", (70, 130, 180)),
        Label("person", 24, 11, "human", (220, 20, 60)),
        Label("rider", 25, 12, "human", (255, 0, 0)),
        Label("car", 26, 13, "vehicle", (0, 0, 142)),
        Label("truck", 27, 14, "vehicle", (0, 0, 70)),
        Label("bus", 28, 15, "vehicle", (0, 60, 100)),
        Label("caravan", 29, 255, "vehicle", (0, 0, 90)),
        Label("trailer", 30, 255, "vehicle", (0, 0, 110)),
        Label("train", 31, 16, "vehicle", (0, 80, 100)),
        Label("motorcycle", 32, 17, "vehicle", (0, 0, 230)),
        Label("bicycle", 33, 18, "vehicle", (119, 11, 32)),
        Label("license plate", -1, 255, "vehicle", (0, 0, 142)),
    ]
)


def balanced_weights(pixels: Sequence[int]) -> list[float]:
    """Class weights from the pixels of each class in the training set: 1 / ln(1.02 + share), as in ENet.

    Scaled so that a pixel has weight 1 on average. Paper: https://arxiv.org/abs/1606.02147, section 5.2.

    >>> [round(weight, 2) for weight in balanced_weights([900, 90, 10])]
    [0.59, 3.71, 13.11]
    """
    share = np.asarray(pixels, np.float64) / max(sum(pixels), 1)
    weights = 1 / np.log(1.02 + share)
    return (weights / max((share * weights).sum(), 1e-12)).tolist()


# Cityscapes' class weights in the loss of the authors' HRNet-OCR.
CLASS_WEIGHTS = [
    0.8373, 0.9180, 0.8660, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023,
    0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507,
]  # fmt: skip
