"""The classes of a data set: Cityscapes' table, or the data set's own classes.json.

To train on other classes, write ROOT/classes.json; no code changes. It is a list with one object per label value:

    [
        {"name": "road",     "id": 1, "train_id": 0,   "color": [128, 64, 128]},
        {"name": "pavement", "id": 2, "train_id": 0,   "color": [128, 64, 128]},
        {"name": "house",    "id": 3, "train_id": 1,   "color": [70, 70, 70]},
        {"name": "bonnet",   "id": 9, "train_id": 255, "color": [0, 0, 0]}
    ]

    id         its value in a label of one channel, 0 .. 255 (255 is ignored unless a row has it); -1: not drawn
    color      red, green, blue, 0 .. 255: in predictions, and in RGB labels
    train_id   the class that the network learns, 0 .. K-1, or 255 for ignored pixels. Rows with the same train_id are
               one class, with name, id and color of the first

Notation: K classes, H W a label's size.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import InputError

IGNORE_INDEX = 255  # the train id of pixels that neither loss nor score counts
UNKNOWN = 254  # in lookups: the value is not in the table


class Label(NamedTuple):
    """A row of classes.json."""

    name: str
    id: int
    train_id: int
    color: tuple[int, int, int]


class ClassTable:
    """The labels of a data set, and the K classes among them.

    >>> table = ClassTable([Label("road", 7, 0, (128, 64, 128)), Label("bonnet", 1, 255, (0, 0, 0))])
    >>> len(table), table.names, table.to_train_ids(np.array([[7, 1, 255]], np.uint8)).tolist()
    (1, ['road'], [[0, 255, 255]])

    Attributes:
        names, ids: of each class.
        palette: train id -> color, uint8 (256, 3); black for ignored pixels.
    """

    def __init__(self, labels: Sequence[Label]):
        self.labels = list(labels)
        first = {label.train_id: label for label in reversed(self.labels)}  # train id -> its first label
        classes = [first[k] for k in sorted(first.keys() - {IGNORE_INDEX})]
        self.names, self.ids = [label.name for label in classes], [label.id for label in classes]
        self.palette = np.zeros((256, 3), np.uint8)
        self.palette[: len(classes)] = [label.color for label in classes]
        self.lookup = np.full(256, UNKNOWN, np.uint8)  # label value -> train id
        self.lookup[IGNORE_INDEX] = IGNORE_INDEX
        for label in self.labels:
            if label.id >= 0:
                self.lookup[label.id] = label.train_id

    @cached_property
    def color_lookup(self) -> np.ndarray:
        """R, G, B -> train id, uint8. A class wins over ignored labels; a color of more classes is ``UNKNOWN``."""
        lookup = np.full((256, 256, 256), UNKNOWN, np.uint8)
        for color in {label.color for label in self.labels}:
            classes = {label.train_id for label in self.labels if label.color == color} - {IGNORE_INDEX}
            lookup[color] = UNKNOWN if len(classes) > 1 else min(classes, default=IGNORE_INDEX)
        return lookup

    def lookup_of(self, values: np.ndarray, palette: np.ndarray) -> np.ndarray:
        """``lookup`` for these values, or one by their colors. See ``to_train_ids``."""
        by_color = np.full(256, UNKNOWN, np.uint8)
        by_color[: len(palette)] = self.color_lookup[tuple(palette.T)]
        are_colors = UNKNOWN not in by_color[values]
        if not (are_colors and np.isin(values, [label.id for label in self.labels]).all()):
            return by_color if are_colors else self.lookup
        # a palette that does not tell them apart, as the black one of an image without colors, says nothing
        distinct = len(palette) > 1 and len(np.unique(palette[values], axis=0)) == len(values)
        if distinct and (by_color[values] != self.lookup[values]).any():
            raise InputError(
                "its values are ids of some classes, and its colors those of others: save it as one channel, where "
                "values count, or give the rows id -1, so that colors count"
            )
        return self.lookup

    def __len__(self) -> int:
        """K."""
        return len(self.names)

    def to_train_ids(self, label: np.ndarray, palette: np.ndarray | None = None) -> np.ndarray:
        """Label values (H, W) or colors (H, W, 3), uint8 -> train ids, uint8 (H, W).

        ``palette``, uint8 (N, 3), has the color of each value. It counts where a value is no id of the table. Raise
        InputError if a value or color is not in the table, or values are ids and have colors of other classes.
        """
        if label.ndim == 3:
            train_ids = self.color_lookup[tuple(np.moveaxis(label, 2, 0))]
        else:
            train_ids = (self.lookup if palette is None else self.lookup_of(np.unique(label), palette))[label]
        unknown = train_ids == UNKNOWN
        if unknown.any():
            values, what = np.unique(label[unknown], axis=0).tolist(), "value" if label.ndim == 2 else "color"
            hint = f"a row of train_id {IGNORE_INDEX} ignores it"
            if len(values) > len(self.labels):
                hint = f"{len(values)} such {what}s look like resizing or lossy compression: save it without them"
            raise InputError(
                f"{unknown.mean():.1%} of the pixels are of no class, the first has {what} {values[0]}: expected those "
                f"of classes.json (Cityscapes' without it); {hint}"
            )
        return train_ids

    def rows(self) -> list[dict]:
        """The table as in classes.json. Checkpoints store it."""
        return [label._asdict() for label in self.labels]

    @classmethod
    def from_rows(cls, rows: Any, source: str) -> "ClassTable":
        """The table from ``rows`` as in classes.json. ``source`` names their file in errors.

        Raise InputError if a row is malformed, a name or id is repeated, or the train ids are not 0 .. K-1.
        """
        labels: list[Label] = []
        for row in rows if isinstance(rows, list) else [rows]:
            try:
                label = Label(row["name"], row["id"], row["train_id"], tuple(row["color"]))
                valid = [type(x) for x in (label.name, *label[1:3], *label.color)] == [str] + 5 * [int]
                valid = valid and label.id in range(-1, 256) and {*label.color} <= {*range(256)}
                valid = valid and label.train_id in (*range(UNKNOWN), IGNORE_INDEX)
            except (TypeError, KeyError):
                valid = False
            if not valid:
                raise InputError(
                    f"{source}: expected rows like {{'name': 'road', 'id': 7, 'train_id': 0, 'color': [128, 64, 128]}} "
                    f"with id -1 .. 255, train_id 0 .. {UNKNOWN - 1} or {IGNORE_INDEX}, found {row}"
                )
            for other in labels:
                if other.name == label.name or other.id == label.id >= 0:
                    raise InputError(f"{source}: {label.name!r} and {other.name!r} have the same name or id")
            labels.append(label)
        train_ids = sorted({label.train_id for label in labels} - {IGNORE_INDEX})
        if len(train_ids) < 2 or train_ids != list(range(len(train_ids))):
            raise InputError(f"{source}: expected two or more train ids 0, 1, ... without a gap, found {train_ids}")
        return cls(labels)


def read_classes(root: Path | str) -> ClassTable:
    """The classes of the data set under ``root``: its classes.json, or Cityscapes' without one.

    Raise InputError if the file is not JSON or is missing in the plain layout, and as ``ClassTable.from_rows``.
    """
    path = Path(root, "classes.json")
    if not path.exists() and (Path(root, "leftImg8bit").is_dir() or not Path(root, "images").is_dir()):
        return CITYSCAPES
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected the classes, as prepare_cityscapes.py prints them ({error})") from None
    return ClassTable.from_rows(rows, str(path))


def classes_from_meta(state: dict, source: str) -> ClassTable | None:
    """The classes of a checkpoint of mmsegmentation: CLASSES and PALETTE of 0.x, dataset_meta of 1.x. None without."""
    meta = state["meta"] if isinstance(state.get("meta"), dict) else {}
    meta = {"classes": meta.get("CLASSES"), "palette": meta.get("PALETTE"), **(meta.get("dataset_meta") or {})}
    names, palette = meta["classes"] or [], meta["palette"] or []
    if list(names) == CITYSCAPES.names:
        return CITYSCAPES  # with its label ids
    if not names or len(names) != len(palette):
        return None
    rows = [{"name": name, "id": k, "train_id": k, "color": palette[k]} for k, name in enumerate(names)]
    return ClassTable.from_rows(rows, source)


def balanced_weights(pixels: Sequence[int]) -> list[float]:
    """Class weights from the pixels of each class in the training set: 1 / ln(1.02 + share), as in ENet.

    Scaled so that a pixel has weight 1 on average. Paper: https://arxiv.org/abs/1606.02147, section 5.2.

    >>> [round(weight, 2) for weight in balanced_weights([900, 90, 10])]
    [0.59, 3.71, 13.11]
    """
    share = np.asarray(pixels, np.float64) / max(sum(pixels), 1)
    weights = 1 / np.log(1.02 + share)
    return (weights / max((share * weights).sum(), 1e-12)).tolist()


# From cityscapesScripts, helpers/labels.py.
CITYSCAPES = ClassTable([
    Label("unlabeled", 0, 255, (0, 0, 0)),            Label("ego vehicle", 1, 255, (0, 0, 0)),
    Label("rectification border", 2, 255, (0, 0, 0)), Label("out of roi", 3, 255, (0, 0, 0)),
    Label("static", 4, 255, (0, 0, 0)),               Label("dynamic", 5, 255, (111, 74, 0)),
    Label("ground", 6, 255, (81, 0, 81)),             Label("road", 7, 0, (128, 64, 128)),
    Label("sidewalk", 8, 1, (244, 35, 232)),          Label("parking", 9, 255, (250, 170, 160)),
    Label("rail track", 10, 255, (230, 150, 140)),    Label("building", 11, 2, (70, 70, 70)),
    Label("wall", 12, 3, (102, 102, 156)),            Label("fence", 13, 4, (190, 153, 153)),
    Label("guard rail", 14, 255, (180, 165, 180)),    Label("bridge", 15, 255, (150, 100, 100)),
    Label("tunnel", 16, 255, (150, 120, 90)),         Label("pole", 17, 5, (153, 153, 153)),
    Label("polegroup", 18, 255, (153, 153, 153)),     Label("traffic light", 19, 6, (250, 170, 30)),
    Label("traffic sign", 20, 7, (220, 220, 0)),      Label("vegetation", 21, 8, (107, 142, 35)),
    Label("terrain", 22, 9, (152, 251, 152)),         Label("sky", 23, 10, (70, 130, 180)),
    Label("person", 24, 11, (220, 20, 60)),           Label("rider", 25, 12, (255, 0, 0)),
    Label("car", 26, 13, (0, 0, 142)),                Label("truck", 27, 14, (0, 0, 70)),
    Label("bus", 28, 15, (0, 60, 100)),               Label("caravan", 29, 255, (0, 0, 90)),
    Label("trailer", 30, 255, (0, 0, 110)),           Label("train", 31, 16, (0, 80, 100)),
    Label("motorcycle", 32, 17, (0, 0, 230)),         Label("bicycle", 33, 18, (119, 11, 32)),
    Label("license plate", -1, 255, (0, 0, 142)),
])  # fmt: skip
