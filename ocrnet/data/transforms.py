"""Augmentation and normalization.

A data loader worker samples a crop of image and label (``sample_crop``), cuts, resizes and flips it (``crop_image``),
and samples the parameters of a photometric distortion (``sample_photometric``). The distortion itself and the
normalization run on the device, a batch at a time (``preprocess``). All numbers are those of mmsegmentation's
ocrnet_hr18_4xb2-40k_cityscapes-512x1024.

Notation: B batch, H W an image's size, h w the crop's.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import InputError
from .classes import IGNORE_INDEX

MEAN = (123.675, 116.28, 103.53)  # ImageNet's RGB mean, for values 0 .. 255
STD = (58.395, 57.12, 57.375)
PAD_COLOR = (124, 116, 104)  # the mean, which normalization maps to about 0
CAT_MAX_RATIO = 0.75  # share of one class from which on a crop is sampled again
NO_CHANGE = (0.0, 1.0, 1.0, 0.0, 1.0)  # a photometric distortion without effect


class CropParams(NamedTuple):
    """A box in the image, in pixels, and how it becomes the crop."""

    top: int
    left: int
    height: int
    width: int
    size: list[int]  # of the box once resized
    flip: bool


def sample_crop(
    label: np.ndarray, crop_size: tuple[int, int], rng: random.Random, scale_range: tuple[float, float]
) -> tuple[CropParams, Tensor]:
    """Sample scale, flip and position of a crop. Return its parameters and the cropped label (h, w).

    The position is sampled again, up to ten times, while one class covers ``CAT_MAX_RATIO`` or more of the crop's
    labeled pixels. Where the resized image is smaller than the crop, the crop holds all of it. ``label`` is uint8
    (H, W), ``crop_size`` (h, w), and ``scale_range`` that of the uniform random scale.
    """
    scale = rng.uniform(*scale_range)
    height, width = (min(round(side / scale), whole) for side, whole in zip(crop_size, label.shape))
    size = [min(side, max(round(whole * scale), 1)) for side, whole in zip(crop_size, label.shape)]
    flip = rng.random() < 0.5
    for _ in range(11):
        top, left = rng.randint(0, label.shape[0] - height), rng.randint(0, label.shape[1] - width)
        params = CropParams(top, left, height, width, size, flip)
        box = torch.from_numpy(label[top : top + height, left : left + width])
        cropped = resize_flip_pad(box[None], params, crop_size, "nearest", (IGNORE_INDEX,))[0]  # (h, w)
        counts = torch.bincount(cropped.flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        if counts.count_nonzero() > 1 and counts.max() < CAT_MAX_RATIO * counts.sum():
            break
    return params, cropped


def crop_image(image: Image.Image, params: CropParams, crop_size: tuple[int, int]) -> Tensor:
    """RGB image -> uint8 (3, h, w), bilinear without antialiasing, as OpenCV resizes."""
    top, left, height, width = params[:4]
    box = np.array(image.crop((left, top, left + width, top + height)))
    return resize_flip_pad(torch.from_numpy(box).permute(2, 0, 1), params, crop_size, "bilinear", PAD_COLOR)


def resize_flip_pad(x: Tensor, params: CropParams, crop_size: Sequence[int], mode: str, fill: Sequence[int]) -> Tensor:
    """uint8 (C, height, width) -> (C, h, w): resize, flip, then pad at the right and the bottom."""
    x = F.interpolate(x[None], size=params.size, mode=mode)[0]
    x = x.flip(2) if params.flip else x
    if params.size == list(crop_size):
        return x
    padded = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, *crop_size)
    padded[:, : x.shape[1], : x.shape[2]] = x
    return padded


def sample_photometric(rng: random.Random) -> tuple[float, float, float, float, float]:
    """Sample a photometric distortion: (brightness, contrast first, saturation, hue, contrast last).

    Each change has probability 0.5: brightness +-32 of 255, contrast and saturation by a factor 0.5 .. 1.5, hue +-0.1
    of the circle. Contrast is applied first or last with equal probability. Without a change the value is that of
    ``NO_CHANGE``.
    """
    brightness = rng.uniform(-32, 32) if rng.random() < 0.5 else 0.0
    first, last = 1.0, 1.0
    if rng.random() < 0.5:
        contrast = rng.uniform(0.5, 1.5)
        first, last = (contrast, 1.0) if rng.random() < 0.5 else (1.0, contrast)
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = rng.uniform(-0.1, 0.1) if rng.random() < 0.5 else 0.0
    return brightness, first, saturation, hue, last


def preprocess(image: Tensor, photometric: Tensor | None = None) -> Tensor:
    """Raw images, uint8 (B, 3, H, W) -> normalized images, float32 (B, 3, H, W).

    ``photometric``, parameters (B, 5) of ``sample_photometric``, is applied before the normalization. Raise InputError
    if the number of channels is another, or there are no images.
    """
    if image.ndim != 4 or image.shape[1] != len(MEAN) or not len(image):
        raise InputError(f"expected images (B, {len(MEAN)}, H, W), channels as in MEAN, found {tuple(image.shape)}")
    x = image.float()
    if photometric is not None:
        x = photometric_distortion(x, photometric)
    channels = zip(x.split(1, dim=1), MEAN, STD)
    return torch.cat([(channel - mean) / std for channel, mean, std in channels], dim=1)


def photometric_distortion(x: Tensor, params: Tensor) -> Tensor:
    """Distort RGB images (B, 3, H, W) with values 0 .. 255 by the parameters (B, 5) of ``sample_photometric``."""
    brightness, first, saturation, hue, last = params[:, :, None, None, None].unbind(1)  # each (B, 1, 1, 1)
    x = (x + brightness).clamp(0, 255)
    x = (x * first).clamp(0, 255)
    x = adjust_hue_saturation(x, hue, saturation)
    return (x * last).clamp(0, 255)


def adjust_hue_saturation(x: Tensor, hue: Tensor, saturation: Tensor) -> Tensor:
    """Shift the HSV hue by ``hue`` of the circle and multiply the HSV saturation; x (B, 3, H, W).

    With V the largest channel and chroma the range of the channels, each new channel is
    V - chroma * clamp(min(k, 4 - k), 0, 1), where k = (n + 6 * hue) mod 6 and n = 5, 3, 1 for R, G, B
    (https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative).
    """
    r, g, b = x.split(1, dim=1)
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    safe = chroma.clamp(min=1e-6)
    sixths = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    k = (torch.cat([n + sixths for n in (5, 3, 1)], dim=1) + 6 * hue) % 6
    chroma = torch.minimum(chroma * saturation, value)  # saturation = chroma / value is at most 1
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
