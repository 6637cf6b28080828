"""Crops, photometric distortion and normalization."""

import colorsys
import random

import numpy as np
import pytest
import torch
from PIL import Image

from ocrnet.data.transforms import crop_image, photometric_distortion, preprocess, sample_crop, sample_photometric


def assert_uniform(x, low, high):
    """Numbers fill a range up to its ends, with about a tenth of them in each tenth."""
    assert low <= x.min() < 0.99 * low + 0.01 * high and 0.01 * low + 0.99 * high < x.max() <= high
    assert abs(np.histogram(x, 10, (low, high))[0] / len(x) - 0.1).max() < 0.03


def test_crop_is_the_box_of_image_and_label_resized_without_antialiasing():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8))
    label = np.random.default_rng(1).integers(0, 19, (64, 128), dtype=np.uint8)
    for seed in range(20):
        params, classes = sample_crop(label, (32, 64), random.Random(seed), (0.5, 2.0))
        box = slice(params.top, params.top + params.height), slice(params.left, params.left + params.width)
        part = torch.tensor(np.asarray(image)[box]).permute(2, 0, 1)[None].double()
        expected = torch.nn.functional.interpolate(part, size=(32, 64), mode="bilinear")[0]
        expected = expected.flip(2) if params.flip else expected
        crop = crop_image(image, params, (32, 64))
        assert abs(crop - expected).max() <= 1 and abs(params.width - 2 * params.height) <= 1
        rows, columns = np.arange(32) * params.height // 32, np.arange(64) * params.width // 64
        values = label[box][rows[:, None], columns]
        assert np.array_equal(classes, values[:, ::-1] if params.flip else values)


def test_scale_and_position_are_uniform_and_half_of_the_crops_are_flipped():
    label = (np.indices((1000, 60)).sum(axis=0) % 2).astype(np.uint8)  # no class dominates
    params = [sample_crop(label, (500, 2), random.Random(seed), (0.5, 2.0))[0] for seed in range(1000)]
    assert_uniform(500 / np.array([x.height for x in params]), 0.5, 2)
    assert 450 < sum(x.flip for x in params) < 550
    params = np.array([sample_crop(label[:41], (8, 8), random.Random(seed), (1, 1))[0][:4] for seed in range(2000)])
    for place, last in zip(params.T, (33, 52)):
        assert set(place) == set(range(last + 1))
        assert_uniform(place, 0, last)
    assert (params[:, 2:] == 8).all()


def test_crop_dominated_by_one_class_is_sampled_again_up_to_ten_times():
    label = np.array([[0] * 100 + [1] * 28, [255] * 128], np.uint8)  # ignored pixels do not count
    crops = [sample_crop(label, (2, 32), random.Random(seed), (1, 1))[1][0] for seed in range(2000)]
    dominated = [classes.bincount().max() >= 0.75 * 32 for classes in crops]
    # of 97 positions 69 show one class, 13 more have 75 % or more of one; a crop is the last of up to eleven samples
    assert abs(np.mean(dominated) - (82 / 97) ** 11) < 0.012


@pytest.mark.parametrize("shape, scale, crop_size, size", [
    ((10, 21), 1, (32, 64), (10, 21)), ((10, 21), 0.7, (32, 64), (7, 15)), ((1, 20), 0.25, (32, 64), (1, 5)),
    ((10, 20), 2, (32, 32), (20, 32)),
])  # fmt: skip
def test_small_image_is_padded_at_the_right_and_the_bottom(shape, scale, crop_size, size):
    image, label = Image.new("RGB", shape[::-1], (9, 9, 9)), np.full(shape, 3, np.uint8)
    height, width = size
    for seed in range(6):
        params, classes = sample_crop(label, crop_size, random.Random(seed), (scale, scale))
        assert (classes[:height, :width] == 3).all() and (classes == 255).sum() == classes.numel() - height * width
        crop = crop_image(image, params, crop_size)
        assert crop.shape[1:] == classes.shape == crop_size and crop.dtype == classes.dtype == torch.uint8
        assert (crop[:, :height, :width] == 9).all()
        assert abs(preprocess(crop[None])[0, :, classes == 255]).max() < 0.01


def test_distortion_is_brightness_contrast_hsv_and_contrast_each_clipped():
    image = torch.randint(0, 256, (10, 3, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image[:, :, 0, :3] = torch.tensor([0, 128, 255])  # gray has no hue
    params = [
        (0, 1, 1, 0, 1), (0, 1, 1, 0.1, 1), (0, 1, 1, -0.1, 1), (0, 1, 0.5, 0, 1), (0, 1, 1.5, 0, 1),
        (32, 0.5, 1, 0, 1), (0, 1, 1.3, 0.07, 1), (-32, 1.5, 0.7, 0.02, 1), (9, 1.5, 1, 0, 0.5), (-9, 1, 1.2, 0, 1.5),
    ]  # fmt: skip
    changed = photometric_distortion(image.double(), torch.tensor(params, dtype=torch.float64))
    for pixels, new, (brightness, first, saturation, hue, last) in zip(image.double(), changed, params):
        pixels = ((pixels + brightness).clamp(0, 255) * first).clamp(0, 255) / 255
        for pixel, found in zip(pixels.flatten(1).T, new.flatten(1).T):
            h, s, v = colorsys.rgb_to_hsv(*pixel.tolist())
            rgb = torch.tensor(colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v), dtype=torch.float64)
            torch.testing.assert_close(found, (255 * rgb * last).clamp(0, 255), atol=1e-6, rtol=0)
    torch.testing.assert_close(preprocess(image, torch.tensor(params)), preprocess(changed), atol=1e-4, rtol=0)


def test_each_change_has_probability_one_half_and_fills_its_range():
    params = np.array([sample_photometric(random.Random(seed)) for seed in range(4000)])
    brightness, first, saturation, hue, last = params.T
    assert ((first == 1) | (last == 1)).all() and abs((first != 1).mean() - 0.25) < 0.03
    contrast = np.where(first == 1, last, first)
    ranges = (brightness, 0, -32, 32), (contrast, 1, 0.5, 1.5), (saturation, 1, 0.5, 1.5), (hue, 0, -0.1, 0.1)
    for change, neutral, low, high in ranges:
        assert abs((change != neutral).mean() - 0.5) < 0.03
        assert_uniform(change[change != neutral], low, high)


def test_images_are_normalized_with_imagenets_mean_and_std():
    image = torch.tensor([[124, 116, 104], [255, 0, 255]], dtype=torch.uint8)[:, :, None, None].repeat(1, 1, 2, 3)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    torch.testing.assert_close(preprocess(image), (image - mean) / std)
