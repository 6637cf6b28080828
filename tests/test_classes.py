"""The classes of a data set: labels to train ids, and classes.json."""

import json

import numpy as np
import pytest

from ocrnet import InputError
from ocrnet.data.classes import CITYSCAPES, ClassTable, Label, balanced_weights, classes_from_meta, read_classes

ROWS = [
    {"name": "plain", "id": 0, "train_id": 0, "color": [0, 0, 0]},
    {"name": "crack", "id": 255, "train_id": 1, "color": [255, 0, 0], "category": "ignored by this program"},
    {"name": "edge", "id": 7, "train_id": 255, "color": [0, 0, 9]},
    {"name": "hole", "id": 9, "train_id": 1, "color": [0, 255, 0]},
]
TABLE = ClassTable.from_rows(ROWS, "x")
MANY = [{"name": str(k), "id": -1, "train_id": k, "color": [0, 0, k]} for k in range(255)]


def ids_of(label, palette=None, table=TABLE):
    return table.to_train_ids(np.array(label, np.uint8), palette and np.array(palette, np.uint8)).tolist()


def test_cityscapes_has_torchvisions_labels_and_19_classes():
    from torchvision.datasets import Cityscapes  # here, because torchvision takes seconds to import

    labels = [(x.name, x.id, x.train_id % 256, x.color) for x in Cityscapes.classes]  # there 255 or -1 is ignored
    assert CITYSCAPES.labels == labels and len(CITYSCAPES) == 19
    classes = [(name, k, train_id, color) for name, k, train_id, color in labels if train_id < 255]
    columns = CITYSCAPES.names, CITYSCAPES.ids, range(19), map(tuple, CITYSCAPES.palette.tolist())
    assert list(zip(*columns)) == classes
    train_ids = {k: train_id for _, k, train_id, _ in labels}
    assert ids_of([[*range(34), 255]], table=CITYSCAPES) == [[*map(train_ids.get, range(34)), 255]]


@pytest.mark.parametrize("rows, second", [(ROWS, 1), (ROWS[::-1], 3)])
def test_values_and_colors_become_train_ids_and_the_first_row_names_a_class(rows, second):
    table = ClassTable.from_rows(rows, "x")
    values = [[0, 255, 7], [9, 0, 0]]
    colors = {row["id"]: row["color"] for row in ROWS}
    rgb = [[colors[value] for value in row] for row in values]
    assert ids_of(values, table=table) == ids_of(rgb, table=table) == [[0, 1, 255], [1, 0, 0]]
    assert table.names == ["plain", ROWS[second]["name"]] and table.ids == [0, ROWS[second]["id"]]
    assert table.palette.dtype == np.uint8
    assert table.palette.tolist() == [[0, 0, 0], ROWS[second]["color"], *[[0, 0, 0]] * 254]


def test_an_unknown_value_or_color_is_named_with_its_share():
    colors, soft = [[[0, 0, 0], [1, 2, 3]], [[0, 255, 0], [0, 0, 0]]], ([[1, 2, 3, 4, 5]], "5 such values")
    values = [([[value]], rf"^100.* value {value}: ") for value in range(255) if value not in (0, 7, 9)]
    for label, found in [([[0, 0], [5, 8]], "^50.* value 5: "), (colors, r"^25.* color \[1, 2, 3\]: "), soft, *values]:
        with pytest.raises(InputError, match=found):
            ids_of(label)


def test_the_palette_counts_where_a_value_is_no_id():
    palette = [[255, 0, 0], [0, 255, 0], [9, 9, 9], [0, 0, 0], [1, 1, 1]]
    assert ids_of([[0, 1, 3]], palette) == ids_of([[0, 1, 3]], palette[:4]) == [[1, 1, 0]]


def test_ids_count_where_the_palette_has_their_colors_or_others_or_does_not_tell_them_apart():
    own = [[0, 0, 9] if k == 7 else [0, 255, 0] if k == 9 else [0, 0, 0] for k in range(10)]
    for palette in (own, [[1, 2, k] for k in range(10)], [[0, 0, 0]] * 10, [[0, 0, 0]]):
        assert ids_of([[0, 9, 7]], palette) == [[0, 1, 255]]
    swapped = ClassTable([Label("a", 0, 0, (9, 9, 9)), Label("b", 1, 1, (0, 0, 0))])
    assert ids_of([[0, 0]], [[0, 0, 0]], swapped) == [[0, 0]]
    with pytest.raises(InputError):  # the color of another class
        ids_of([[0, 7]], [[0, 255, 0], *own[1:]])


def test_a_color_of_several_classes_is_unknown_and_one_of_a_class_and_ignored_labels_is_the_class():
    train_ids = {(1, 1, 1): [255, 0, 0, 255], (2, 2, 2): [1, 2], (3, 3, 3): [3, 4, 5], (4, 4, 4): [255, 255]}
    rows = [(train_id, color) for color, found in train_ids.items() for train_id in found]
    table = ClassTable([Label(str(k), k, *row) for k, row in enumerate(rows)])
    assert ids_of([[[1, 1, 1], [4, 4, 4]]], table=table) == [[0, 255]]
    for color in (2, 3):
        with pytest.raises(InputError):
            ids_of([[[color] * 3]], table=table)


def test_up_to_254_classes_without_ids_are_accepted_and_the_value_255_is_ignored():
    table = ClassTable.from_rows(MANY[:254], "x")
    assert len(table) == 254 and ids_of([[[0, 0, 253]]], table=table) == [[253]]
    assert ids_of([[255]], table=table) == [[255]]


def test_the_table_is_that_of_classes_json(tmp_path):
    assert read_classes(tmp_path) is CITYSCAPES
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=f"^{tmp_path / 'classes.json'}: "):
        read_classes(tmp_path)
    (tmp_path / "leftImg8bit").mkdir()
    assert read_classes(tmp_path) is CITYSCAPES
    (tmp_path / "classes.json").write_text(json.dumps(ROWS))
    table = read_classes(tmp_path)
    assert table.labels == [(row["name"], row["id"], row["train_id"], tuple(row["color"])) for row in ROWS]
    assert ClassTable.from_rows(table.rows(), "x").labels == table.labels


@pytest.mark.parametrize("rows", [
    b"\xff{", b"[", "text", None, {}, [], [{"name": "a"}], [[]], MANY, ROWS[:1], [ROWS[0], {**ROWS[1], "train_id": 2}],
    *([ROWS[0], {**ROWS[1], key: value}] for key, value in [
        ("id", 256), ("id", -2), ("id", "1"), ("id", True), ("id", 0), ("train_id", True), ("train_id", -1),
        ("color", [0, 0]), ("color", [0, 0, 256]), ("color", [-1, 0, 0]), ("color", [0, 0, True]), ("color", "red"),
        ("color", 1), ("name", 3), ("name", "plain"),
    ]),
])  # fmt: skip
def test_malformed_classes_are_refused(tmp_path, rows):
    (tmp_path / "classes.json").write_bytes(rows if isinstance(rows, bytes) else json.dumps(rows).encode())
    with pytest.raises(InputError, match=f"^{tmp_path / 'classes.json'}: "):
        read_classes(tmp_path)


def test_classes_of_mmsegmentations_checkpoints():
    names, palette = ["a", "b"], [[1, 2, 3], [4, 5, 6]]
    old, new = {"CLASSES": names, "PALETTE": palette}, {"dataset_meta": {"classes": names, "palette": palette}}
    for meta in (old, new, {**old, "dataset_meta": None}, {"CLASSES": "c", "PALETTE": palette[:1], **new}):
        table = classes_from_meta({"meta": meta}, "x")
        assert table.names == names and table.ids == [0, 1] and table.palette[:2].tolist() == palette
    assert classes_from_meta({"meta": {"CLASSES": tuple(CITYSCAPES.names)}}, "x") is CITYSCAPES
    for meta in ("x", {}, {"CLASSES": names}, {**old, "PALETTE": palette[:1]}):
        assert classes_from_meta({"meta": meta}, "x") is None and classes_from_meta({}, "x") is None


def test_automatic_weights_are_those_of_enet_and_one_for_the_mean_pixel():
    share = np.array([0.7, 0.2, 0.1, 0])
    weights = 1 / np.log(1.02 + share)
    assert balanced_weights([70, 20, 10, 0]) == pytest.approx(weights / (share * weights).sum())
    assert np.isfinite(balanced_weights([0, 0])).all()
