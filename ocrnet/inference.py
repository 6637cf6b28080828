"""Inference: classes and class probabilities of images, and image files colored by class.

Notation: B batch, K classes, H W an image's size. Raw images are uint8 RGB, 0 .. 255.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from .data.classes import ClassTable
from .data.images import count_frames, read_frames, read_image, to_tensor
from .data.transforms import preprocess
from .device import Accelerator
from .errors import InputError
from .files import atomic_write
from .metrics import sum_over_processes

Segment = Callable[[nn.Module, Tensor], Tensor]  # ``segment`` with its other arguments bound
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@torch.inference_mode()
def forward_image(model: nn.Module, image: Tensor, accelerator: Accelerator) -> tuple[Tensor, ...]:
    """Raw images (B, 3, H, W) -> the model's outputs (B, K, H, W), from one forward pass at their own size."""
    image = preprocess(image.to(accelerator.device)).contiguous(memory_format=torch.channels_last)
    with accelerator.autocast():
        return model(image)


@torch.inference_mode()
def predict(
    model: nn.Module,
    image: Tensor,
    accelerator: Accelerator,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    slide: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
) -> Tensor:
    """Raw images (B, 3, H, W) of any size -> class probabilities (B, K, H, W), float32, on the device.

    The model should be in evaluation mode.

    Args:
        scales: multi-scale inference: the mean of the softmaxes over images resized by these factors.
        flip: also average over horizontally flipped images.
        slide: (h, w) of a sliding window. None for the whole image.
        stride: (h, w) of the sliding window. None for 2/3 of the window.
    """
    size = image.shape[-2:]
    image = preprocess(image.to(accelerator.device))
    total = 0
    for scale in scales:
        scaled = image
        if scale != 1:
            new_size = [int(side * scale + 0.5) for side in size]
            scaled = F.interpolate(image, size=new_size, mode="bilinear", align_corners=False)
        for flipped in (False, True) if flip else (False,):
            x = scaled.flip(3) if flipped else scaled
            x = x.contiguous(memory_format=torch.channels_last)
            with accelerator.autocast():
                logits = slide_inference(model, x, slide, stride) if slide else model(x)[0]
            logits = logits.float().flip(3) if flipped else logits.float()
            if logits.shape[-2:] != size:
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=model.align_corners)
            total = total + logits.softmax(dim=1)
    return total.div_(len(scales) * (2 if flip else 1))


@torch.inference_mode()
def segment(
    model: nn.Module,
    image: Tensor,
    accelerator: Accelerator,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    slide: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
) -> Tensor:
    """Raw images (B, 3, H, W) of any size -> the most probable class of each pixel (B, H, W), int64, on the device.

    For the arguments see ``predict``. One forward pass needs no softmax, which takes time and memory.
    """
    if list(scales) == [1] and not flip and not slide:
        return forward_image(model, image, accelerator)[0].max(dim=1).indices  # on a CPU 5 times as fast as argmax
    return predict(model, image, accelerator, scales, flip, slide, stride).max(dim=1).indices


def slide_inference(
    model: nn.Module, image: Tensor, window: tuple[int, int], stride: tuple[int, int] | None = None
) -> Tensor:
    """Sliding window: normalized images (B, 3, H, W) -> the mean of the logits of all windows (h, w), (B, K, H, W).

    The last window of a row or column is shifted to end at the border, as in mmsegmentation.
    """
    stride = stride or tuple(max(side * 2 // 3, 1) for side in window)
    starts = []
    for side, part, step in zip(image.shape[-2:], window, stride):
        steps = max(side - part + step - 1, 0) // step + 1
        starts.append([max(min(i * step, side - part), 0) for i in range(steps)])
    total, counts = 0, image.new_zeros(1, 1, *image.shape[-2:])
    for top in starts[0]:
        for left in starts[1]:
            area = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = model(image[area])[0].float()
            if isinstance(total, int):
                total = logits.new_zeros(*logits.shape[:2], *image.shape[-2:])
            total[area] += logits
            counts[area] += 1
    return total / counts


# ---- image files -----------------------------------------------------------------------------------------------------


def list_images(paths: Sequence[Path]) -> list[Path]:
    """The files among ``paths``, and the images directly in the folders among them.

    Raises:
        InputError: a path does not exist, a folder has no images, or two images have one name.
    """
    images: dict[str, Path] = {}
    for path in paths:
        inside = [path]
        if path.is_dir():
            files = (file for file in path.iterdir() if not file.name.startswith("."))
            inside = sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)
        if not path.exists() or not inside:
            raise InputError(f"--images {path}: expected a file, or a folder with {', '.join(IMAGE_SUFFIXES)}")
        for image in inside:
            if image.stem in images:
                raise InputError(f"--images: {images[image.stem]} and {image} have one name: rename one")
            images[image.stem] = image
    return list(images.values())


def rank_shard(items: Sequence, accelerator: Accelerator, description: str) -> Iterable:
    """Every world_size-th item from this rank on, with a progress bar on rank 0."""
    shard = items[accelerator.rank :: accelerator.world_size]
    return tqdm(shard, desc=description, disable=None if accelerator.is_main else True)


def segment_file(model: nn.Module, path: Path, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
    """An image file -> the image (H, W, 3) and its train ids (H, W), both uint8."""
    image = read_image(path)
    return np.asarray(image), segment(model, to_tensor(image)[None])[0].byte().cpu().numpy()


def overlay(image: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """The mean of an image and its class colors, all uint8 (H, W, 3)."""
    return ((image.astype(np.uint16) + colors) // 2).astype(np.uint8)


def save_png(image: np.ndarray, path: Path) -> None:
    with atomic_write(path) as part:
        Image.fromarray(image).save(part, format="PNG")


def frame_names(path: Path) -> list[str]:
    """The name of an image file without its suffix; of an animation NAME_0000, NAME_0001, ..."""
    count = count_frames(path)
    return [path.stem] if count == 1 else [f"{path.stem}_{i:04d}" for i in range(count)]


def color_images(
    model: nn.Module,
    paths: Sequence[Path],
    folder: Path,
    table: ClassTable,
    accelerator: Accelerator,
    segment: Segment,
    legend: bool = False,
) -> Tensor:
    """Write NAME.png (class colors) and NAME_overlay.png (mean of image and class colors) to ``folder``.

    Args:
        legend: also write NAME_legend.png, the overlay with the names of its classes.

    Returns:
        The number of pixels of each class in all images of all processes, int64 (K,), on the CPU.

    Raises:
        InputError: an image is invalid, or would be overwritten.
    """
    images = list_images(paths)
    names = {path: frame_names(path) for path in images}
    suffixes = ("", "_overlay", "_legend") if legend else ("", "_overlay")
    targets = [folder / f"{name}{suffix}.png" for path in images for name in names[path] for suffix in suffixes]
    taken = {path.resolve() for path in images}
    for target in targets:
        if target.resolve() in taken:
            raise InputError(f"--save {folder}: would overwrite {target}: choose another folder")
        taken.add(target.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    pixels = torch.zeros(len(table), dtype=torch.int64)
    shard = images[accelerator.rank :: accelerator.world_size]
    total = sum(len(names[path]) for path in shard)
    bar = tqdm(total=total, desc="coloring", unit="image", disable=None if accelerator.is_main else True)
    for path in shard:
        for name, image in zip(names[path], read_frames(path)):
            classes = segment(model, to_tensor(image)[None])[0].cpu()
            counts = classes.flatten().bincount(minlength=len(table))
            colors = table.palette[classes]  # (H, W, 3)
            mixed = overlay(np.asarray(image), colors)
            save_png(colors, folder / f"{name}.png")
            save_png(mixed, folder / f"{name}_overlay.png")
            if legend:
                from .visualize import save_legend  # only here: matplotlib is slow to import

                save_legend(folder / f"{name}_legend.png", mixed, counts, table)
            pixels += counts
            bar.update()
    bar.close()
    accelerator.print0(f"{len(targets) // len(suffixes)} images: NAME.png and NAME_overlay.png in {folder}")
    return sum_over_processes(pixels, accelerator.device)
