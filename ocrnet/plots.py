"""Figures: samples with their predictions, scores, and curves of runs.

Notation: H W an image's size, K classes. Images are uint8 (H, W, 3), labels and predictions train ids (H, W).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .data.classes import IGNORE_INDEX, ClassTable
from .data.datasets import EvalDataset
from .evaluation import sample_predictions
from .files import SOFTWARE, atomic_write, check_output
from .inference import Forward
from .logs import Log, read_log, smooth, smoothing_window
from .metrics import ConfusionMatrix

matplotlib.use("Agg")  # files only, no screen
from matplotlib import pyplot as plt
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

IGNORED, RIGHT = 96, 235  # grays of ignored and of right pixels in error maps; classes may be black or white


def error_map(label: np.ndarray, prediction: np.ndarray, table: ClassTable) -> np.ndarray:
    """Wrong pixels in the color of their prediction; pale gray where right, dark gray where ignored."""
    colors = np.where((prediction != label)[..., None], table.palette[prediction], RIGHT).astype(np.uint8)
    colors[label == IGNORE_INDEX] = IGNORED
    return colors


def image_axes(
    image: np.ndarray, rows: int, columns: int, width: float, margin: float, title: float = 0.3
) -> tuple[plt.Figure, np.ndarray]:
    """A figure of axes in the shape of ``image``, at most twice as tall as wide. Return it and its axes.

    An image is ``width`` inches wide. The figure and each row are ``margin`` and ``title`` inches taller than images.
    """
    height = rows * (width * min(image.shape[0] / image.shape[1], 2) + title) + margin
    fig, axes = plt.subplots(rows, columns, figsize=(columns * width, height), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    return fig, axes.ravel()


def save_figure(fig: plt.Figure, path: Path) -> None:
    """Write and close a figure, marked as ours. Raise InputError if the file exists, and is no figure of ours."""
    check_output(path, "figure")
    with atomic_write(path) as part:
        fig.savefig(part, format="png", dpi=100, metadata={"Software": SOFTWARE, "Title": "figure"})
    plt.close(fig)


def show_images(axes: Iterable[plt.Axes], images: Mapping[str, np.ndarray], **look: Any) -> AxesImage:
    """Show each image under its title. Return the last one."""
    for axis, (title, image) in zip(axes, images.items()):
        shown = axis.imshow(image, interpolation="nearest", **look)
        axis.set_title(title)
    return shown


def class_legend(fig: plt.Figure, classes: Iterable[int], table: ClassTable) -> None:
    """Colors and names below the figure, as many in a row as its width holds."""
    classes = [k for k in classes if k != IGNORE_INDEX]
    patches = [Patch(facecolor=table.palette[k] / 255, edgecolor="0.5", label=table.names[k]) for k in classes]
    longest = max((len(table.names[k]) for k in classes), default=1)
    columns = max(int(fig.get_figwidth() / (0.075 * longest + 0.55)), 1)  # inches of a name in this font
    rows = max(-(-len(classes) // columns), 1)
    columns = max(-(-len(classes) // rows), 1)  # as few as fill these rows
    fig.set_figheight(fig.get_figheight() + 0.2 * (rows - 1))
    fig.legend(handles=patches, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def draw_matrix(
    axis: plt.Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], top: float, form: str, cmap: str
) -> AxesImage:
    """Values (R, C) from 0 to ``top`` as colors, with numbers unless they are small or the matrix is large."""
    image = axis.imshow(values, vmin=0, vmax=top, cmap=cmap, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    for i, j in np.argwhere(values >= 0.005 * top) if len(columns) <= 30 else ():
        text, color = form.format(values[i, j]).lstrip("0"), "black" if values[i, j] > 0.6 * top else "white"
        axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    return image


def draw_run(folder: Path, forward: Forward, dataset: EvalDataset, confusion: ConfusionMatrix, title: str) -> None:
    """curve.png, samples.png and scores.png of a run, in its folder. ``title`` is that of the scores."""
    plot_curves([read_log(folder)], folder / "curve.png")
    save_samples(folder / "samples.png", sample_predictions(forward, dataset), dataset.table)
    save_scores(folder / "scores.png", confusion, dataset.table, title)


def save_samples(path: Path, samples: Sequence[tuple[np.ndarray, ...]], table: ClassTable) -> None:
    """One row per sample: image, label, predictions, and the errors of the final one.

    A sample is (image, label, final prediction, prediction of the auxiliary output), without the last for FCNHead.
    """
    columns = len(samples[0]) + 1
    tallest = max((sample[0] for sample in samples), key=lambda image: image.shape[0] / image.shape[1])
    fig, axes = image_axes(tallest, len(samples), columns, 3.0, 1.1, title=0.1)
    for row, (image, *maps) in zip(axes.reshape(-1, columns), samples):
        colors = dict(zip(("label", "final prediction", "auxiliary output"), (table.palette[x] for x in maps)))
        errors = {"errors, in the color of the prediction": error_map(*maps[:2], table)}
        show_images(row, {"image": image, **colors, **errors})
    for axis in axes[columns:]:  # titles above the first row only
        axis.set_title("")
    class_legend(fig, sorted({k for _, *maps in samples for k in np.unique(maps[:2])}), table)
    save_figure(fig, path)


def save_scores(path: Path, confusion: ConfusionMatrix, table: ClassTable, title: str) -> None:
    """IoU of each class, and the confusion matrix as shares of each label's pixels."""
    iou, counts = 100 * confusion.iou().numpy(), confusion.counts.cpu().double()
    size, ticks = (16, max(7.5, 0.2 * len(table))), range(len(table))
    fig, (bars, matrix) = plt.subplots(1, 2, figsize=size, width_ratios=[1, 1.7], layout="constrained")
    bars.barh(ticks, np.nan_to_num(iou), color=table.palette[: len(table)] / 255, edgecolor="0.3", linewidth=0.5)
    for k in ticks:
        bars.text(np.nan_to_num(iou[k]) + 1, k, "does not occur" if np.isnan(iou[k]) else f"{iou[k]:.1f}", va="center")
    bars.set(title=f"IoU, mean {100 * confusion.mean_iou():.2f} %", xlabel="IoU (%)", xlim=(0, 112))
    bars.set(ylim=(len(table) - 0.5, -0.5), yticks=ticks, yticklabels=table.names)
    shares = (100 * counts / counts.sum(1, keepdim=True)).numpy()  # nan without labels
    image = draw_matrix(matrix, shares, table.names, table.names, 100, "{:.0f}", "magma")
    matrix.set(title="confusion matrix", xlabel="prediction", ylabel="label")
    fig.colorbar(image, ax=matrix, label="share of the label's pixels (%)", shrink=0.9)
    fig.suptitle(title)
    save_figure(fig, path)


def plot_curves(logs: Sequence[Log], path: Path) -> None:
    """Loss (of training raw and smoothed, of validation), learning rate and validation mIoU of one or more runs."""
    fig, (loss, lr, score) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for i, log in enumerate(logs):
        color, marker = f"C{i % 10}", "o" if len(log.train) == 1 else ""
        if log.train:
            iters, values, rates = zip(*((entry["iter"], entry["loss"], entry["lr"]) for entry in log.train))
            window = smoothing_window(values)
            label = f"{log.name}, mean of {window} entries" if window > 1 else log.name
            loss.plot(iters, values, color=color, alpha=0.3, linewidth=1)
            loss.plot(iters, smooth(values, window), color=color, marker=marker, label=label)
            lr.plot(iters, rates, color=color, marker=marker, label=log.name)
        losses = [(entry["iter"], entry["loss"]) for entry in log.val if entry.get("loss") is not None]
        if losses:
            loss.plot(*zip(*losses), "o--", color=color, label=f"{log.name}, validation")
        scores = [(entry["iter"], 100 * entry["mIoU"]) for entry in log.val]
        if scores:
            score.plot(*zip(*scores), "o-", color=color, label=log.name)
            score.annotate(f"{scores[-1][1]:.2f}", scores[-1], (0, 6), textcoords="offset points", ha="center")
    score.margins(x=0.1, y=0.15)
    titles = {"loss": "loss", "learning rate": "learning rate", "validation": "mIoU (%)"}
    for axis, (title, label) in zip((loss, lr, score), titles.items()):
        axis.set(title=title, xlabel="iteration", ylabel=label)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        elif not axis.lines:
            axis.text(0.5, 0.5, "none in the log", transform=axis.transAxes, ha="center", color="gray")
    save_figure(fig, path)
