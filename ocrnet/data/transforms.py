"""What a picture goes through before the network sees it.

In a loader's worker, photo and label together: a part of the picture is drawn (``draw_box``), cut out, resized to the
crop and perhaps mirrored (``cut``), and the numbers of a colour change are drawn (``draw_colour``). On the device, a
whole batch at once: the colour change itself and the normalising (``to_input``). Source of every number:
mmsegmentation's ocrnet_hr18_4xb2-40k_cityscapes-512x1024.

Letters: B batch, H W the picture's size, h w the crop's.
"""

import random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MEAN = (123.675, 116.28, 103.53)  # of ImageNet's RGB, on the scale 0 .. 255
STD = (58.395, 57.12, 57.375)
PAD_PHOTO = (124, 116, 104)  # the mean: about 0 after normalising
PAD_LABEL = 255  # not scored
NO_CHANGE = (0.0, 1.0, 1.0, 0.0, 1.0)  # of colour


class Box(NamedTuple):
    """A part of a picture, in its pixels, and what becomes of it."""

    top: int
    left: int
    height: int
    width: int
    size: list[int]  # it is resized to
    mirrored: bool


def draw_box(
    label: np.ndarray,
    crop: tuple[int, int],
    rng: random.Random,
    scales: tuple[float, float] = (0.5, 2.0),
    max_share: float = 0.75,
) -> tuple[Box, Tensor]:
    """The part of a picture that, resized by one random factor, fills ``crop`` = (h, w); and the label there (h, w).

    The place is random. It is drawn again, up to ten times, while one class fills ``max_share`` or more of the crop's
    labelled pixels. Where the resized picture is smaller than the crop, the part is all of it.

    Args:
        label: uint8 (H, W).
    """
    scale = rng.uniform(*scales)
    height, width = (min(round(side / scale), whole) for side, whole in zip(crop, label.shape))
    size = [min(side, max(round(whole * scale), 1)) for side, whole in zip(crop, label.shape)]
    mirrored = rng.random() < 0.5
    for _ in range(11):
        top, left = rng.randint(0, label.shape[0] - height), rng.randint(0, label.shape[1] - width)
        box = Box(top, left, height, width, size, mirrored)
        classes = cut_label(label, box, crop)
        counts = torch.bincount(classes.flatten(), minlength=PAD_LABEL + 1)[:PAD_LABEL]
        if counts.count_nonzero() > 1 and counts.max() < max_share * counts.sum():
            break
    return box, classes


def cut_photo(photo: np.ndarray | Image.Image, box: Box, crop: tuple[int, int]) -> Tensor:
    """RGB or uint8 (H, W, 3) -> (3, h, w): between the four nearest pixels, also when shrinking, as OpenCV does it."""
    return cut(torch.from_numpy(copy_box(photo, box)).permute(2, 0, 1), box, crop, "bilinear", PAD_PHOTO)


def cut_label(label: np.ndarray, box: Box, crop: tuple[int, int]) -> Tensor:
    """uint8 (H, W) -> (h, w): the nearest pixel."""
    return cut(torch.from_numpy(copy_box(label, box))[None], box, crop, "nearest", (PAD_LABEL,))[0]


def copy_box(picture: np.ndarray | Image.Image, box: Box) -> np.ndarray:
    """A copy of the box alone: of a file mapped into memory nothing else is read."""
    if isinstance(picture, Image.Image):
        return np.array(picture.crop((box.left, box.top, box.left + box.width, box.top + box.height)))
    return np.array(picture[box.top : box.top + box.height, box.left : box.left + box.width])


def cut(x: Tensor, box: Box, crop: tuple[int, int], mode: str, fill: tuple[int, ...]) -> Tensor:
    """Resize a box (C, box.height, box.width), uint8, mirror it, pad it at the right and below -> (C, h, w)."""
    x = F.interpolate(x[None], size=box.size, mode=mode)[0]
    x = x.flip(2) if box.mirrored else x
    if box.size == list(crop):
        return x
    padded = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, *crop)
    padded[:, : x.shape[1], : x.shape[2]] = x
    return padded


def draw_colour(rng: random.Random) -> tuple[float, float, float, float, float]:
    """The numbers of one picture's colour change, in the order in which they apply; each is drawn half of the time.

    Brightness added (+-32 of 255), contrast (factor 0.5 .. 1.5), saturation (factor 0.5 .. 1.5), hue (+-0.1 of the
    circle), contrast. Contrast comes first or last, at even odds. Left out: 0 for the sums, 1 for the factors.
    """
    brightness = rng.uniform(-32, 32) if rng.random() < 0.5 else 0.0
    first, last = 1.0, 1.0
    if rng.random() < 0.5:
        contrast = rng.uniform(0.5, 1.5)
        first, last = (contrast, 1.0) if rng.random() < 0.5 else (1.0, contrast)
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = rng.uniform(-0.1, 0.1) if rng.random() < 0.5 else 0.0
    return brightness, first, saturation, hue, last


def to_input(photo: Tensor, colour: Tensor | None = None) -> Tensor:
    """uint8 photos (B, 3, H, W), and for training their colour changes (B, 5) -> the network's input, float32."""
    x = photo.float()
    if colour is not None:
        x = change_colour(x, colour)
    mean, std = x.new_tensor(MEAN), x.new_tensor(STD)
    return (x - mean[:, None, None]) / std[:, None, None]


def change_colour(x: Tensor, colour: Tensor) -> Tensor:
    """Apply ``draw_colour``'s numbers (B, 5), each picture its own, to RGB (B, 3, H, W) on the scale 0 .. 255."""
    brightness, first, saturation, hue, last = colour[:, :, None, None, None].unbind(1)  # each (B, 1, 1, 1)
    x = (x + brightness).clamp(0, 255)
    x = (x * first).clamp(0, 255)
    x = change_hue_saturation(x, hue, saturation)
    return (x * last).clamp(0, 255)


def change_hue_saturation(x: Tensor, hue: Tensor, saturation: Tensor) -> Tensor:
    """Turn the hue by ``hue`` of the circle and multiply the saturation, both as HSV has them; x (B, 3, H, W).

    The largest channel, V, stays; the others lie below it by a part of the chroma that the hue decides:
    channel = V - chroma * clamp(min(k, 4 - k), 0, 1), with k = (n + 6 * hue) mod 6 and n = 5, 3, 1 for R, G, B
    (https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative).
    """
    r, g, b = x.split(1, dim=1)
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    safe = chroma.clamp(min=1e-6)
    sixths = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    k = (x.new_tensor([5, 3, 1])[:, None, None] + sixths + 6 * hue) % 6
    chroma = torch.minimum(chroma * saturation, value)  # saturation = chroma / value ends at 1
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
