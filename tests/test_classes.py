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


def test_cityscapes_has_the_19_train_ids_of_its_34_label_ids():
    # cityscapesScripts, helpers/labels.py
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert CITYSCAPES.ids == ids and len(CITYSCAPES) == 19
    train_ids = CITYSCAPES.to_train_ids(np.array([[*range(34), 255]], np.uint8))[0]
    assert train_ids.tolist() == [ids.index(i) if i in ids else 255 for i in range(34)] + [255]


def test_values_and_colors_become_train_ids():
    table = ClassTable.from_rows(ROWS, "x")
    values = np.array([[0, 255, 7], [9, 0, 0]], np.uint8)
    colors = {row["id"]: row["color"] for row in ROWS}
    rgb = np.array([[colors[value] for value in row] for row in values.tolist()], np.uint8)
    expected = [[0, 1, 255], [1, 0, 0]]
    assert table.to_train_ids(values).tolist() == table.to_train_ids(rgb).tolist() == expected
    assert table.names == ["plain", "crack"] and table.ids == [0, 255]
    assert table.palette[[0, 1, 255]].tolist() == [[0, 0, 0], [255, 0, 0], [0, 0, 0]]


def test_the_value_255_is_ignored_unless_a_row_has_it():
    assert CITYSCAPES.to_train_ids(np.array([[255]], np.uint8)).tolist() == [[255]]
    assert ClassTable.from_rows(ROWS, "x").to_train_ids(np.array([[255]], np.uint8)).tolist() == [[1]]


@pytest.mark.parametrize("label, found", [([[0, 5], [0, 0]], "5"), ([[[0, 0, 0], [1, 2, 3]]] * 2, r"\[1, 2, 3\]")])
def test_an_unknown_value_or_color_is_named_with_its_share(label, found):
    share = "25" if found == "5" else "50"
    with pytest.raises(InputError, match=rf"^{share}.*{found}"):
        ClassTable.from_rows(ROWS, "x").to_train_ids(np.array(label, np.uint8))


def test_values_that_are_no_ids_are_read_by_their_colors_in_the_palette():
    table = ClassTable.from_rows(ROWS, "x")
    label = np.array([[1, 2, 2]], np.uint8)
    for palette in ([[9, 9, 9], [255, 0, 0], [0, 0, 0]], [[9, 9, 9], [0, 255, 0], [0, 0, 0], [1, 1, 1]]):
        assert table.to_train_ids(label, np.array(palette, np.uint8)).tolist() == [[1, 0, 0]]


def test_ids_count_where_the_palette_is_of_other_colors_or_does_not_tell_them_apart():
    table = ClassTable.from_rows(ROWS, "x")
    for palette in ([[1, 2, 3]] * 10, [[0, 0, 0]] * 10, [[0, 0, 0]]):
        assert table.to_train_ids(np.array([[0, 9]], np.uint8), np.array(palette, np.uint8)).tolist() == [[0, 1]]


def test_ids_with_the_colors_of_other_classes_are_refused():
    palette = np.zeros((10, 3), np.uint8)
    palette[0], palette[9] = ROWS[1]["color"], ROWS[0]["color"]
    with pytest.raises(InputError):
        ClassTable.from_rows(ROWS, "x").to_train_ids(np.array([[0, 9]], np.uint8), palette)


def test_a_color_of_two_classes_is_unknown_and_one_of_a_class_and_an_ignored_label_is_the_class():
    labels = [Label("a", 0, 0, (1, 1, 1)), Label("b", 1, 1, (2, 2, 2)), Label("c", 2, 2, (2, 2, 2))]
    table = ClassTable([Label("void", 3, 255, (1, 1, 1)), *labels])
    assert table.to_train_ids(np.array([[[1, 1, 1]]], np.uint8)).tolist() == [[0]]
    with pytest.raises(InputError):
        table.to_train_ids(np.array([[[2, 2, 2]]], np.uint8))


def test_the_table_is_that_of_classes_json(tmp_path):
    assert read_classes(tmp_path) is CITYSCAPES
    (tmp_path / "classes.json").write_text(json.dumps(ROWS))
    table = read_classes(tmp_path)
    assert table.names == ["plain", "crack"]
    assert ClassTable.from_rows(table.rows(), "x").labels == table.labels


@pytest.mark.parametrize(
    "rows",
    [
        "text", {}, [], [{"name": "a"}], [[]], ROWS[:1], [ROWS[0], {**ROWS[1], "train_id": 2}],
        *([ROWS[0], {**ROWS[1], key: value}] for key, value in [
            ("id", 256), ("id", -2), ("id", "1"), ("id", True), ("train_id", 254), ("train_id", -1), ("color", [0, 0]),
            ("color", [0, 0, 256]), ("color", "red"), ("name", 3), ("name", "plain"), ("id", 0),
        ]),
    ],
)  # fmt: skip
def test_malformed_classes_are_refused(tmp_path, rows):
    (tmp_path / "classes.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=f"^{tmp_path / 'classes.json'}: "):
        read_classes(tmp_path)


def test_a_file_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "classes.json").write_bytes(b"\xff{")
    with pytest.raises(InputError, match=f"^{tmp_path / 'classes.json'}: "):
        read_classes(tmp_path)


def test_classes_of_mmsegmentations_checkpoints():
    names, palette = ["a", "b"], [[1, 2, 3], [4, 5, 6]]
    for meta in ({"CLASSES": names, "PALETTE": palette}, {"dataset_meta": {"classes": names, "palette": palette}}):
        table = classes_from_meta({"meta": meta}, "x")
        assert table.names == names and table.palette[:2].tolist() == palette
    assert classes_from_meta({"meta": {"CLASSES": tuple(CITYSCAPES.names), "PALETTE": None}}, "x") is CITYSCAPES
    assert classes_from_meta({"meta": {"CLASSES": names}}, "x") is None and classes_from_meta({}, "x") is None


def test_automatic_weights_are_those_of_enet_and_one_for_the_mean_pixel():
    share = np.array([0.7, 0.2, 0.1])
    weights = np.array(balanced_weights([70, 20, 10]))
    assert (share * weights).sum() == pytest.approx(1)
    assert weights[1] / weights[0] == pytest.approx(np.log(1.72) / np.log(1.22))
