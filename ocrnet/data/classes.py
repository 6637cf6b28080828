"""What the ids of a data set mean: Cityscapes' table of labels, or the data set's own.

A data set that has a file ROOT/classes.json is read by that, without any change of the code: a list with an object for
each value that its annotations take,

    [
        {"name": "road",     "id": 1, "train_id": 0,   "color": [128, 64, 128], "category": "ground"},
        {"name": "pavement", "id": 2, "train_id": 0,   "color": [128, 64, 128], "category": "ground"},
        {"name": "house",    "id": 3, "train_id": 1,   "color": [70, 70, 70],   "category": "built"},
        {"name": "bonnet",   "id": 9, "train_id": 255, "color": [0, 0, 0]}
    ]

    name       what _polygons.json calls it
    id         its value in _labelIds.png, 0 .. 254; -1: it has none and is not drawn, as Cityscapes' license plates
    train_id   the class that the network learns, 0 .. K-1; labels of one train id are one class, with name, id, color
               and category of the first; 255: not scored
    color      red, green, blue, 0 .. 255
    category   a group of classes that is also scored as one; left out: one of its own, called as the label

Letters: K classes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError

IGNORE = 255  # the train id of everything that is not scored


class Label(NamedTuple):
    """A row of the table; see above."""

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
        self.train_id_of = np.full(256, IGNORE, np.uint8)  # label id -> train id
        self.palette = np.zeros((256, 3), np.uint8)  # train id -> color; black where not scored
        first = {}  # train id -> label
        for label in self.labels:
            if label.id >= 0:
                self.train_id_of[label.id] = label.train_id
            if label.train_id != IGNORE:
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
        """The table in the form of classes.json, which checkpoints keep."""
        return [label._asdict() for label in self.labels]

    @classmethod
    def from_rows(cls, rows: Any, source: str) -> "ClassTable":
        """The table that ``rows`` describe in the form of classes.json. ``source`` is for the messages.

        Raises:
            InputError: they are of another form, a name or id comes twice, or the train ids are not 0 .. K-1.
        """
        form = 'expected objects like {"name": "road", "id": 7, "train_id": 0, "color": [128, 64, 128]} in a list'
        labels: list[Label] = []
        for row in rows if isinstance(rows, list) else [rows]:
            try:
                label = Label(**{"category": row["name"], **row, "color": tuple(row["color"])})
            except (TypeError, KeyError):
                raise InputError(f"{source}: {json.dumps(row)}: {form}") from None
            numbers = (label.id, label.train_id, *label.color)
            words = isinstance(label.name, str) and isinstance(label.category, str)
            whole = all(type(x) is int for x in numbers) and len(numbers) == 5
            if (
                not words
                or not whole
                or not -1 <= label.id < 255
                or not 0 <= min(numbers[1:]) <= max(numbers[1:]) < 256
            ):
                raise InputError(f"{source}: {json.dumps(row)}: {form}, with an id below 255 and others up to 255")
            if label.id < 0 and label.train_id != IGNORE:
                raise InputError(f"{source}: {json.dumps(row)}: id -1 is for what is not scored: train_id {IGNORE}")
            same = [other for other in labels if other.name == label.name or other.id == label.id >= 0]
            if same:
                raise InputError(f"{source}: {label.name!r} and {same[0].name!r} have the same name or id")
            labels.append(label)
        train_ids = sorted({label.train_id for label in labels} - {IGNORE})
        if len(train_ids) < 2 or train_ids != list(range(len(train_ids))):
            raise InputError(f"{source}: train ids {train_ids}: expected 0, 1 and so on without a gap, two or more")
        return cls(labels)


def read_classes(root: Path) -> ClassTable:
    """The table of the data set under ``root``: its classes.json, or without one Cityscapes'.

    Raises:
        InputError: as ``ClassTable.from_rows``, or the file is not JSON.
    """
    path = Path(root) / "classes.json"
    if not path.exists():
        return CITYSCAPES
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    return ClassTable.from_rows(rows, str(path))


# The table is the data set's own (cityscapesScripts, helpers/labels.py).
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

# What the authors' HRNet-OCR weighs each class's loss with.
CLASS_WEIGHTS = [
    0.8373, 0.9180, 0.8660, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023,
    0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507,
]  # fmt: skip

# Pixels of the average instance in the training set (cityscapesScripts, evalPixelLevelSemanticLabeling).
AVERAGE_INSTANCE = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}
