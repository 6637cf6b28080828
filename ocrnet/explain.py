"""--explain: what OCRNet computes on the way to its prediction, one figure per step of the method.

Notation: H W an image's size, h w the feature map's, K classes, C channels. m, f and w are those of models/ocr.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy import ndarray
from PIL import Image
from torch import Tensor, nn

from . import InputError
from .data.classes import ClassTable
from .data.datasets import read_image, to_tensor
from .data.transforms import preprocess
from .device import Accelerator
from .inference import check_folder, rank_shard, scaled_size
from .plots import class_legend, draw_matrix, image_axes, plt, save_figure, show_images


class Explanation(NamedTuple):
    """Intermediate results for one image, float32 on the CPU."""

    m: Tensor  # (K, h, w) soft object regions: each class sums to one over the pixels
    f: Tensor  # (K, C) object region representations
    w: Tensor  # (K, h, w) pixel-region relation: each pixel sums to one over the regions
    aux: Tensor  # (K, H, W) class probabilities of the auxiliary output
    final: Tensor  # (K, H, W) class probabilities of the final segmentation


@torch.inference_mode()
def explain(model: nn.Module, image: Tensor, accelerator: Accelerator) -> Explanation:
    """The intermediate results for a raw image, uint8 (3, H, W), from one forward pass at its own size."""
    gather, attention = model.head.gather, model.head.attention
    captured = []  # inputs and output of the gather
    hook = gather.register_forward_hook(lambda _, inputs, output: captured.extend((*inputs, output)))
    image = preprocess(image[None].to(accelerator.device)).contiguous(memory_format=torch.channels_last)
    with accelerator.autocast():
        logits, region_logits = model(image)
        x, region_logits_small, f = captured  # (1, C, h, w), (1, K, h, w), (1, C, K, 1)
        w = attention.relation(x, f).float().transpose(1, 2)  # (1, K, N)
    hook.remove()
    m = gather.spatial_softmax(region_logits_small)  # (1, K, N)
    m, w = (y[0].unflatten(1, x.shape[-2:]).cpu() for y in (m, w))  # (K, h, w)
    aux, final = (y.float().softmax(dim=1)[0].cpu() for y in (region_logits, logits))
    return Explanation(m, f[0, :, :, 0].float().T.cpu(), w, aux, final)


def explain_images(
    model: nn.Module, images: Mapping[Path, Path], folder: Path, table: ClassTable, accelerator: Accelerator,
    long_side: int = 0,
) -> None:  # fmt: skip
    """Write a figure per step: ``NAME_1_regions.png`` and so on.

    ``images`` are image files and the names of their outputs, see ``write_predictions``. ``long_side`` is that of
    ``make_forward``. Raise InputError if the model has no OCR head, or an image is invalid.
    """
    if model.config["head"] != "ocr":
        raise InputError(f"--explain: expected a model with head ocr, found {model.config['head']}: use --save")
    check_folder(folder, images)
    for path, output in rank_shard(list(images.items()), accelerator, "explaining"):
        image = read_image(path)
        if long_side:
            image = image.resize(scaled_size(image.size, long_side), Image.BILINEAR)
        m, f, w, aux, final = (x.numpy() for x in explain(model, to_tensor(image), accelerator))
        image, aux, final, confidence = np.asarray(image), aux.argmax(0), final.argmax(0), final.max(0)
        save_figure(draw_regions(image, m, table), folder / f"{output}_1_regions.png")
        save_figure(draw_representations(f, table), folder / f"{output}_2_representations.png")
        save_figure(draw_relation(image, w, final, confidence, table), folder / f"{output}_3_relation.png")
        save_figure(draw_segmentations(image, aux, final, confidence, table), folder / f"{output}_4_segmentations.png")
    accelerator.print0(f"{len(images)} images explained in {folder}: NAME_1_regions.png and so on")


def most_confident_pixels(final: ndarray, confidence: ndarray, count: int = 20) -> list[tuple[int, int]]:
    """(x, y) of the most confident pixel of each predicted class, of at most ``count``, the frequent ones."""
    classes, shares = np.unique(final, return_counts=True)
    frequent = sorted(classes[np.argsort(-shares)][:count])
    return [divmod(int(np.where(final == k, confidence, -1).argmax()), final.shape[1])[::-1] for k in frequent]


def draw_regions(image: ndarray, m: ndarray, table: ClassTable) -> Figure:
    """Soft object regions (K, h, w), in multiples of 1/N, the weight of each pixel if all were equal."""
    fig, axes = image_axes(image, len(table) // 5 + 1, 5, 3.0, 0.9)  # K + 1 images
    show_images(axes, {"image": image})
    weights = dict(zip(table.names, np.maximum(m * m[0].size, 0.01)))
    drawn = show_images(axes[1:], weights, norm=LogNorm(0.01, 100, clip=True), cmap="magma")
    bar = fig.colorbar(drawn, ax=axes, orientation="horizontal", shrink=0.5, aspect=50, pad=0.02)
    bar.set_label("weight of a pixel in the region, in multiples of 1/N (softmax over the N pixels)")
    fig.suptitle("1. Soft object regions: the pixels that each region representation is gathered from")
    return fig


def draw_representations(f: ndarray, table: ClassTable) -> Figure:
    """Cosine similarities of the object region representations (K, C)."""
    unit = f / np.linalg.norm(f, axis=1, keepdims=True).clip(1e-12)
    fig, axis = plt.subplots(figsize=(10, 8.6), layout="constrained")
    # f is a mean of ReLU outputs, so no cosine is negative
    image = draw_matrix(axis, unit @ unit.T, table.names, table.names, 1, "{:.2f}", "viridis")
    fig.colorbar(image, label="cosine similarity", shrink=0.8)
    axis.set_title("2. Object region representations: their similarity")
    return fig


def draw_relation(image: ndarray, w: ndarray, final: ndarray, confidence: ndarray, table: ClassTable) -> Figure:
    """Pixel-region relation (K, h, w) of the most confident pixel of each class: rows are pixels, columns regions."""
    pixels = most_confident_pixels(final, confidence)
    size = (16, 0.6 + max(4.5, 0.36 * len(pixels) + 2))
    fig, (where, matrix) = plt.subplots(1, 2, figsize=size, width_ratios=[1, 1.15], layout="constrained")
    where.imshow(image)
    where.set_axis_off()
    for number, (x, y) in enumerate(pixels, 1):
        where.plot(x, y, "o", color="white", markersize=13, markeredgecolor="black", clip_on=False)
        where.text(x, y, number, ha="center", va="center", fontsize=8)
    names = [f"{number}: {table.names[final[y, x]]} ({x}, {y})" for number, (x, y) in enumerate(pixels, 1)]
    x, y = np.transpose(pixels)
    rows = w[:, y * w.shape[1] // image.shape[0], x * w.shape[2] // image.shape[1]].T
    # not 1: a nearly uniform relation would look black; nor its own largest value: a uniform one would look large
    top = max(rows.max(), 2 / len(table))
    drawn = draw_matrix(matrix, rows, names, table.names, top, "{:.2f}", "magma")
    matrix.set(xlabel="region", ylabel="pixel: its prediction (x, y)")
    bar = fig.colorbar(drawn, ax=matrix, label="w, the pixel's relation to the region; a row sums to 1")
    bar.ax.axhline(1 / len(table), color="cyan")
    bar.ax.text(-0.3, 1 / len(table), "1/K", color="darkcyan", ha="right", va="center")
    fig.suptitle("3. Pixel-region relation: the regions that a pixel takes its context from")
    return fig


def draw_segmentations(image: ndarray, aux: ndarray, final: ndarray, confidence: ndarray, table: ClassTable) -> Figure:
    """Auxiliary and final predictions (H, W), where they differ, and the final probability of the predicted class."""
    fig, axes = image_axes(image, 2, 2, 6.5, 1.2)
    changed, colors = aux != final, table.palette[final]
    changes = {f"changed: {changed.mean():.1%}": np.where(changed[..., None], colors, 255)}
    show_images(axes, {"auxiliary output": table.palette[aux], "final": colors, **changes})
    probability = {f"probability of the final class, mean {confidence.mean():.2f}": confidence}
    drawn = show_images(axes[3:], probability, vmin=0, vmax=1, cmap="viridis")
    fig.colorbar(drawn, ax=axes[3], shrink=0.8)
    class_legend(fig, np.union1d(aux, final), table)
    fig.suptitle("4. Segmentations: before and after the object context")
    return fig
