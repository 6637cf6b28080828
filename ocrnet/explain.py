"""--explain: what OCRNet computes on the way to its prediction, one figure per step of the method.

Notation: H W an image's size, h w the feature map's, K classes, C channels. m, f and w are those of models/ocr.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.colors import LogNorm
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
    model: nn.Module,
    images: Mapping[Path, Path],
    folder: Path,
    table: ClassTable,
    accelerator: Accelerator,
    long_side: int = 0,
) -> None:
    """Write a figure per step: ``NAME_1_regions.png`` and so on.

    Args:
        images: image file -> name of its outputs, without ending.
        long_side: of the images in pixels, see ``make_forward``.

    Raises:
        InputError: the model has no OCR head, or an image is invalid.
    """
    if model.config["head"] != "ocr":
        raise InputError(f"--explain: expected a model with head ocr, found {model.config['head']}: use --save")
    check_folder(folder, images)
    for path, output in rank_shard(list(images.items()), accelerator, "explaining"):
        image = read_image(path)
        if long_side:
            image = image.resize(scaled_size(image.size, long_side), Image.BILINEAR)
        m, f, w, aux, final = explain(model, to_tensor(image), accelerator)
        image, confidence = np.asarray(image), final.amax(0).numpy()
        aux, final = aux.argmax(0).numpy(), final.argmax(0).numpy()
        figures = {
            "1_regions": draw_regions(image, m.numpy(), table),
            "2_representations": draw_representations(f.numpy(), table),
            "3_relation": draw_relation(image, w.numpy(), final, confidence, table),
            "4_segmentations": draw_segmentations(image, aux, final, confidence, table),
        }
        for name, fig in figures.items():
            save_figure(fig, folder / f"{output}_{name}.png")
    accelerator.print0(f"{len(images)} images explained in {folder}: NAME_1_regions.png and so on")


def most_confident_pixels(final: np.ndarray, confidence: np.ndarray, count: int = 20) -> list[tuple[int, int]]:
    """(x, y) of the most confident pixel of each predicted class, of at most ``count``, the frequent ones."""
    classes, shares = np.unique(final, return_counts=True)
    pixels = []
    for k in sorted(classes[np.argsort(-shares)][:count]):
        y, x = np.unravel_index(np.where(final == k, confidence, -1).argmax(), final.shape)
        pixels.append((int(x), int(y)))
    return pixels


def draw_regions(image: np.ndarray, m: np.ndarray, table: ClassTable) -> plt.Figure:
    """Soft object regions (K, h, w), in multiples of 1/N, the weight of each pixel if all were equal."""
    fig, axes = image_axes(image, len(table) // 5 + 1, 5, 3.0, 0.9)  # K + 1 images
    show_images(axes, {"image": image})
    for axis, name, weights in zip(axes[1:], table.names, m):
        scale = LogNorm(0.01, 100, clip=True)
        drawn = axis.imshow(np.maximum(weights * weights.size, 0.01), norm=scale, cmap="magma", interpolation="nearest")
        axis.set_title(name)
    bar = fig.colorbar(drawn, ax=axes, orientation="horizontal", shrink=0.5, aspect=50, pad=0.02)
    bar.set_label("weight of a pixel in the region, in multiples of 1/N (softmax over the N pixels)")
    fig.suptitle("1. Soft object regions: the pixels that each region representation is gathered from")
    return fig


def draw_representations(f: np.ndarray, table: ClassTable) -> plt.Figure:
    """Cosine similarities of the object region representations (K, C)."""
    unit = f / np.linalg.norm(f, axis=1, keepdims=True).clip(1e-12)
    fig, axis = plt.subplots(figsize=(10, 8.6), layout="constrained")
    # f is a mean of ReLU outputs, so no cosine is negative
    image = draw_matrix(axis, unit @ unit.T, table.names, table.names, 1, "{:.2f}", "viridis")
    fig.colorbar(image, label="cosine similarity", shrink=0.8)
    axis.set_title("2. Object region representations: their similarity")
    return fig


def draw_relation(
    image: np.ndarray, w: np.ndarray, final: np.ndarray, confidence: np.ndarray, table: ClassTable
) -> plt.Figure:
    """Pixel-region relation (K, h, w) of the most confident pixel of each class: rows are pixels, columns regions."""
    pixels = most_confident_pixels(final, confidence)
    size = (16, 0.6 + max(4.5, 0.36 * len(pixels) + 2))
    fig, (where, matrix) = plt.subplots(1, 2, figsize=size, width_ratios=[1, 1.15], layout="constrained")
    where.imshow(image)
    where.set_axis_off()
    rows, names = [], []
    for number, (x, y) in enumerate(pixels, 1):
        where.plot(x, y, "o", color="white", markersize=13, markeredgecolor="black", clip_on=False)
        where.text(x, y, number, ha="center", va="center", fontsize=8)
        i, j = y * w.shape[1] // image.shape[0], x * w.shape[2] // image.shape[1]
        rows.append(w[:, i, j])
        names.append(f"{number}: {table.names[final[y, x]]} ({x}, {y})")
    # not 1: a nearly uniform relation would look black; nor its own largest value: a uniform one would look large
    top = max(float(np.max(rows)), 2 / len(table))
    drawn = draw_matrix(matrix, np.array(rows), names, table.names, top, "{:.2f}", "magma")
    matrix.set(xlabel="region", ylabel="pixel: its prediction (x, y)")
    bar = fig.colorbar(drawn, ax=matrix, label="w, the pixel's relation to the region; a row sums to 1")
    bar.ax.axhline(1 / len(table), color="cyan")
    bar.ax.text(-0.3, 1 / len(table), "1/K", color="darkcyan", ha="right", va="center")
    fig.suptitle("3. Pixel-region relation: the regions that a pixel takes its context from")
    return fig


def draw_segmentations(
    image: np.ndarray, aux: np.ndarray, final: np.ndarray, confidence: np.ndarray, table: ClassTable
) -> plt.Figure:
    """Auxiliary and final predictions (H, W), where they differ, and the final probability of the predicted class."""
    fig, axes = image_axes(image, 2, 2, 6.5, 1.2)
    changed, colors = aux != final, table.palette[final]
    changes = np.where(changed[..., None], colors, 255)
    show_images(
        axes, {"auxiliary output": table.palette[aux], "final": colors, f"changed: {changed.mean():.1%}": changes}
    )
    drawn = axes[3].imshow(confidence, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes[3].set_title(f"probability of the final class, mean {confidence.mean():.2f}")
    fig.colorbar(drawn, ax=axes[3], shrink=0.8)
    class_legend(fig, np.union1d(aux, final), table)
    fig.suptitle("4. Segmentations: before and after the object context")
    return fig
