"""Finding and reading the files of a data set, data sets, and the order of training."""

import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_classes import ROWS

from ocrnet import InputError
from ocrnet.data.classes import CITYSCAPES, ClassTable
from ocrnet.data.datasets import (
    EvalDataset,
    InfiniteSampler,
    TrainDataset,
    find_images,
    find_samples,
    list_files,
    read_image,
    read_label,
)
from ocrnet.data.transforms import NO_CHANGE

LABEL = [[0, 1, 1, 0], [1, 0, 0, 1]]  # train ids
TABLE = ClassTable.from_rows(ROWS, "x")


def save(path, pixels, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    (image.convert(mode) if mode else image).save(path, **options)
    return path


# ---- finding files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """A data set in the plain layout: a training image per kind of label, and a validation image."""
    (tmp_path / "classes.json").write_text(json.dumps(ROWS))
    label, image = np.array(LABEL), np.zeros((2, 4, 3))
    colors = np.array([row["color"] for row in ROWS])
    save(tmp_path / "images/train/a.jpg", image)
    save(tmp_path / "labels/train/a.png", 255 * label)
    save(tmp_path / "images/train/day/b.c.JPEG", image)
    save(tmp_path / "labels/train/day/b.c.png", colors[label])
    save(tmp_path / "images/train/day/d.PNG", image)
    save(tmp_path / "labels/train/day/d.png", colors[label], "RGBA")
    save(tmp_path / "images/val/a.tif", image)
    save(tmp_path / "labels/val/a.png", 9 * label)
    (tmp_path / "images/train/._a.jpg").write_bytes(b"what macOS leaves beside a file")
    return tmp_path


def test_images_and_labels_of_the_plain_layout_are_found_and_mapped(root):
    samples = find_samples(root, "train")
    names = [str(image.relative_to(root / "images/train")) for image, _ in samples]
    assert names == ["a.jpg", "day/b.c.JPEG", "day/d.PNG"]
    for sample in [*samples, *find_samples(root, "val")]:
        assert read_label(sample.label, TABLE).tolist() == LABEL


def test_without_folders_of_splits_a_fifth_is_for_validation_by_name(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps(ROWS))
    for i in range(60):
        name = os.fsdecode(b"stra\xdfe") if i == 0 else i  # a name that is no UTF-8, as old zips have
        save(tmp_path / f"images/day/{name}.jpg", np.zeros((2, 4, 3)))
        save(tmp_path / f"labels/day/{name}.png", np.zeros((2, 4)))
        if i == 39:
            before = {split: find_samples(tmp_path, split) for split in ("train", "val")}
    for split, samples in before.items():
        assert set(samples) < set(find_samples(tmp_path, split))
    assert len(before["train"]) + len(before["val"]) == 40 and 4 <= len(before["val"]) <= 12
    with pytest.raises(InputError, match="^--split test: "):
        find_samples(tmp_path, "test")
    shutil.rmtree(tmp_path / "images")
    save(tmp_path / "images/0.jpg", np.zeros((2, 4, 3)))
    with pytest.raises(InputError, match=f"^{tmp_path / 'images'}: none of 1 .*val"):
        find_samples(tmp_path, "val")


def test_reading_writes_nothing(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    dataset = TrainDataset(find_samples(root, "train"), TABLE, (32, 32), 0)
    assert len([dataset[0, i] for i in range(3)]) == 3
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_files_of_cityscapes_are_found_with_label_ids_before_train_ids(data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    first, second, *_ = find_samples(tmp_path, "val")
    assert first.label.name.endswith("_gtFine_labelIds.png")
    train_ids = read_label(first.label, CITYSCAPES)
    other = first.label.with_name(first.label.name.replace("labelIds", "labelTrainIds"))
    save(other, 0 * train_ids)
    assert find_samples(tmp_path, "val")[0] == first
    first.label.unlink()
    save(other, train_ids)
    assert find_samples(tmp_path, "val")[0].label == other
    assert np.array_equal(read_label(other, CITYSCAPES), train_ids)  # not mapped a second time
    save(other, 0 * train_ids + 19)
    with pytest.raises(InputError, match=f"^{other}: 100.*19"):
        read_label(other, CITYSCAPES)
    other.unlink()
    with pytest.raises(InputError, match=f"^{first.image}: .*{first.label}"):
        find_samples(tmp_path, "val")


@pytest.mark.parametrize("damage", ["no images", "no classes", "two of one name"])
def test_a_data_set_that_cannot_be_read_is_named(root, damage):
    if damage == "no images":
        shutil.rmtree(root / "images/train")
    elif damage == "no classes":
        (root / "classes.json").unlink()
    else:
        save(root / "images/train/a.png", np.zeros((2, 4, 3)))
    named = {"no images": root / "images/train", "no classes": root / "classes.json"}
    with pytest.raises(InputError, match=f"^{named.get(damage, root / 'images/train/a.png')}: "):
        find_samples(root, "train")


def test_links_are_followed_also_in_circles_and_pipes_are_left_out(root, tmp_path):
    (root / "images/train/link").symlink_to(root / "images/train/day")
    (root / "images/train/circle").symlink_to(root / "images")
    os.mkfifo(root / "images/train/pipe.png")
    names = [path.name for path in list_files(root / "images/train")]
    assert sorted(set(names)) == ["a.jpg", "a.tif", "b.c.JPEG", "d.PNG"] and len(names) < 6


# ---- images and labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "middle", "text", "absent", "bomb"])
def test_damaged_image_is_named(tmp_path, damage, monkeypatch):
    path = save(tmp_path / "x.png", np.random.default_rng(0).integers(0, 255, (40, 40, 3)))
    content = path.read_bytes()
    damaged = {
        "truncated": content[:500],
        "empty": b"",
        "header": content[:16] + b"\0" * 17 + content[33:],
        "middle": content[:60] + bytes(255 - b for b in content[60:400]) + content[400:],
        "text": b"not an image",
    }
    path.write_bytes(damaged.get(damage, content))
    if damage == "absent":
        path.unlink()
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=f"^{path}: "):
        read_image(path)


def test_images_of_any_mode_become_rgb(tmp_path):
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    images = {
        "gray": Image.fromarray(gray),
        "palette": Image.fromarray(gray).convert("RGB").quantize(256),
        "rgba": Image.fromarray(gray).convert("RGBA"),
        "deep": Image.fromarray(gray.astype(np.uint16) * 257),
    }
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        rgb = np.asarray(read_image(tmp_path / f"{name}.png")).astype(int)
        assert rgb.shape == (16, 16, 3) and abs(rgb - gray[..., None]).max() <= 1, name


def test_an_image_of_floats_is_refused(tmp_path):
    Image.fromarray(np.random.default_rng(0).random((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=f"^{tmp_path / 'x.tif'}: .*F"):
        read_image(tmp_path / "x.tif")


def test_images_and_labels_are_rotated_as_their_exif_orientation_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right side
    pixels = np.random.default_rng(0).integers(0, 2, (4, 6))
    image = save(tmp_path / "image.png", np.repeat(100 * pixels[..., None], 3, axis=2), exif=exif)
    assert np.array_equal(np.asarray(read_image(image))[..., 0], 100 * np.rot90(pixels, -1))
    label = save(tmp_path / "label.png", 9 * pixels, exif=exif)
    assert np.array_equal(read_label(label, TABLE), np.rot90(pixels, -1))


def test_the_bits_of_an_image_and_the_indices_of_a_palette_are_its_values(tmp_path):
    palette = Image.fromarray(9 * np.array(LABEL, np.uint8))
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.save(tmp_path / "palette.png")
    assert read_label(tmp_path / "palette.png", TABLE).tolist() == LABEL
    bits = ClassTable.from_rows([ROWS[0], {**ROWS[1], "id": 1}], "x")
    assert read_label(save(tmp_path / "bits.png", 255 * np.array(LABEL), "1"), bits).tolist() == LABEL


def test_a_label_of_16_bits_and_a_jpeg_are_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "deep.png")
    save(tmp_path / "lossy.png", np.zeros((2, 2)), format="JPEG")
    for name, found in (("deep.png", "I;16"), ("lossy.png", "JPEG")):
        with pytest.raises(InputError, match=f"^{tmp_path / name}: .*{found}"):
            read_label(tmp_path / name, TABLE)


def test_a_palette_and_equal_channels_are_ids_or_colors(tmp_path):
    colors = np.array([row["color"] for row in ROWS], np.uint8)[LABEL]
    for number in (2, 200):  # palettes in another order
        image = Image.fromarray(np.array(LABEL, np.uint8) * number + 20)
        palette = np.zeros((256, 3), np.uint8)
        palette[[20, number + 20]] = colors[0, 0], colors[0, 1]
        image.putpalette(palette.tobytes())
        image.save(tmp_path / "x.png")
        assert read_label(tmp_path / "x.png", TABLE).tolist() == LABEL
    save(tmp_path / "gray.png", 9 * np.array(LABEL)[..., None].repeat(3, axis=2))
    assert read_label(tmp_path / "gray.png", TABLE).tolist() == LABEL
    mask = ClassTable.from_rows([ROWS[0], {"name": "x", "id": 1, "train_id": 1, "color": [255] * 3}], "x")
    save(tmp_path / "mask.png", 255 * np.array(LABEL)[..., None].repeat(3, axis=2))
    assert read_label(tmp_path / "mask.png", mask).tolist() == LABEL


# ---- data sets -------------------------------------------------------------------------------------------------------


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
    assert all(plain[0, i][2].tolist() == list(NO_CHANGE) for i in range(len(plain)))
    assert torch.equal(plain[0, 0][0], image) and torch.equal(plain[0, 0][1], label)
    assert len({tuple(dataset[0, i][2].tolist()) for i in range(len(samples))}) > 1


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
    assert find_images(root, "val")


# ---- order -----------------------------------------------------------------------------------------------------------


def take(sampler, count):
    return list(itertools.islice(sampler, count))


def test_every_epoch_has_each_image_once_in_a_new_order():
    keys = take(InfiniteSampler(10, seed=0), 30)
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


def test_order_can_start_anywhere():
    assert take(InfiniteSampler(10, seed=3, start=17), 8) == take(InfiniteSampler(10, seed=3), 25)[17:]
