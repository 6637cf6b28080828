"""Crops, photometric distortion and normalization."""

import colorsys
import random

import numpy as np
import pytest
import torch
from PIL import Image

from ocrnet.data.transforms import (
    NO_CHANGE,
    crop_image,
    photometric_distortion,
    preprocess,
    sample_crop,
    sample_photometric,
)

# ---- crops -----------------------------------------------------------------------------------------------------------


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
        assert abs(crop - expected).max() <= 1
        rows, columns = np.arange(32) * params.height // 32, np.arange(64) * params.width // 64
        values = label[box][rows[:, None], columns]
        assert np.array_equal(classes, values[:, ::-1] if params.flip else values)


def test_scale_is_uniform_and_half_of_the_crops_are_flipped():
    label = np.zeros((640, 1280), np.uint8)
    params = [sample_crop(label, (320, 640), random.Random(seed), (0.5, 2.0))[0] for seed in range(400)]
    scales = np.array([(320 / x.height, 640 / x.width) for x in params])
    assert 160 < sum(x.flip for x in params) < 240
    assert 0.5 <= scales.min() < 0.55 and 1.95 < scales.max() <= 2 and (abs(scales.mean(0) - 1.25) < 0.07).all()


def test_crop_dominated_by_one_class_is_sampled_again():
    label = np.repeat(np.array([[0] * 100 + [1] * 28], np.uint8), 64, 0)
    crops = [sample_crop(label, (32, 32), random.Random(seed), (1, 1))[1] for seed in range(200)]
    dominated = [classes.flatten().bincount().max() > 0.75 * 32 * 32 for classes in crops]
    # of 97 positions 69 show one class, 11 more have over 75 % of one; a crop is the last of up to eleven samples
    assert abs(np.mean(dominated) - (80 / 97) ** 11) < 0.07


def test_small_image_is_padded_at_the_right_and_the_bottom():
    image, label = Image.new("RGB", (20, 10), (9, 9, 9)), np.full((10, 20), 3, np.uint8)
    for seed in range(6):
        params, classes = sample_crop(label, (32, 64), random.Random(seed), (1, 1))
        assert (classes[:10, :20] == 3).all() and (classes == 255).sum() == 32 * 64 - 200
        crop = crop_image(image, params, (32, 64))
        assert (crop[:, :10, :20] == 9).all() and abs(preprocess(crop[None, :, 20:, 30:])).max() < 0.01
        _, classes = sample_crop(label, (32, 32), random.Random(seed), (2, 2))  # narrower than the image
        assert (classes[:20] == 3).all() and (classes[20:] == 255).all()


# ---- photometric distortion ------------------------------------------------------------------------------------------


def test_no_change_keeps_the_image():
    image = torch.randint(0, 256, (2, 3, 8, 8)).double()
    torch.testing.assert_close(photometric_distortion(image, torch.tensor([NO_CHANGE] * 2).double()), image)


@pytest.mark.parametrize("hue, saturation", [(0.1, 1.0), (-0.1, 1.0), (0.0, 0.5), (0.0, 1.5), (0.07, 1.3)])
def test_hue_and_saturation_are_those_of_hsv(hue, saturation):
    image = torch.randint(0, 256, (1, 3, 6, 6), generator=torch.Generator().manual_seed(0)).double()
    image[0, :, 0, 0] = 128  # gray has no hue
    changed = photometric_distortion(image, torch.tensor([[0, 1, saturation, hue, 1]], dtype=torch.float64))
    for y in range(6):
        for x in range(6):
            h, s, v = colorsys.rgb_to_hsv(*(image[0, :, y, x] / 255).tolist())
            rgb = colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v)
            expected = 255 * torch.tensor(rgb, dtype=image.dtype)
            torch.testing.assert_close(changed[0, :, y, x], expected, atol=1e-6, rtol=0)


def test_brightness_and_contrast_are_clipped_in_order():
    image = torch.full((1, 3, 1, 1), 250.0)
    assert photometric_distortion(image, torch.tensor([[20.0, 0.5, 1, 0, 1]])).unique().item() == 127.5
    assert photometric_distortion(image, torch.tensor([[-10.0, 1, 1, 0, 1.5]])).unique().item() == 255


def test_each_image_of_a_batch_has_its_own_distortion():
    image = torch.full((2, 3, 2, 2), 100, dtype=torch.uint8)
    params = torch.tensor([[10.0, 1, 1, 0, 1], [0, 1.5, 1, 0, 1]])
    distorted = photometric_distortion(image.float(), params)
    assert [x.unique().item() for x in distorted] == [110, 150]
    torch.testing.assert_close(preprocess(image, params), preprocess(distorted))


def test_each_change_has_probability_one_half():
    params = np.array([sample_photometric(random.Random(seed)) for seed in range(2000)])
    brightness, first, saturation, hue, last = params.T
    for changed in (brightness != 0, (first != 1) | (last != 1), saturation != 1, hue != 0):
        assert abs(changed.mean() - 0.5) < 0.05
    assert not ((first != 1) & (last != 1)).any() and abs((first != 1).mean() - 0.25) < 0.05
    assert abs(brightness).max() <= 32 and abs(hue).max() <= 0.1
    assert params[:, [1, 2, 4]].min() >= 0.5 and params[:, [1, 2, 4]].max() <= 1.5


def test_image_is_normalized_with_imagenets_mean_and_std():
    for red, green, blue in ((124, 116, 104), (255, 0, 255), (0, 255, 0)):
        image = torch.tensor([red, green, blue], dtype=torch.uint8).view(1, 3, 1, 1)
        expected = [(red - 123.675) / 58.395, (green - 116.28) / 57.12, (blue - 103.53) / 57.375]
        torch.testing.assert_close(preprocess(image).flatten(), torch.tensor(expected))
