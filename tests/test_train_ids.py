"""Class tables, train ids, and finding and checking the files of a data set."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ocrnet.data.classes import CITYSCAPES, CLASS_WEIGHTS, ClassTable, read_classes
from ocrnet.data.layout import find_images, find_samples
from ocrnet.data.train_ids import (
    check_samples,
    class_counts,
    train_ids_from_label_ids,
    train_ids_from_polygons,
    write_missing_train_ids,
)
from ocrnet.errors import InputError

IMAGE, LABEL = "leftImg8bit/train/a/a_0_0_leftImg8bit.png", "gtFine/train/a/a_0_0_gtFine_labelTrainIds.png"


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)
    return path


def save_sample(root, size=(4, 6), label=((0,) * 6,) * 4):
    """A data set of one training image of ``size`` (H, W). Return its samples."""
    save(root / IMAGE, np.zeros((*size, 3)))
    save(root / LABEL, label)
    return find_samples(root, "train")


# ---- class tables ----------------------------------------------------------------------------------------------------


def test_cityscapes_has_its_nineteen_classes():
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert CITYSCAPES.ids == ids and len(CITYSCAPES) == len(CLASS_WEIGHTS) == 19
    assert CITYSCAPES.train_id_of[ids].tolist() == list(range(19))
    assert sorted(set(CITYSCAPES.train_id_of.tolist())) == [*range(19), 255]
    assert (CITYSCAPES.names[0], CITYSCAPES.names[13], CITYSCAPES.names[18]) == ("road", "car", "bicycle")
    assert CITYSCAPES.palette[[0, 18, 255]].tolist() == [[128, 64, 128], [119, 11, 32], [0, 0, 0]]


def test_cityscapes_has_its_seven_categories():
    assert CITYSCAPES.categories == ["flat", "construction", "object", "nature", "sky", "human", "vehicle"]
    assert CITYSCAPES.category_of == [0] * 2 + [1] * 3 + [2] * 3 + [3] * 2 + [4] + [5] * 2 + [6] * 6


ROAD = {"name": "road", "id": 3, "train_id": 0, "color": [128, 64, 128], "category": "ground"}
PAVEMENT = {"name": "pavement", "id": 5, "train_id": 0, "color": [1, 2, 3], "category": "ground"}
HOUSE = {"name": "house", "id": 4, "train_id": 1, "color": [70, 70, 70]}
BONNET = {"name": "bonnet", "id": 9, "train_id": 255, "color": [0, 0, 0]}
SMALL = [ROAD, PAVEMENT, HOUSE, BONNET]


def test_classes_json_merges_and_ignores_labels(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps(SMALL))
    table = read_classes(tmp_path)
    assert (table.names, table.ids, table.categories) == (["road", "house"], [3, 4], ["ground", "house"])
    assert table.palette[:2].tolist() == [[128, 64, 128], [70, 70, 70]]
    label_ids = save(tmp_path / "a.png", [[3, 5, 4], [9, 255, 4]])
    assert np.array_equal(train_ids_from_label_ids(label_ids, table), [[0, 0, 1], [255, 255, 1]])
    with pytest.raises(InputError) as error:
        train_ids_from_label_ids(save(tmp_path / "b.png", [[7]]), table)
    assert "b.png" in str(error.value) and "3, 4, 5, 9" in str(error.value)


def test_data_set_without_classes_json_has_cityscapes_classes(tmp_path):
    assert read_classes(tmp_path) is CITYSCAPES


def test_table_survives_a_checkpoint():
    for table in (CITYSCAPES, ClassTable.from_rows(SMALL, "classes.json")):
        again = ClassTable.from_rows(json.loads(json.dumps(table.rows())), "last.pt")
        assert again.labels == table.labels and again.names == table.names


@pytest.mark.parametrize(
    "rows",
    [
        {},
        [ROAD, 1],
        [ROAD, HOUSE, {"name": "wall", "id": 7}],
        [{**ROAD, "weight": 1}, HOUSE],
        [{**ROAD, "color": [1, 2]}, HOUSE],
        [{**ROAD, "color": [1, 2, 256]}, HOUSE],
        [{**ROAD, "id": 256}, HOUSE],
        [ROAD, HOUSE, {**BONNET, "id": -2}],
        [{**ROAD, "id": -1}, HOUSE],
        [{**ROAD, "id": True}, HOUSE],
        [{**ROAD, "name": 7}, HOUSE],
        [{**ROAD, "category": 7}, HOUSE],
        [ROAD, {**HOUSE, "id": 3}],
        [ROAD, {**HOUSE, "name": "road"}],
        [ROAD, {**HOUSE, "train_id": 2}],
        [ROAD, HOUSE, {**BONNET, "train_id": 256}],
        [ROAD],
    ],
)
def test_malformed_classes_json_is_named(tmp_path, rows):
    (tmp_path / "classes.json").write_text(json.dumps(rows))
    with pytest.raises(InputError) as error:
        read_classes(tmp_path)
    assert str(tmp_path / "classes.json") in str(error.value)


def test_classes_json_that_is_not_json_is_named(tmp_path):
    (tmp_path / "classes.json").write_text("road: 0")
    with pytest.raises(InputError) as error:
        read_classes(tmp_path)
    assert str(tmp_path / "classes.json") in str(error.value)


# ---- train ids -------------------------------------------------------------------------------------------------------


def box(label, x0, y0, x1, y1, **more):
    return {"label": label, "polygon": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]], **more}


def test_polygons_are_drawn_in_order(tmp_path):
    objects = [
        box("road", 0, 0, 9, 9),
        box("persongroup", 0, 0, 3, 3),
        box("car", 2, 2, 5, 5),
        box("license plate", 4, 4, 5, 5),
        box("sky", 0, 0, 9, 9, deleted=1),
        box("parking", 8, 8, 9, 9),
    ]
    path = tmp_path / "polygons.json"
    path.write_text(json.dumps({"imgHeight": 12, "imgWidth": 11, "objects": objects}))
    expected = np.full((12, 11), 255)
    expected[:10, :10] = 0
    expected[:4, :4] = 11
    expected[2:6, 2:6] = 13
    expected[8:10, 8:10] = 255
    assert np.array_equal(train_ids_from_polygons(path), expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\x89PNG",
        '{"imgHeight": 3}',
        '{"imgHeight":3,"imgWidth":3,"objects":[{"label":1}]}',
        '{"imgHeight":3,"imgWidth":3,"objects":[{"label":"lake","polygon":[[0,0],[1,0],[1,1]]}]}',
        '{"imgHeight":3,"imgWidth":3,"objects":[{"label":"sky","polygon":[[0,0]]}]}',
        '{"imgHeight":-3,"imgWidth":3,"objects":[]}',
        '{"imgHeight":1000000,"imgWidth":1000000,"objects":[]}',  # a terabyte of train ids
        "[" * 100_000,
    ],
)
def test_malformed_polygon_file_is_named(tmp_path, text):
    path = tmp_path / "x_polygons.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        train_ids_from_polygons(path)
    assert str(path) in str(error.value)


def test_label_ids_map_to_train_ids(tmp_path):
    train_ids = train_ids_from_label_ids(save(tmp_path / "a.png", [[7, 0, 33], [26, 4, 29]]))
    assert np.array_equal(train_ids, [[0, 255, 18], [13, 255, 255]])


def test_unknown_label_id_is_named(tmp_path):
    with pytest.raises(InputError) as error:
        train_ids_from_label_ids(save(tmp_path / "b.png", [[7, 34]]))
    assert "b.png" in str(error.value) and "34" in str(error.value)


def test_polygons_are_preferred_and_existing_train_ids_are_kept(tmp_path):
    folder = tmp_path / "gtFine/val/a"
    for i in (0, 1):
        save(tmp_path / f"leftImg8bit/val/a/a_{i}_0_leftImg8bit.png", np.zeros((1, 2, 3)))
    save(folder / "a_0_0_gtFine_labelIds.png", [[7, 7]])
    save(folder / "a_1_0_gtFine_labelIds.png", [[8, 8]])
    annotation = {"imgHeight": 1, "imgWidth": 2, "objects": [box("sky", 0, 0, 2, 1)]}
    (folder / "a_0_0_gtFine_polygons.json").write_text(json.dumps(annotation))
    write_missing_train_ids(tmp_path, workers=1)
    first, second = (folder / f"a_{i}_0_gtFine_labelTrainIds.png" for i in (0, 1))
    assert np.array_equal(Image.open(first), [[10, 10]]) and np.array_equal(Image.open(second), [[1, 1]])
    save(first, [[3, 3]])
    write_missing_train_ids(tmp_path, workers=1)
    assert np.array_equal(Image.open(first), [[3, 3]])


def test_train_ids_are_written_again_when_the_table_changes(tmp_path):
    save(tmp_path / "leftImg8bit/val/a/a_0_0_leftImg8bit.png", np.zeros((1, 4, 3)))
    label_ids = save(tmp_path / "gtFine/val/a/a_0_0_gtFine_labelIds.png", [[3, 5, 4, 9]])
    train_ids = label_ids.with_name("a_0_0_gtFine_labelTrainIds.png")
    for table, expected in (
        (SMALL, [0, 0, 1, 255]),
        ([ROAD, {**PAVEMENT, "train_id": 2}, HOUSE, BONNET], [0, 2, 1, 255]),
    ):
        (tmp_path / "classes.json").write_text(json.dumps(table))
        write_missing_train_ids(tmp_path, workers=1)
        assert np.asarray(Image.open(train_ids)).tolist() == [expected]
        os.utime(train_ids, (0, 0))  # older than the next table


# ---- finding and checking --------------------------------------------------------------------------------------------


def test_split_without_images_is_named(tmp_path):
    for find in (find_images, find_samples):
        with pytest.raises(InputError) as error:
            find(tmp_path, "train")
        assert str(tmp_path / "leftImg8bit/train") in str(error.value)


def test_images_are_found_without_labels(tmp_path):
    image = save(tmp_path / IMAGE, np.zeros((2, 2, 3)))
    save(tmp_path / "leftImg8bit/train/a/a_0_0_other.png", np.zeros((2, 2, 3)))
    assert find_images(tmp_path, "train") == [image]


def test_image_without_label_is_named(tmp_path):
    save_sample(tmp_path)
    (tmp_path / LABEL).unlink()
    with pytest.raises(InputError) as error:
        find_samples(tmp_path, "train")
    assert str(tmp_path / IMAGE) in str(error.value) and str(tmp_path / LABEL) in str(error.value)


def test_label_older_than_classes_json_is_named(tmp_path):
    save_sample(tmp_path)
    save(tmp_path / LABEL.replace("labelTrainIds", "labelIds"), [[3] * 6] * 4)
    (tmp_path / "classes.json").write_text(json.dumps(SMALL))
    os.utime(tmp_path / LABEL, (0, 0))
    with pytest.raises(InputError) as error:
        find_samples(tmp_path, "train")
    assert str(tmp_path / LABEL) in str(error.value)


def test_label_of_another_size_is_named(tmp_path):
    with pytest.raises(InputError) as error:
        check_samples(save_sample(tmp_path, size=(4, 8)), 19, quiet=True)
    assert all(text in str(error.value) for text in (str(tmp_path / LABEL), "6x4", "8x4"))


@pytest.mark.parametrize("value", [19, 33, 254])
def test_label_value_that_is_not_a_class_is_named(tmp_path, value):
    samples = save_sample(tmp_path, size=(1, 3), label=[[0, 255, value]])
    with pytest.raises(InputError) as error:
        check_samples(samples, 19, quiet=True)
    assert str(tmp_path / LABEL) in str(error.value) and str(value) in str(error.value)


def test_class_counts_end_with_the_ignored_pixels(tmp_path):
    samples = save_sample(tmp_path, size=(1, 4), label=[[0, 18, 18, 255]])
    expected = [1, *[0] * 17, 2, 1]
    assert class_counts(samples[0], 19) == expected
    assert check_samples(samples * 3, 19, quiet=True).tolist() == [expected] * 3


def test_unreadable_folder_is_named():
    is_root = os.geteuid() == 0  # root may read everything, so become nobody for a moment
    with tempfile.TemporaryDirectory(dir="/tmp" if is_root else None) as root:
        root = Path(root)
        save_sample(root)
        root.chmod(0o755)
        city = root / "leftImg8bit/train/a"
        city.chmod(0)
        try:
            if is_root:
                os.seteuid(65534)
            with pytest.raises(PermissionError) as error:
                find_samples(root, "train")
        finally:
            if is_root:
                os.seteuid(0)
            city.chmod(0o755)
        assert str(city) in str(error.value)
