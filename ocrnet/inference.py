"""Inference: the outputs of images (one pass, multi-scale, flip, sliding window), and image files colored by class.

Notation: B batch, K classes, H W an image's size. Raw images are uint8 RGB, 0 .. 255.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from tqdm import tqdm

from . import InputError
from .data.classes import ClassTable
from .data.datasets import IMAGE_SUFFIXES, read_image, to_tensor
from .data.transforms import preprocess
from .device import Accelerator
from .files import SOFTWARE, atomic_write, check_output

Forward = Callable[[Tensor], tuple[Tensor, ...]]  # raw images (B, 3, H, W) -> (logits (B, K, H, W), ...)


def make_forward(
    model: nn.Module,
    accelerator: Accelerator,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    slide: tuple[int, int] | None = None,
    long_side: int | None = None,
) -> Forward:
    """How scores, colored images and exports see images: raw images (B, 3, H, W) of any size -> outputs on the device.

    One forward pass gives the model's outputs, in the accelerator's precision. Several give one output: the mean of
    their softmaxes, float32. Classes are train ids; ``ClassTable.ids`` has the label ids. On CUDA the next call
    overwrites the outputs.

    Args:
        scales: multi-scale inference: also images resized by these factors.
        flip: also horizontally flipped images.
        slide: (h, w) of a sliding window. None for the whole image.
        long_side: pixels; images are resized so that their longer side has as many, and outputs back. 0: not resized.
            None: ``model.long_side``, that of its training images, which ``load_model`` sets.
    """
    long_side = getattr(model, "long_side", 0) if long_side is None else long_side

    @accelerator.graph
    def network(x: Tensor) -> tuple[Tensor, ...]:
        with accelerator.autocast():
            return model(x)

    @torch.inference_mode()
    def forward(image: Tensor) -> tuple[Tensor, ...]:
        own_size = image.shape[-2:]
        image = image.to(accelerator.device, non_blocking=image.is_pinned())
        if long_side:
            image = F.interpolate(image.float(), scaled_size(own_size, long_side), mode="bilinear", antialias=True)
        size, image, total = image.shape[-2:], preprocess(image), 0
        if list(scales) == [1] and not flip and not slide:
            outputs = network(image.contiguous(memory_format=torch.channels_last))
            return tuple(resize(logits, own_size) for logits in outputs) if long_side else outputs
        for scale in scales:
            new_size = [max(int(side * scale + 0.5), 1) for side in size]
            scaled = F.interpolate(image, size=new_size, mode="bilinear", align_corners=False)
            for flipped in (False, True) if flip else (False,):
                x = scaled.flip(3) if flipped else scaled
                x = x.contiguous(memory_format=torch.channels_last)
                logits = slide_inference(network, x, slide) if slide else network(x)[0]
                total = total + resize(logits.flip(3) if flipped else logits, size).softmax(dim=1)
        mean = total / (len(scales) * (2 if flip else 1))
        return (resize(mean, own_size) if long_side else mean,)

    def resize(logits: Tensor, size: Sequence[int]) -> Tensor:
        """(B, K, h, w) -> (B, K, H, W), float32."""
        return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=model.align_corners)

    return forward


def class_map(logits: Tensor) -> Tensor:
    """(B, K, H, W) -> train ids (B, H, W). On a CPU 5 times as fast as argmax."""
    return logits.max(dim=1).indices


def scaled_size(size: Sequence[int], long_side: int) -> list[int]:
    """(H, W) in the same aspect, the longer side of ``long_side`` pixels."""
    return [max(round(side * long_side / max(size)), 1) for side in size]


def slide_inference(network: Callable, image: Tensor, window: tuple[int, int]) -> Tensor:
    """Normalized images (B, 3, H, W) -> the mean of the logits of all windows (h, w), (B, K, H, W).

    Windows are 2/3 of their size apart. The last one of a row or column is shifted to end at the border, as in
    mmsegmentation.
    """
    starts = []
    for side, part in zip(image.shape[-2:], window):
        stride = max(part * 2 // 3, 1)
        steps = max(side - part + stride - 1, 0) // stride + 1
        starts.append([max(min(i * stride, side - part), 0) for i in range(steps)])
    total, counts = 0, image.new_zeros(1, 1, *image.shape[-2:])
    for top in starts[0]:
        for left in starts[1]:
            area = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = network(image[area])[0].float()
            if isinstance(total, int):
                total = logits.new_zeros(*logits.shape[:2], *image.shape[-2:])
            total[area] += logits
            counts[area] += 1
    return total / counts


# ---- image files -----------------------------------------------------------------------------------------------------


def list_images(paths: Sequence[Path]) -> dict[Path, Path]:
    """The files among ``paths``, and the images directly in the folders among them -> the names of their outputs.

    Raises:
        InputError: a path does not exist, a folder has no images, or two images have one name.
    """
    images: dict[str, Path] = {}
    for path in paths:
        inside = [path] if path.is_file() else []
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            inside = [file for file in inside if file.is_file() and not file.name.startswith(".")]
        if not inside:
            raise InputError(f"--images {path}: expected a file, or a folder with {', '.join(IMAGE_SUFFIXES)}")
        for image in inside:
            if image.stem in images:
                raise InputError(f"--images: {images[image.stem]} and {image} have one name: rename one")
            images[image.stem] = image
    return {image: Path(stem) for stem, image in images.items()}


def check_folder(folder: Path, images: Mapping[Path, Path]) -> None:
    """Raise InputError if an output in ``folder`` would be beside its image, where it would be taken for another."""
    for image, name in images.items():
        if image.parent.resolve() == (folder / name).parent.resolve():
            raise InputError(f"{folder}: holds {image.name}: choose another folder for what is made of it")


def rank_shard(items: Sequence, accelerator: Accelerator, description: str) -> Iterable:
    """Every world_size-th item from this rank on, with a progress bar on rank 0."""
    shard = items[accelerator.rank :: accelerator.world_size]
    return tqdm(shard, desc=description, disable=None if accelerator.is_main else True)


def save_png(image: np.ndarray, path: Path, title: str) -> None:
    """Write an image, marked as ours. Raise InputError if the file exists, and is no earlier version of it."""
    check_output(path, title)
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    mark.add_text("Title", title)
    with atomic_write(path) as part:
        Image.fromarray(image).save(part, format="PNG", pnginfo=mark)


def write_predictions(
    forward: Forward, images: Mapping[Path, Path], table: ClassTable, accelerator: Accelerator,
    save: Path | None = None, export: Path | None = None,
) -> None:  # fmt: skip
    """Write the predictions for images.

    Args:
        images: image file -> name of its outputs, without ending.
        save: folder for NAME.png (class colors), NAME_overlay.png (mean of image and colors) and one legend.png.
        export: folder for NAME.png of label ids, or of class colors if a class has no id.

    Raises:
        InputError: an image is invalid, or a file would be overwritten that this program has not written.
    """
    labels = table.palette if min(table.ids) < 0 else np.array(table.ids, np.uint8)  # by train id
    names = [f"{name}{ending}" for name in images.values() for ending in ("", "_overlay")]
    if save and len({*names, "legend"}) <= len(names):
        raise InputError(f"--save: expected images whose outputs differ, found {', '.join(sorted(names))}: rename one")
    for folder in filter(None, (save, export)):
        check_folder(folder, images)
    for path, name in rank_shard(list(images.items()), accelerator, "predicting"):
        image = read_image(path)
        logits = forward(to_tensor(image)[None])[0]
        classes = class_map(logits)[0].byte().cpu().numpy()  # (H, W)
        if export:
            save_png(labels[classes], export / f"{name}.png", "label image")
        if save:
            colors = table.palette[classes]  # (H, W, 3)
            overlay = ((np.asarray(image, np.uint16) + colors) // 2).astype(np.uint8)
            save_png(colors, save / f"{name}.png", "color image")
            save_png(overlay, save / f"{name}_overlay.png", "overlay")
    if save and accelerator.is_main:
        save_png(draw_legend(table), save / "legend.png", "legend")
    for folder, files in ((save, "NAME.png, NAME_overlay.png and legend.png"), (export, "NAME.png")):
        if folder:
            accelerator.print0(f"{len(images)} images: {files} in {folder}")


def draw_legend(table: ClassTable, row: int = 24) -> np.ndarray:
    """The colors and names of the classes, one per row of ``row`` pixels, uint8 (H, W, 3)."""
    font = ImageFont.load_default(size=row * 0.6)
    width = max(int(font.getlength(name)) for name in table.names)
    image = Image.new("RGB", (3 * row + width, row * len(table)), "white")
    draw = ImageDraw.Draw(image)
    for k, name in enumerate(table.names):
        color = tuple(table.palette[k].tolist())
        draw.rectangle((4, row * k + 4, 2 * row, row * k + row - 4), fill=color, outline="gray")
        draw.text((2.5 * row, row * (k + 0.5)), name, fill="black", font=font, anchor="lm")
    return np.asarray(image)
