"""Reading images and labels, packed copies, data sets, and the order of training."""

import itertools
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ocrnet.data.datasets import EvalDataset, InfiniteSampler, TrainDataset
from ocrnet.data.images import count_frames, read_frames, read_image, read_label, to_tensor
from ocrnet.data.layout import find_samples
from ocrnet.data.packed import is_packed, pack_samples, packed_path
from ocrnet.data.transforms import NO_CHANGE
from ocrnet.errors import InputError

# ---- images and labels -----------------------------------------------------------------------------------------------


@pytest.fixture
def noise(tmp_path):
    """The path of an image of random pixels."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    return tmp_path / "x.png"


@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "middle", "text", "absent", "bomb"])
def test_damaged_image_is_named(noise, damage, monkeypatch):
    content = noise.read_bytes()
    if damage == "truncated":
        noise.write_bytes(content[:500])
    elif damage == "empty":
        noise.write_bytes(b"")
    elif damage == "header":
        noise.write_bytes(content[:16] + b"\0" * 17 + content[33:])
    elif damage == "middle":
        noise.write_bytes(content[:60] + bytes(255 - b for b in content[60:400]) + content[400:])
    elif damage == "text":
        noise.write_text("not an image")
    elif damage == "absent":
        noise.unlink()
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError) as error:
        read_image(noise)
    assert str(noise) in str(error.value)


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


def test_images_are_rotated_as_their_exif_orientation_says(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right side
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    for rows in (None, 2):
        assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", rows)), np.rot90(pixels, -1))


def test_frames_of_an_animation_and_of_other_files(tmp_path):
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.jpg", format="MPO", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "c.png")
    colors = [np.asarray(frame)[0, 0].tolist() for frame in read_frames(tmp_path / "a.gif")]
    assert colors == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert [count_frames(tmp_path / name) for name in ("a.gif", "b.jpg", "c.png", "absent.png")] == [3, 1, 1, 1]
    assert len(list(read_frames(tmp_path / "b.jpg"))) == 1
    noise = [Image.effect_noise((40, 30), sigma) for sigma in (20, 40, 60)]
    noise[0].save(tmp_path / "d.png", save_all=True, append_images=noise[1:])
    (tmp_path / "d.png").write_bytes((tmp_path / "d.png").read_bytes()[:-900])
    with pytest.raises(InputError, match=f"^{tmp_path / 'd.png'}: frame 2 "):
        list(read_frames(tmp_path / "d.png"))


def test_label_is_one_channel_of_eight_bits(tmp_path):
    values = np.array([[0, 18, 255]], np.uint8)
    palette = Image.fromarray(values)
    palette.putpalette(list(range(255, -1, -1)) * 3)
    for name, image in {"gray": Image.fromarray(values), "palette": palette}.items():
        image.save(tmp_path / f"{name}.png")
        label = read_label(tmp_path / f"{name}.png")
        assert label.mode == "L" and to_tensor(label).tolist() == values.tolist(), name
    for name, pixels in {"color": np.zeros((2, 2, 3), np.uint8), "deep": np.zeros((2, 2), np.uint16)}.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        with pytest.raises(InputError) as error:
            read_label(tmp_path / f"{name}.png")
        assert f"{name}.png" in str(error.value)


def test_only_the_first_rows_are_decoded(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for name in ("a.png", "a.bmp"):
        Image.fromarray(pixels).save(tmp_path / name)
        assert np.array_equal(np.asarray(read_image(tmp_path / name, rows=25))[:25], pixels[:25])
    assert not np.asarray(read_image(tmp_path / "a.png", rows=25))[25:].any()


# ---- packed copies ---------------------------------------------------------------------------------------------------


def test_packed_copies_give_the_same_crops(data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    samples = find_samples(tmp_path, "train")
    keys = [(epoch, i) for epoch in range(3) for i in range(len(samples))]
    dataset = TrainDataset(samples, (32, 64), 0)
    before = [dataset[key] for key in keys]
    pack_samples(samples, workers=1)
    assert all(is_packed(path) for sample in samples for path in sample)
    for key, item in zip(keys, before):
        assert all(torch.equal(a, b) for a, b in zip(dataset[key], item))
    packed = packed_path(samples[0].image)
    np.save(packed, np.load(packed) * 0 + 7)
    assert (dataset[0, 0][0] == 7).all()  # the copy is what is read
    os.utime(packed, (0, 0))
    assert torch.equal(dataset[0, 0][0], before[0][0])  # but not one that is older than the image
    packed.write_bytes(b"text")
    with pytest.raises(InputError) as error:
        dataset[0, 0]
    assert str(packed) in str(error.value)


# ---- data sets -------------------------------------------------------------------------------------------------------


def test_crop_depends_only_on_seed_epoch_and_index(data):
    samples = find_samples(data, "train")
    first, second = TrainDataset(samples, (32, 64), 0), TrainDataset(samples, (32, 64), 0)
    for i in (3, 1, 2):
        first[0, i]
    assert all(torch.equal(a, b) for a, b in zip(first[1, 4], second[1, 4]))
    twice = TrainDataset([samples[4]] * 6, (32, 64), 0)  # another index of the same image
    for other in (second[2, 4], twice[1, 3], TrainDataset(samples, (32, 64), 1)[1, 4]):
        assert not torch.equal(first[1, 4][0], other[0])


def test_training_item_is_image_label_and_distortion(data):
    samples = find_samples(data, "train")
    image, label, photometric = TrainDataset(samples, (32, 64), 0)[0, 0]
    assert (image.shape, label.shape, photometric.shape) == ((3, 32, 64), (32, 64), (5,))
    assert (image.dtype, label.dtype, photometric.dtype) == (torch.uint8, torch.uint8, torch.float32)
    plain = TrainDataset(samples, (32, 64), 0, color_jitter=False)
    assert all(plain[0, i][2].tolist() == list(NO_CHANGE) for i in range(len(plain)))
    assert torch.equal(plain[0, 0][0], image) and torch.equal(plain[0, 0][1], label)
    drawn = {tuple(TrainDataset(samples, (32, 64), 0)[0, i][2].tolist()) for i in range(len(samples))}
    assert len(drawn) > 1


def test_evaluation_reads_whole_images(data):
    samples = find_samples(data, "val")
    dataset = EvalDataset(samples)
    image, label = dataset[2]
    assert len(dataset) == 5 and image.dtype == label.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0), Image.open(samples[2].image))
    assert np.array_equal(label, Image.open(samples[2].label))


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
