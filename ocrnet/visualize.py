"""Figures: colored class maps, samples with their predictions, scores, and curves of runs.

Notation: H W an image's size, K classes. Images are uint8 (H, W, 3), labels and predictions train ids (H, W).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from .data.classes import IGNORE_INDEX, ClassTable
from .logs import Log, smooth, smoothing_window
from .metrics import ConfusionMatrix

matplotlib.use("Agg")  # files only, no screen
from matplotlib import pyplot as plt
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatter


def error_map(label: np.ndarray, prediction: np.ndarray, table: ClassTable) -> np.ndarray:
    """Wrong pixels in the color of their prediction; white where right, black where ignored."""
    colors = np.where((prediction != label)[..., None], table.palette[prediction], 255).astype(np.uint8)
    colors[label == IGNORE_INDEX] = 0
    return colors


# ---- parts of figures ------------------------------------------------------------------------------------------------


def image_axes(
    image: np.ndarray, rows: int, columns: int, width: float, margin: float = 0.6, title: float = 0.3
) -> tuple[plt.Figure, np.ndarray]:
    """A figure of axes in the shape of ``image``. Return it and its axes (rows * columns,).

    Args:
        width: inches of one image.
        margin, title: inches of height for the figure and for each row besides the images.
    """
    height = rows * (width * image.shape[0] / image.shape[1] + title) + margin
    fig, axes = plt.subplots(rows, columns, figsize=(columns * width, height), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    return fig, axes.ravel()


def show_images(axes: Iterable[plt.Axes], images: Mapping[str, np.ndarray]) -> None:
    """Show each image under its title."""
    for axis, (title, image) in zip(axes, images.items()):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title)


def class_legend(fig: plt.Figure, classes: Iterable[int], table: ClassTable) -> None:
    patches = [Patch(color=table.palette[k] / 255, label=table.names[k]) for k in classes]
    fig.legend(handles=patches, loc="outside lower center", ncols=10, frameon=False, fontsize=9)


def draw_matrix(
    axis: plt.Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], top: float, form: str, cmap: str
) -> AxesImage:
    """Values (R, C) from 0 to ``top`` as colors, with numbers where they are at least half a percent of ``top``."""
    image = axis.imshow(values, vmin=0, vmax=top, cmap=cmap, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    for i, j in np.argwhere(values >= 0.005 * top):
        color = "black" if values[i, j] > 0.6 * top else "white"
        text = form.format(values[i, j]).lstrip("0")
        axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    return image


# ---- figures of a run ------------------------------------------------------------------------------------------------


def save_samples(path: Path, samples: Sequence[tuple[np.ndarray, ...]], table: ClassTable) -> None:
    """One row per sample: image, label, predictions, and the errors of the final one.

    Args:
        samples: (image, label, final prediction, prediction of the auxiliary output), without the last for FCNHead.
    """
    columns = len(samples[0]) + 1
    fig, axes = image_axes(samples[0][0], len(samples), columns, 3.0, 1.1, title=0.1)
    for i, (image, label, final, *aux) in enumerate(samples):
        maps = {"label (black: ignored)": label, "final prediction": final}
        if aux:
            maps["auxiliary output"] = aux[0]
        colors = {title: table.palette[classes] for title, classes in maps.items()}
        errors = {"errors (color: prediction)": error_map(label, final, table)}
        row = axes[i * columns : (i + 1) * columns]
        show_images(row, {"image": image, **colors, **errors})
        for axis in row if i else ():  # titles above the first row only
            axis.set_title("")
    class_legend(fig, range(len(table)), table)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def save_legend(path: Path, image: np.ndarray, pixels: Sequence[int], table: ClassTable) -> None:
    """An image, and beside it the classes that it has, with their shares of its ``pixels`` (K,)."""
    pixels = np.asarray(pixels)
    shares = pixels / max(pixels.sum(), 1)
    height, width = image.shape[:2]
    fig, axis = plt.subplots(figsize=(10, 10 * height / width), layout="constrained")
    axis.imshow(image)
    axis.set_axis_off()
    patches = [
        Patch(color=table.palette[k] / 255, label=f"{table.names[k]}  {shares[k]:.1%}")
        for k in np.argsort(-shares)
        if shares[k] > 0
    ]
    fig.legend(handles=patches, loc="outside right upper", frameon=False)
    fig.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(fig)


def save_scores(path: Path, confusion: ConfusionMatrix, table: ClassTable) -> None:
    """IoU of each class, and the confusion matrix as shares of each label's pixels."""
    iou = 100 * confusion.iou().numpy()
    counts = confusion.counts.cpu().numpy()
    labeled = counts.sum(1, keepdims=True)
    fig, (bars, matrix) = plt.subplots(1, 2, figsize=(16, 7.5), width_ratios=[1, 1.7], layout="constrained")
    ticks = range(len(table))
    bars.barh(ticks, np.nan_to_num(iou), color=table.palette[: len(table)] / 255, edgecolor="0.3", linewidth=0.5)
    for k in ticks:
        bars.text(np.nan_to_num(iou[k]) + 1, k, "does not occur" if np.isnan(iou[k]) else f"{iou[k]:.1f}", va="center")
    title = f"IoU, mean {100 * confusion.mean_iou():.2f} %"
    bars.set(title=title, xlabel="IoU (%)", xlim=(0, 112), ylim=(len(table) - 0.5, -0.5))
    bars.set_yticks(ticks, table.names)
    shares = 100 * counts / np.where(labeled, labeled, np.nan)
    image = draw_matrix(matrix, shares, table.names, table.names, 100, "{:.0f}", "magma")
    matrix.set(title="confusion matrix", xlabel="prediction", ylabel="label")
    fig.colorbar(image, ax=matrix, label="share of the label's pixels (%)", shrink=0.9)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def plot_curves(logs: Sequence[Log], path: Path, log_scale: bool = False) -> None:
    """Loss (of training raw and smoothed, of validation), learning rate and validation mIoU of one or more runs.

    Args:
        log_scale: logarithmic axes for loss and learning rate.
    """
    fig, (loss, lr, score) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for i, log in enumerate(logs):
        color = f"C{i % 10}"
        if log.train:
            iters = [entry["iter"] for entry in log.train]
            values = [entry["loss"] for entry in log.train]
            window = smoothing_window(values)
            loss.plot(iters, values, color=color, alpha=0.3, linewidth=1)
            label = f"{log.name}, mean of {window} entries" if window > 1 else log.name
            loss.plot(iters, smooth(values, window), color=color, label=label)
            lr.plot(iters, [entry["lr"] for entry in log.train], color=color, label=log.name)
        losses = [(entry["iter"], entry["loss"]) for entry in log.val if "loss" in entry]
        if losses:
            loss.plot(*zip(*losses), "o--", color=color, label=f"{log.name}, validation")
        if log.val:
            scores = [100 * entry["mIoU"] for entry in log.val]
            score.plot([entry["iter"] for entry in log.val], scores, "o-", color=color, label=log.name)
            last = log.val[-1]["iter"], scores[-1]
            score.annotate(f"{scores[-1]:.2f}", last, (0, 6), textcoords="offset points", ha="center")
    loss.set(title="loss", xlabel="iteration", ylabel="loss")
    lr.set(title="learning rate", xlabel="iteration", ylabel="learning rate")
    score.set(title="validation", xlabel="iteration", ylabel="mIoU (%)")
    score.margins(x=0.1, y=0.15)
    if log_scale:
        loss.set_yscale("log")
        lr.set_yscale("log")
        loss.yaxis.set_major_formatter(LogFormatter())  # 2, 3 instead of 2 x 10^0
        loss.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    for axis in (loss, lr, score):
        axis.grid(alpha=0.3, which="both")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        else:
            axis.text(0.5, 0.5, "none in the log", transform=axis.transAxes, ha="center", color="gray")
    fig.savefig(path, dpi=100)
    plt.close(fig)
