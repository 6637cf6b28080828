"""Labels, reading, checking, cropping, colour, and the order of training."""

import colorsys
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ocrnet.data.cityscapes import (
    EndlessSampler,
    RandomCrops,
    WholeImages,
    check_samples,
    class_counts,
    find_samples,
    pack_samples,
    packed_path,
    read_photo,
    remove_unfinished,
    train_ids_from_label_ids,
    train_ids_from_polygons,
    write_missing_train_ids,
    write_whole,
)
from ocrnet.data.classes import CITYSCAPES, ClassTable, read_classes
from ocrnet.data.synthetic import street
from ocrnet.data.transforms import change_colour, cut_photo, draw_box, draw_colour, to_input
from ocrnet.errors import InputError


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)
    return path


def tree(root, photo=(4, 6, 3), label=((0,) * 6,) * 4):
    """A data set of one training picture."""
    save(root / "leftImg8bit/train/a/a_0_0_leftImg8bit.png", np.zeros(photo))
    save(root / "gtFine/train/a/a_0_0_gtFine_labelTrainIds.png", label)
    return find_samples(root, "train")


# ---- labels ----


def test_the_nineteen_train_ids_are_cityscapes():
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert CITYSCAPES.ids == ids and len(CITYSCAPES) == 19
    assert CITYSCAPES.train_id_of[ids].tolist() == list(range(19))
    assert sorted(set(CITYSCAPES.train_id_of.tolist())) == [*range(19), 255]
    assert (CITYSCAPES.names[0], CITYSCAPES.names[13], CITYSCAPES.names[18]) == ("road", "car", "bicycle")
    assert CITYSCAPES.palette[[0, 18, 255]].tolist() == [[128, 64, 128], [119, 11, 32], [0, 0, 0]]


SMALL = [
    {"name": "road", "id": 3, "train_id": 0, "color": [128, 64, 128], "category": "ground"},
    {"name": "pavement", "id": 5, "train_id": 0, "color": [1, 2, 3], "category": "ground"},
    {"name": "house", "id": 4, "train_id": 1, "color": [70, 70, 70]},
    {"name": "bonnet", "id": 9, "train_id": 255, "color": [0, 0, 0]},
]


def test_a_table_of_ones_own_merges_ignores_and_comes_back(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps(SMALL))
    table = read_classes(tmp_path)
    assert (table.names, table.ids, table.categories) == (["road", "house"], [3, 4], ["ground", "house"])
    assert table.palette[:2].tolist() == [[128, 64, 128], [70, 70, 70]]
    label_ids = save(tmp_path / "a.png", [[3, 5, 4], [9, 255, 4]])
    assert np.array_equal(train_ids_from_label_ids(label_ids, table), [[0, 0, 1], [255, 255, 1]])
    with pytest.raises(InputError, match="b.png: value 7 is no label id: expected 3, 4, 5, 9"):
        train_ids_from_label_ids(save(tmp_path / "b.png", [[7]]), table)
    assert ClassTable.from_rows(table.rows(), "again").labels == table.labels
    assert ClassTable.from_rows(CITYSCAPES.rows(), "again").labels == CITYSCAPES.labels
    assert read_classes(tmp_path / "elsewhere") is CITYSCAPES


@pytest.mark.parametrize(
    "rows, reason",
    [
        ({}, "in a list"),
        ([1], "in a list"),
        ([{"name": "road", "id": 0}], "in a list"),
        ([{**SMALL[0], "weight": 1}], "in a list"),
        ([{**SMALL[0], "color": [1, 2]}], "others up to 255"),
        ([{**SMALL[0], "color": [1, 2, 256]}], "others up to 255"),
        ([{**SMALL[0], "id": 255}], "an id below 255"),
        ([{**SMALL[0], "id": True}], "an id below 255"),
        ([{**SMALL[0], "name": 7}], "an id below 255"),
        ([SMALL[0], {**SMALL[2], "id": 3}], "'house' and 'road' have the same name or id"),
        ([SMALL[0], {**SMALL[2], "train_id": 2}], r"train ids \[0, 2\]: expected 0, 1"),
        ([SMALL[0]], "two or more"),
    ],
)
def test_a_broken_table_is_named_with_the_row(tmp_path, rows, reason):
    (tmp_path / "classes.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=f"classes.json: .*{reason}"):
        read_classes(tmp_path)


def test_a_table_that_is_no_json_is_named(tmp_path):
    (tmp_path / "classes.json").write_text("road: 0")
    with pytest.raises(InputError, match="classes.json: not JSON"):
        read_classes(tmp_path)


def test_train_ids_are_made_again_when_the_table_changes(tmp_path):
    label_ids = save(tmp_path / "gtFine/val/a/a_0_0_gtFine_labelIds.png", [[3, 5, 4, 9]])
    train_ids = label_ids.with_name("a_0_0_gtFine_labelTrainIds.png")
    for table, expected in (
        (SMALL, [0, 0, 1, 255]),
        ([*SMALL[:1], {**SMALL[1], "train_id": 2}, *SMALL[2:]], [0, 2, 1, 255]),
    ):
        (tmp_path / "classes.json").write_text(json.dumps(table))
        write_missing_train_ids(tmp_path, workers=1)
        assert np.asarray(Image.open(train_ids)).tolist() == [expected]
        os.utime(train_ids, (0, 0))  # as written long before the next table


def box(label, x0, y0, x1, y1, **more):
    return {"label": label, "polygon": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]], **more}


def test_polygons_are_drawn_in_order_with_groups_and_without_deleted_ones_and_plates(tmp_path):
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
        '{"imgHeight":3,"imgWidth":3,"objects":[{"label":"sky","polygon":[[0,0]]}]}',
        '{"imgHeight":-3,"imgWidth":3,"objects":[]}',
        '{"imgHeight":1000000,"imgWidth":1000000,"objects":[]}',  # a terabyte of train ids
        "[" * 100_000,
    ],
)
def test_a_broken_polygon_file_is_named(tmp_path, text):
    path = tmp_path / "x_polygons.json"
    path.write_text(text)
    with pytest.raises(InputError, match="x_polygons.json"):
        train_ids_from_polygons(path)


def test_label_ids_go_through_the_table_and_others_are_refused(tmp_path):
    train_ids = train_ids_from_label_ids(save(tmp_path / "a.png", [[7, 0, 33], [26, 4, 29]]))
    assert np.array_equal(train_ids, [[0, 255, 18], [13, 255, 255]])
    with pytest.raises(InputError, match="b.png: value 34"):
        train_ids_from_label_ids(save(tmp_path / "b.png", [[7, 34]]))


def test_preparation_prefers_polygons_keeps_what_is_there_and_needs_neither_twice(tmp_path):
    stem = tmp_path / "gtFine/val/a/a_0_0_gtFine_"
    save(tmp_path / "gtFine/val/a/a_0_0_gtFine_labelIds.png", [[7, 7]])
    save(tmp_path / "gtFine/val/a/a_1_0_gtFine_labelIds.png", [[8, 8]])
    annotation = {"imgHeight": 1, "imgWidth": 2, "objects": [box("sky", 0, 0, 2, 1)]}
    stem.with_name(stem.name + "polygons.json").write_text(json.dumps(annotation))
    write_missing_train_ids(tmp_path, workers=1)
    target = stem.with_name(stem.name + "labelTrainIds.png")
    assert np.array_equal(Image.open(target), [[10, 10]])
    assert np.array_equal(Image.open(str(target).replace("a_0_0", "a_1_0")), [[1, 1]])
    save(target, [[3, 3]])
    write_missing_train_ids(tmp_path, workers=1)
    assert np.array_equal(Image.open(target), [[3, 3]])


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), write_whole(tmp_path / "x.png") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# ---- finding and checking ----


def test_no_photos_and_a_photo_without_label_are_named(tmp_path):
    with pytest.raises(InputError, match="no photos"):
        find_samples(tmp_path, "train")
    tree(tmp_path)
    (tmp_path / "gtFine/train/a/a_0_0_gtFine_labelTrainIds.png").unlink()
    with pytest.raises(InputError, match="a_0_0_leftImg8bit.png.*has no label.*prepare_cityscapes.py"):
        find_samples(tmp_path, "train")


def test_sizes_that_differ_are_named(tmp_path):
    with pytest.raises(InputError, match="a_0_0_gtFine_labelTrainIds.png: is 6x4, its photo is 8x4"):
        check_samples(tree(tmp_path, photo=(4, 8, 3)), 19, quiet=True)


@pytest.mark.parametrize("value", [19, 33, 254])
def test_a_label_value_that_is_no_class_is_named(tmp_path, value):
    with pytest.raises(InputError, match=f"labelTrainIds.png: 1 pixels of value {value}"):
        check_samples(tree(tmp_path, photo=(1, 3, 3), label=[[0, 255, value]]), 19, quiet=True)


def test_class_counts_end_with_the_ignored_pixels(tmp_path):
    counts = class_counts(tree(tmp_path, photo=(1, 4, 3), label=[[0, 18, 18, 255]])[0], 19)
    assert len(counts) == 20 and counts[0] == 1 and counts[18] == 2 and counts[19] == 1


def test_a_truncated_picture_is_named(tmp_path):
    path = save(tmp_path / "x.png", np.random.default_rng(0).integers(0, 255, (40, 40, 3)))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="x.png"):
        read_photo(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="x.png"):
        read_photo(path)


@pytest.mark.parametrize("damage", ["header", "middle", "text", "bomb"])
def test_a_damaged_picture_is_named(tmp_path, damage, monkeypatch):
    path = save(tmp_path / "x.png", np.random.default_rng(0).integers(0, 255, (40, 40, 3)))
    whole = path.read_bytes()
    if damage == "header":
        path.write_bytes(whole[:16] + b"\0" * 17 + whole[33:])
    elif damage == "middle":
        path.write_bytes(whole[:60] + bytes(255 - b for b in whole[60:400]) + whole[400:])
    elif damage == "text":
        path.write_text("not a picture")
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="x.png"):
        read_photo(path)


def test_a_folder_that_may_not_be_read_is_named():
    is_root = os.geteuid() == 0  # who may read everything: be nobody for a moment, in a folder that nobody may enter
    with tempfile.TemporaryDirectory(dir="/tmp" if is_root else None) as root:
        root = Path(root)
        tree(root)
        root.chmod(0o755)
        city = root / "leftImg8bit/train/a"
        city.chmod(0)
        try:
            if is_root:
                os.seteuid(65534)
            with pytest.raises(PermissionError, match="leftImg8bit/train/a"):
                find_samples(root, "train")
        finally:
            if is_root:
                os.seteuid(0)
            city.chmod(0o755)


def test_photos_of_any_mode_become_rgb(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pictures = {
        "grey": Image.fromarray(grey),
        "palette": Image.fromarray(grey).convert("RGB").quantize(256),
        "rgba": Image.fromarray(grey).convert("RGBA"),
        "deep": Image.fromarray(grey.astype(np.uint16) * 257),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
        photo = np.asarray(read_photo(tmp_path / f"{name}.png")).astype(int)
        assert photo.shape == (16, 16, 3) and abs(photo - grey[..., None]).max() <= 1, name


# ---- crops ----


def random_crop(photo, label, crop, *args):
    """-> (h, w, 3) and (h, w), int"""
    box, classes = draw_box(np.asarray(label), crop, *args)
    return cut_photo(photo, box, crop).permute(1, 2, 0).numpy().astype(int), classes.numpy().astype(int)


def gradient(height=64, width=128):
    """A photo whose red and green say where each pixel is, and a label cut into quarters."""
    y, x = np.mgrid[:height, :width]
    photo = np.stack([x * 255 // width, y * 255 // height, 0 * x], 2).astype(np.uint8)
    return Image.fromarray(photo), Image.fromarray(((x * 2 // width) + 2 * (y * 2 // height)).astype(np.uint8))


def test_photo_and_label_are_cut_at_one_place():
    photo, label = gradient()
    for seed in range(50):
        crop, classes = random_crop(photo, label, (32, 64), random.Random(seed))
        inside = classes != 255
        expected = (crop[..., 0] >= 128) + 2 * (crop[..., 1] >= 128)
        wrong = (expected != classes) & inside & (abs(crop[..., :2] - 128) > 6).all(2)
        assert crop.shape == (32, 64, 3) and not wrong.any()


def test_a_crop_is_the_part_resized_between_the_four_nearest_pixels():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8))
    label = Image.fromarray(np.random.default_rng(1).integers(0, 19, (64, 128), dtype=np.uint8))
    for seed in range(20):
        box, classes = draw_box(np.asarray(label), (32, 64), random.Random(seed))
        inside = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        part = torch.tensor(np.asarray(photo)[inside]).permute(2, 0, 1)[None].double()
        expected = torch.nn.functional.interpolate(part, size=(32, 64), mode="bilinear")[0]
        expected = expected.flip(2) if box.mirrored else expected
        assert abs(cut_photo(photo, box, (32, 64)) - expected).max() <= 1
        assert torch.equal(cut_photo(photo, box, (32, 64)), cut_photo(np.asarray(photo), box, (32, 64)))
        values = np.asarray(label)[inside]
        rows, columns = np.arange(32) * box.height // 32, np.arange(64) * box.width // 64
        values = values[rows[:, None], columns]
        assert np.array_equal(classes, values[:, ::-1] if box.mirrored else values)


def test_scale_is_uniform_and_flips_are_even():
    photo, label = gradient()
    scales, flips = [], 0
    for seed in range(400):
        crop, _ = random_crop(photo, label, (32, 64), random.Random(seed))
        red = crop[0, :32, 0]
        slope = (red[20] - red[5]) / 15
        flips += slope < 0
        scales.append(255 / 128 / abs(slope))
    assert 160 < flips < 240
    assert 0.45 < min(scales) < 0.6 and 1.85 < max(scales) < 2.2 and abs(np.mean(scales) - 1.25) < 0.07


def test_a_place_with_too_much_of_one_class_is_drawn_again():
    label = Image.fromarray(np.repeat(np.array([[0] * 100 + [1] * 28], np.uint8), 64, 0))
    photo = Image.new("RGB", label.size)

    def share_of_plain_crops(max_share):
        plain = 0
        for seed in range(200):
            _, classes = random_crop(photo, label, (32, 32), random.Random(seed), (1, 1), max_share)
            plain += max(np.bincount(classes.ravel())[:2]) > 0.75 * 32 * 32
        return plain / 200

    # of 97 places 69 show one class alone, 11 more have over 75 % of one; eleven draws
    assert abs(share_of_plain_crops(2.0) - 11 / 28) < 0.1
    assert abs(share_of_plain_crops(0.75) - (80 / 97) ** 11) < 0.07


def test_a_small_picture_is_padded_right_and_below():
    photo, label = Image.new("RGB", (20, 10), (9, 9, 9)), Image.new("L", (20, 10), 3)
    for seed in range(6):
        crop, classes = random_crop(photo, label, (32, 64), random.Random(seed), (1, 1))
        assert (classes[:10, :20] == 3).all() and (classes == 255).sum() == 32 * 64 - 200
        assert (crop[:10, :20] == 9).all() and abs(
            to_input(torch.tensor(crop[20, 30])[None, :, None, None])
        ).max() < 0.01
        _, classes = random_crop(photo, label, (32, 32), random.Random(seed), (2, 2))  # narrower than the picture
        assert (classes[:20] == 3).all() and (classes[20:] == 255).all()


def test_only_the_rows_asked_for_are_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for name in ("a.png", "a.bmp"):
        Image.fromarray(pixels).save(tmp_path / name)
        assert np.array_equal(np.asarray(read_photo(tmp_path / name, rows=25))[:25], pixels[:25])
    assert not np.asarray(read_photo(tmp_path / "a.png", rows=25))[25:].any()


def test_packed_pictures_give_the_same_crops_from_their_own_pixels(data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    samples = find_samples(tmp_path, "train")
    keys = [(epoch, i) for epoch in range(3) for i in range(len(samples))]
    crops = RandomCrops(samples, (32, 64), 0)
    before = [crops[key] for key in keys]
    pack_samples(samples, workers=1)
    for key, crop in zip(keys, before):
        assert all(torch.equal(a, b) for a, b in zip(crops[key], crop))
    packed = packed_path(samples[0].photo)
    np.save(packed, np.load(packed) * 0 + 7)
    assert (crops[0, 0][0] == 7).all()  # it is what is read
    os.utime(packed, (0, 0))
    assert torch.equal(crops[0, 0][0], before[0][0])  # not one that is older than the photo
    packed.write_bytes(b"text")
    with pytest.raises(InputError, match="not a packed picture"):
        crops[0, 0]


def test_a_crop_depends_on_seed_epoch_and_picture_alone(data):
    samples = find_samples(data, "train")
    first, second = RandomCrops(samples, (32, 64), 0), RandomCrops(samples, (32, 64), 0)
    for i in (3, 1, 2):
        first[0, i]
    assert all(torch.equal(a, b) for a, b in zip(first[1, 4], second[1, 4]))
    for other in (second[2, 4], RandomCrops(samples, (32, 64), 1)[1, 4]):
        assert not torch.equal(first[1, 4][0], other[0])


def test_whole_images_are_untouched(data):
    sample = find_samples(data, "val")[2]
    photo, label = WholeImages(find_samples(data, "val"))[2]
    assert np.array_equal(photo.permute(1, 2, 0), Image.open(sample.photo))
    assert np.array_equal(label, Image.open(sample.label))


# ---- colour ----


def test_no_change_is_no_change():
    photo = torch.randint(0, 256, (2, 3, 8, 8)).double()
    torch.testing.assert_close(change_colour(photo, torch.tensor([[0, 1, 1, 0, 1]] * 2).double()), photo)


@pytest.mark.parametrize("hue, saturation", [(0.1, 1.0), (-0.1, 1.0), (0.0, 0.5), (0.0, 1.5), (0.07, 1.3)])
def test_hue_and_saturation_are_those_of_hsv(hue, saturation):
    photo = torch.randint(0, 256, (1, 3, 6, 6), generator=torch.Generator().manual_seed(0)).double()
    photo[0, :, 0, 0] = 128  # grey has no hue
    changed = change_colour(photo, torch.tensor([[0, 1, saturation, hue, 1]], dtype=torch.float64))
    for y in range(6):
        for x in range(6):
            h, s, v = colorsys.rgb_to_hsv(*(photo[0, :, y, x] / 255).tolist())
            expected = 255 * torch.tensor(
                colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v), dtype=photo.dtype
            )
            torch.testing.assert_close(changed[0, :, y, x], expected, atol=1e-6, rtol=0)


def test_brightness_and_contrast_are_clipped_in_order():
    photo = torch.full((1, 3, 1, 1), 250.0)
    assert change_colour(photo, torch.tensor([[20.0, 0.5, 1, 0, 1]])).unique().item() == 127.5
    assert change_colour(photo, torch.tensor([[-10.0, 1, 1, 0, 1.5]])).unique().item() == 255


def test_each_picture_of_a_batch_has_its_own_change():
    photo = torch.full((2, 3, 2, 2), 100, dtype=torch.uint8)
    colour = torch.tensor([[10.0, 1, 1, 0, 1], [0, 1.5, 1, 0, 1]])
    assert [x.unique().item() for x in change_colour(photo.float(), colour)] == [110, 150]


def test_each_part_of_a_change_is_drawn_half_of_the_time():
    draws = np.array([draw_colour(random.Random(seed)) for seed in range(2000)])
    brightness, first, saturation, hue, last = draws.T
    for drawn in (brightness != 0, (first != 1) | (last != 1), saturation != 1, hue != 0):
        assert abs(drawn.mean() - 0.5) < 0.05
    assert not ((first != 1) & (last != 1)).any() and abs((first != 1).mean() - 0.25) < 0.05
    assert abs(brightness).max() <= 32 and abs(hue).max() <= 0.1
    assert draws[:, [1, 2, 4]].min() >= 0.5 and draws[:, [1, 2, 4]].max() <= 1.5


def test_input_is_normalised_with_imagenets_mean_and_std():
    photo = torch.tensor([124, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(124 - 123.675) / 58.395, (116 - 116.28) / 57.12, (104 - 103.53) / 57.375]
    torch.testing.assert_close(to_input(photo).flatten(), torch.tensor(expected))


# ---- order ----


def take(sampler, count):
    return [key for key, _ in zip(sampler, range(count))]


def test_every_epoch_shows_each_picture_once_in_a_new_order():
    keys = take(EndlessSampler(10, seed=0), 30)
    epochs = [[index for e, index in keys if e == epoch] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_global_batch_also_across_epochs(world_size):
    alone = take(EndlessSampler(10, seed=0), 40)
    ranks = [take(EndlessSampler(10, 0, rank, world_size), 40 // world_size) for rank in range(world_size)]
    batch = 4 // world_size
    for step in range(10):
        together = [key for keys in ranks for key in keys[step * batch : (step + 1) * batch]]
        assert sorted(together) == sorted(alone[step * 4 : step * 4 + 4])


def test_an_order_can_be_taken_up_anywhere():
    assert take(EndlessSampler(10, seed=3, start=17), 8) == take(EndlessSampler(10, seed=3), 25)[17:]


# ---- generated streets ----


def test_generated_streets_come_from_the_seed():
    (a, first), (b, second), (c, _) = (street(np.random.default_rng([0, 1, i])) for i in (5, 5, 6))
    assert np.array_equal(a, b) and first == second and not np.array_equal(a, c)


def test_generated_streets_hold_all_classes_and_every_oddity_of_the_annotation(data):
    split = find_samples(data, "train") + find_samples(data, "val")
    assert (check_samples(split, 19, quiet=True).sum(0) > 0).all()
    objects = [item for i in range(30) for item in street(np.random.default_rng(i))[1]["objects"]]
    labels = {item["label"] for item in objects}
    assert {"persongroup", "license plate", "ego vehicle", "rail track"} <= labels
    assert any(item.get("deleted") for item in objects)


def test_greys_and_paints_are_shared_so_that_colour_alone_does_not_tell(data):
    """Mean colours of a class spread more within it than between it and the class it shares its colours with."""
    means = {k: [] for k in range(19)}
    for i in range(40):
        photo, annotation = street(np.random.default_rng([9, i]))
        path = data.parent / "colour_polygons.json"
        path.write_text(json.dumps(annotation))
        photo, classes = np.asarray(photo).astype(float), np.asarray(train_ids_from_polygons(path))
        for k in means:
            if (classes == k).sum() > 30:
                means[k].append(photo[classes == k].mean(0))
    for a, b in [("road", "sidewalk"), ("building", "wall"), ("wall", "fence"), ("bus", "truck"), ("car", "bus")]:
        x, y = (np.array(means[CITYSCAPES.names.index(name)]) for name in (a, b))
        between = np.linalg.norm(x.mean(0) - y.mean(0))
        assert between < min(np.linalg.norm(x.std(0)), np.linalg.norm(y.std(0))), (a, b)


def test_only_what_a_killed_write_left_is_removed(tmp_path):
    for name in ("a.png.part123", "gtFine.part1.rar", "b.png", "c.part"):
        (tmp_path / name).write_text("")
    remove_unfinished(tmp_path.glob("*.part*"))
    assert {path.name for path in tmp_path.iterdir()} == {"gtFine.part1.rar", "b.png", "c.part"}
