"""What a picture goes through before the network sees it.

In a loader's worker, photo and label together: scale by U(0.5, 2), cut, flip (``random_crop``), and the numbers of a
colour change (``draw_colour``). On the device, a whole batch at once: the colour change itself and the normalising
(``to_input``). Source of every number: mmsegmentation's cityscapes_1024x1024 recipe for OCRNet.

Letters: B batch, H W the crop's size.
"""

import random

import torch
from PIL import Image
from torch import Tensor

MEAN = (123.675, 116.28, 103.53)  # of ImageNet's RGB, on the scale 0 .. 255
STD = (58.395, 57.12, 57.375)
PAD_PHOTO = (124, 116, 104)  # the mean: about 0 after normalising
PAD_LABEL = 255  # not scored
NO_CHANGE = (0.0, 1.0, 1.0, 0.0, 1.0)  # of colour


def random_crop(
    photo: Image.Image,
    label: Image.Image,
    crop: tuple[int, int],
    rng: random.Random,
    scales: tuple[float, float] = (0.5, 2.0),
    max_share: float = 0.75,
) -> tuple[Image.Image, Image.Image]:
    """Photo and label resized by one random factor, cut to ``crop`` = (H, W) at one random place, flipped or not.

    Both are resampled once, straight from the part that the crop shows. The place is drawn again, up to ten times,
    while one class fills ``max_share`` or more of the crop's labelled pixels. Where the resized picture is smaller than
    the crop, it is padded at the right and below.
    """
    scale = rng.uniform(*scales)
    width, height = int(photo.width * scale + 0.5), int(photo.height * scale + 0.5)
    for attempt in range(11):
        left = rng.randint(0, max(width - crop[1], 0))
        top = rng.randint(0, max(height - crop[0], 0))
        x, y = photo.width / width, photo.height / height  # pixels of the photo in one of the resized picture
        box = (left * x, top * y, (left + crop[1]) * x, (top + crop[0]) * y)
        part = cut(label, box, crop, Image.Resampling.NEAREST, PAD_LABEL)
        counts = [count for count in part.histogram()[:PAD_LABEL] if count]
        if attempt == 10 or (len(counts) > 1 and max(counts) < max_share * sum(counts)):
            break
    photo, label = cut(photo, box, crop, Image.Resampling.BILINEAR, PAD_PHOTO), part
    if rng.random() < 0.5:
        flip = Image.Transpose.FLIP_LEFT_RIGHT
        photo, label = photo.transpose(flip), label.transpose(flip)
    return photo, label


def cut(image: Image.Image, box: tuple[float, ...], size: tuple[int, int], resample: Image.Resampling, fill):
    """The part of ``image`` in ``box`` (left, top, right, bottom; fractions count), resized to ``size`` = (H, W).

    Bilinear here means between the four nearest pixels also when shrinking, as in OpenCV's resize and so in the recipe.
    """
    return image.transform((size[1], size[0]), Image.Transform.EXTENT, box, resample, fillcolor=fill)


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
