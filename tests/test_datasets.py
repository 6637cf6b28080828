"""Finding and reading the files of a data set, data sets, and the order of training."""

import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_classes import ROWS, TABLE

from ocrnet import InputError
from ocrnet.data import datasets
from ocrnet.data.classes import CITYSCAPES, ClassTable, Label
from ocrnet.data.datasets import EvalDataset, InfiniteSampler, TrainDataset, find_samples, read_image, read_label

LABEL = [[0, 1, 1, 0], [1, 0, 0, 1]]  # train ids


def save(path, pixels, mode=None, palette=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    if palette is not None:
        image.putpalette(np.asarray(palette, np.uint8).ravel().tolist())
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path):
    """A data set in the plain layout: a training image per kind of label, and a validation image."""
    (tmp_path / "classes.json").write_text(json.dumps(ROWS))
    label, colors = np.array(LABEL), np.array([row["color"] for row in ROWS])[LABEL]
    labels = {"a.jpg": (255 * label,), "day/b.c.JPEG": (colors,), "day/d.PNG": (colors, "RGBA")}
    for name, look in {**{f"train/{name}": x for name, x in labels.items()}, "val/a.tif": (9 * label,)}.items():
        save((tmp_path / "labels" / name).with_suffix(".png"), *look)
        save(tmp_path / "images" / name, np.zeros((2, 4, 3)))
    return tmp_path


def test_images_and_labels_of_the_plain_layout_are_found_and_mapped(root):
    samples = find_samples(root, "train")
    names = [str(image.relative_to(root / "images/train")) for image, _ in samples]
    assert names == ["a.jpg", "day/b.c.JPEG", "day/d.PNG"]
    for sample in [*samples, *find_samples(root, "val")]:
        assert read_label(sample.label, TABLE).tolist() == LABEL


@pytest.mark.parametrize("made, used", [
    (["images/"], "images"), (["images/", "leftImg8bit"], "images"), (["images/", "images/val"], "images"),
    ([], "leftImg8bit/val"), (["images"], "leftImg8bit/val"), (["images/", "leftImg8bit/"], "leftImg8bit/val"),
    (["images/valley/", "images/Trainstation/", "images/testing"], "images"),
    *(([f"images/{x}/"], "images/val") for x in ("train", "val", "test")),
    (["images/Val/", "images/val/"], "images/val"), (["leftImg8bit/TEST/"], ""), (["leftImg8bit/val 2/"], ""),
    *(([f"images/{x}/"], "") for x in ("Val", "VALIDATION", "valid", "val2017", "val_20", "Training", "train images")),
])  # fmt: skip
def test_a_split_has_its_name_or_is_all_images_and_folders_that_are_named_like_splits_are_refused(tmp_path, made, used):
    for name in made:
        (tmp_path / name).mkdir(parents=True) if name.endswith("/") else (tmp_path / name).touch()
    if used:
        assert datasets.split_folder(tmp_path, "val") == tmp_path / used
    else:
        with pytest.raises(InputError, match=f"^{(tmp_path / made[0]).parent}/val: .*{made[0].split('/')[1]}"):
            datasets.split_folder(tmp_path, "val")


def test_images_are_found_by_their_endings_in_any_case_through_links_but_not_hidden_ones(tmp_path):
    endings = ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".PNG", ".Jpg"
    names = [f"{i}{ending}" for i, ending in enumerate(endings)]
    for name in (*names, "x.gif", "x.txt", "png", "._0.png", ".hidden/x.png", "../../day/y.png"):
        (tmp_path / "images/val" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images/val" / name).touch()
    for name, target in (("link", "day"), ("circle", "images")):
        (tmp_path / "images/val" / name).symlink_to(tmp_path / target)
    os.mkfifo(tmp_path / "images/val/pipe.png")
    found = [str(path.relative_to(tmp_path / "images/val")) for path in datasets.find_images(tmp_path, "val")]
    assert found == [*names, "link/y.png"]


def test_without_folders_of_splits_a_fifth_is_for_validation_by_name(tmp_path):
    folder = tmp_path / "images"
    (folder / "day").mkdir(parents=True)
    for found in (r".*\.webp.* none among 0;", "expected images of val .* none among 1;"):
        with pytest.raises(InputError, match=f"^{folder}: {found}"):
            datasets.find_images(tmp_path, "val")
        (folder / "day/0.jpg").touch()
    for name in (os.fsdecode(b"stra\xdfe"), *range(40)):  # no UTF-8, as in old zips
        (folder / f"day/{name}.jpg").touch()
    train, val = ([*datasets.find_images(tmp_path, split)] for split in ("train", "val"))
    assert [path.stem for path in val] == ["12", "29", "31", "37", "6"]
    assert len(train) == 36 and train == sorted(train)
    with pytest.raises(InputError, match="^--split test: "):
        datasets.find_images(tmp_path, "test")


def test_files_of_cityscapes_are_found_with_label_ids_before_train_ids(data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    first = find_samples(tmp_path, "val")[0]
    save(first.image.with_name("other.png"), [[0]])
    for path in find_samples(tmp_path, "val")[1]:
        path.rename(path.with_suffix(".PNG"))
    assert [path.suffix for path in find_samples(tmp_path, "val")[1]] == [".PNG"] * 2
    assert first.label.name.endswith("_gtFine_labelIds.png")
    train_ids = read_label(first.label, CITYSCAPES)
    other = first.label.with_name(first.label.name.replace("labelIds", "labelTrainIds"))
    save(other, 0 * train_ids)
    assert find_samples(tmp_path, "val")[0] == first
    first.label.unlink()
    save(other, train_ids, palette=CITYSCAPES.palette[[18, *range(18), *range(19, 256)]])  # colors that do not count
    assert find_samples(tmp_path, "val")[0].label == other
    assert np.array_equal(read_label(other, CITYSCAPES), train_ids)  # not mapped a second time
    save(other, 0 * train_ids + 19)
    with pytest.raises(InputError, match=f"^{other}: 100.*19"):
        read_label(other, CITYSCAPES)
    other.unlink()
    with pytest.raises(InputError, match=f"^{first.image}: .*{first.label}"):
        find_samples(tmp_path, "val")


def test_a_data_set_that_cannot_be_read_is_named(root):
    for name, damage in (("images/train/a.PNG", lambda path: save(path, [[0]])), ("images/train", shutil.rmtree)):
        damage(root / name)
        with pytest.raises(InputError, match=f"^{root / name}: "):
            find_samples(root, "train")


def test_damaged_absent_and_gigantic_images_are_named(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png", np.random.default_rng(0).integers(0, 255, (40, 40, 3)))
    whole, jpeg = path.read_bytes(), save(tmp_path / "x.jpg", np.zeros((40, 40))).read_bytes()
    middle = whole[:60] + bytes(255 - b for b in whole[60:400]) + whole[400:]
    header = whole[:16] + b"\0" * 17 + whole[33:]
    for content in (b"", b"not an image", whole[:500], header, middle, jpeg[:-20], None, whole):
        path.write_bytes(content) if content is not None else path.unlink()
        if content == whole:
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(InputError, match=f"^{path}: {'' if path.exists() else 'no such file'}"):
            read_image(path)


def test_images_of_any_mode_become_rgb(tmp_path):
    gray = np.arange(256).reshape(16, 16)
    deep = (gray * 257 + np.array([-128, 128] * 8)).clip(0, 65535)  # rounds to gray
    save(tmp_path / "gray.png", gray)
    save(tmp_path / "palette.png", gray, palette=np.arange(256).repeat(3))
    save(tmp_path / "rgba.png", np.stack([gray, gray, gray, 0 * gray], axis=2))
    for name, pixels in (("deep", deep), ("negative", deep - 300 * (gray == 0)), ("wide", gray)):
        Image.fromarray(pixels.astype(np.int32)).save(tmp_path / f"{name}.tif")
        Image.fromarray(pixels.clip(0).astype(np.uint16)).save(tmp_path / f"{name}.png")
    for path in tmp_path.iterdir():
        image = read_image(path)
        assert image.mode == "RGB" and (np.asarray(image) == gray[..., None]).all(), path


def test_images_and_labels_are_rotated_as_their_exif_orientation_says(tmp_path):
    exif, rotated = Image.Exif(), np.rot90(LABEL, -1)
    exif[0x0112] = 6  # the camera was turned: the first row is the right side
    path = save(tmp_path / "x.png", 9 * np.array(LABEL), exif=exif)
    assert np.array_equal(read_label(path, TABLE), rotated)
    assert np.array_equal(np.asarray(read_image(path))[..., 0], 9 * rotated)


def test_ids_in_one_channel_or_in_equal_ones_are_read_from_every_lossless_file(root):
    (root / "labels/val/a.png").rename(root / "labels/val/a.JPG")  # beside a label that is none
    modes = {"png": "L P LA RGB RGBA I;16", "PNG": "L", "tif": "L P LA RGB I;16 I F", "TIFF": "I", "bmp": "L P RGB"}
    for ending, mode in [(ending, mode) for ending, all_modes in modes.items() for mode in all_modes.split()]:
        label = (9 * np.array(LABEL)).astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}.get(mode, np.uint8))
        Image.fromarray(label).convert(mode).save(path := root / f"labels/val/a.{ending}")
        assert find_samples(root, "val")[0].label == path and read_label(path, TABLE).tolist() == LABEL
        path.unlink()


@pytest.mark.parametrize("kind, mode, value, saved, found", [
    ("image", "F", 1, "TIFF", "mode F"), ("image", "I", 65536, "TIFF", "mode I"), ("label", "I;16", 256, "PNG", "256"),
    ("label", "I", -1, "TIFF", "-1"), ("label", "F", 0.5, "TIFF", "0.5"), ("label", "CMYK", 0, "TIFF", "mode CMYK"),
    ("label", "L", 0, "JPEG", "JPEG"),
])  # fmt: skip
def test_a_mode_or_a_format_that_cannot_hold_the_values_is_refused(tmp_path, kind, mode, value, saved, found):
    Image.new(mode, (2, 2), value).save(tmp_path / "x", saved)
    with pytest.raises(InputError, match=f"^{tmp_path / 'x'}: .* found .*{found}"):
        read_image(tmp_path / "x") if kind == "image" else read_label(tmp_path / "x", TABLE)


def test_a_palette_and_equal_channels_are_ids_or_colors_and_bits_are_ids(tmp_path):
    label = np.array(LABEL)
    bits = ClassTable([Label("a", 0, 0, (1, 1, 1)), Label("b", 1, 1, (2, 2, 2)), Label("c", 255, 2, (3, 3, 3))])
    assert read_label(save(tmp_path / "bits.png", 255 * label, "1"), bits).tolist() == LABEL
    reverse = np.arange(256)[::-1].repeat(3)  # colors that are not in the table
    assert read_label(save(tmp_path / "palette.png", 9 * label, palette=reverse), TABLE).tolist() == LABEL
    for number in (2, 200):  # palettes in another order
        palette = np.zeros((256, 3), np.uint8)
        palette[[20, number + 20]] = ROWS[0]["color"], ROWS[1]["color"]
        assert read_label(save(tmp_path / "x.png", label * number + 20, palette=palette), TABLE).tolist() == LABEL
    swapped = ClassTable([Label("a", 0, 0, (1, 1, 1)), Label("b", 1, 1, (0, 0, 0))])
    ramp = np.arange(4).repeat(3)  # a palette of grays has no colors
    assert read_label(save(tmp_path / "ramp.png", label, palette=ramp), swapped).tolist() == LABEL
    gray = label[..., None].repeat(3, axis=2)
    assert read_label(save(tmp_path / "gray.png", 9 * gray), TABLE).tolist() == LABEL
    mask = ClassTable([Label("a", 0, 0, (0, 0, 0)), Label("b", 1, 1, (255, 255, 255))])
    assert read_label(save(tmp_path / "mask.png", 255 * gray), mask).tolist() == LABEL


def test_pixels_are_counted_by_class_and_sizes_are_medians(root, tmp_path, capsys):
    assert datasets.count_classes(find_samples(root, "train"), TABLE) == [12, 12] and not capsys.readouterr().err
    sizes = [(2, 4), (6, 6), (90, 8)]
    a, b, c = (datasets.Sample(save(tmp_path / f"{h}.png", np.zeros((h, w))), None) for h, w in sizes)
    assert datasets.median_size([c, a, b]) == [6, 6] and datasets.median_size([a, b, c], count=2) == [46, 6]
    assert datasets.median_size([a, b] * 100) == datasets.median_size([a, b, b] * 67) == [2, 4]  # of about 100 images


def test_labels_without_classes_are_refused_and_classes_that_do_not_occur_are_noted(tmp_path):
    def check(*splits):
        train, val = ([samples[value] for value in values] for values in splits)
        datasets.check_labels(TrainDataset(train, table, (1, 1), 0), EvalDataset(val, table), notes.append)

    samples, notes = {x: datasets.Sample(None, save(tmp_path / f"{x}.png", [[x]])) for x in (0, 1, 2, 255)}, []
    table = ClassTable([Label(name, k, k, (k, 0, 0)) for k, name in enumerate(("sky", "sea", "sun"))])
    for train in ([0, 1, 2], [0, 1, 255], [*[0] * 61, 1]):  # the last label is not among the first that are read
        check(train, [2])
    assert [re.findall("sky|sea|sun", note) for note in notes] == [["sun"]] * 2
    for train, val, found in (([0, 255], [1], "0.png .* 0, 255: 255 is"), ([255], [1], "255.png"), ([0, 1], [255], "")):
        with pytest.raises(InputError, match=f"^{tmp_path}/{found}"):
            check(train, val)


def test_crop_depends_only_on_seed_epoch_and_index(data):
    samples = find_samples(data, "train")
    first, second = (TrainDataset(samples, CITYSCAPES, (32, 64), 0) for _ in range(2))
    for i in (3, 1, 2):
        first[0, i]
    assert all(torch.equal(a, b) for a, b in zip(first[1, 4], second[1, 4]))
    twice = TrainDataset([samples[4]] * 6, CITYSCAPES, (32, 64), 0)  # another index of the same image
    for other in (second[2, 4], twice[1, 3], TrainDataset(samples, CITYSCAPES, (32, 64), 1)[1, 4]):
        assert not torch.equal(first[1, 4][0], other[0])


def test_training_item_is_image_label_and_distortion(data):
    samples = find_samples(data, "train")
    dataset = TrainDataset(samples, CITYSCAPES, (32, 64), 0)
    image, label, photometric = dataset[0, 0]
    assert (image.shape, label.shape, photometric.shape) == ((3, 32, 64), (32, 64), (5,))
    assert (image.dtype, label.dtype, photometric.dtype) == (torch.uint8, torch.uint8, torch.float32)
    plain = TrainDataset(samples, CITYSCAPES, (32, 64), 0, color_jitter=False)
    assert all(plain[0, i][2].tolist() == [0, 1, 1, 0, 1] for i in range(len(plain)))
    assert torch.equal(plain[0, 0][0], image) and torch.equal(plain[0, 0][1], label)
    assert len({tuple(dataset[0, i][2].tolist()) for i in range(len(dataset))}) > 1 and len(dataset) == 6
    same, other = (TrainDataset(samples, CITYSCAPES, (32, 64), 0, scale, True)[0, 0] for scale in ((0.5, 2), (0.6, 2)))
    assert all(torch.equal(*pair) for pair in zip(dataset[0, 0], same)) and not torch.equal(image, other[0])


def test_evaluation_reads_whole_images(data):
    samples = find_samples(data, "val")
    dataset = EvalDataset(samples, CITYSCAPES)
    image, label = dataset[2]
    assert len(dataset) == 5 and image.dtype == label.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0), Image.open(samples[2].image))
    assert np.array_equal(label, CITYSCAPES.to_train_ids(np.asarray(Image.open(samples[2].label))))


def test_a_label_of_another_size_is_named(root):
    save(root / "labels/val/a.png", np.zeros((4, 2)))
    with pytest.raises(InputError, match=f"^{root / 'labels/val/a.png'}: .*4x2.*2x4"):
        EvalDataset(find_samples(root, "val"), TABLE)[0]


def take(sampler, count):
    return list(itertools.islice(sampler, count))


def test_every_epoch_has_each_image_once_in_a_new_order():
    keys = take(InfiniteSampler(10, seed=0), 30)
    assert take(InfiniteSampler(10, seed=0, start=17), 8) == keys[17:25]  # where a run is resumed
    epochs = [[index for e, index in keys if e == epoch] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert keys != take(InfiniteSampler(10, seed=1), 30)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_global_batch_also_across_epochs(world_size):
    alone = take(InfiniteSampler(10, seed=0), 40)
    ranks = [take(InfiniteSampler(10, 0, rank, world_size), 40 // world_size) for rank in range(world_size)]
    batch = 4 // world_size
    for step in range(10):
        together = [key for keys in ranks for key in keys[step * batch : (step + 1) * batch]]
        assert sorted(together) == sorted(alone[step * 4 : step * 4 + 4])
