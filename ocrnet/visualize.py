"""Pictures: class maps in the data set's colours, samples side by side, the method step by step, a run's curves.

Letters: H W a picture's size, h w the feature map's, K classes.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from .data.classes import IGNORE, ClassTable
from .errors import InputError
from .inference import Explanation
from .metrics import ConfusionMatrix

matplotlib.use("Agg")  # files only: no screen is needed
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatter

MENDED, SPOILED = (0, 150, 0), (220, 0, 0)


def overlay(photo: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The mean of a photo and its classes' colours, all uint8 (H, W, 3)."""
    return ((photo.astype(np.uint16) + colours) // 2).astype(np.uint8)


def save_samples(
    path: Path, photos: Sequence[np.ndarray], labels: Sequence[np.ndarray], outputs: Sequence[list], table: ClassTable
) -> None:
    """One row a picture: photo (H, W, 3), label, the network's outputs, and what is wrong in the final one.

    Args:
        outputs: of each photo the final and, with the OCR head, the coarse classes (H, W).
    """
    predictions = ("coarse", "final")[-len(outputs[0]) :]
    titles = ("photo", "label (black: not scored)", *predictions, "wrong, as what")
    fig, axes = panels(photos[0], len(photos), len(titles), 3.0, 1.1, title=0.1)
    for row, photo, label, classes in zip(axes.reshape(len(photos), -1), photos, labels, outputs):
        maps = [table.palette[x] for x in (label, *reversed(classes))]
        for axis, picture in zip(row, (photo, *maps, colour_errors(label, classes[0], table))):
            axis.imshow(picture, interpolation="nearest")
    for axis, title in zip(axes, titles):
        axis.set_title(title)
    class_legend(fig, range(len(table)), table)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def colour_errors(label: np.ndarray, classes: np.ndarray, table: ClassTable) -> np.ndarray:
    """What wrong pixels (H, W) were taken for, in its colour; white where right, black where not scored."""
    wrong = np.where((classes != label)[..., None], table.palette[classes], 255).astype(np.uint8)
    wrong[label == IGNORE] = 0
    return wrong


def save_scores(path: Path, confusion: ConfusionMatrix, table: ClassTable) -> None:
    """IoU of each class as a bar, and the confusion matrix, rows the label's classes, as shares of each row."""
    iou = 100 * confusion.iou().numpy()
    counts = confusion.counts.cpu().numpy()
    labelled = counts.sum(1, keepdims=True)
    fig, (bars, matrix) = plt.subplots(1, 2, figsize=(16, 7.5), width_ratios=[1, 1.7], layout="constrained")
    ticks = range(len(table))
    bars.barh(ticks, np.nan_to_num(iou), color=table.palette[: len(table)] / 255, edgecolor="0.3", linewidth=0.5)
    for k in ticks:
        bars.text(np.nan_to_num(iou[k]) + 1, k, "does not occur" if np.isnan(iou[k]) else f"{iou[k]:.1f}", va="center")
    title = f"IoU, mean {100 * confusion.mean_iou():.2f} %"
    bars.set(title=title, xlabel="IoU (%)", xlim=(0, 112), ylim=(len(table) - 0.5, -0.5))
    bars.set_yticks(ticks, table.names)
    shares = 100 * counts / np.where(labelled, labelled, np.nan)
    image = draw_matrix(matrix, shares, table.names, table.names, 100, "{:.0f}", "magma")
    matrix.set(title="confusion: what the pixels of each class were taken for", xlabel="prediction", ylabel="label")
    fig.colorbar(image, ax=matrix, label="share of the label's pixels (%)", shrink=0.9)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def draw_matrix(
    axis: plt.Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], top: float, form: str, cmap: str
) -> AxesImage:
    """Values (R, C) from 0 to ``top`` as colours and, where they are half a percent of it or more, numbers."""
    image = axis.imshow(values, vmin=0, vmax=top, cmap=cmap, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    for i, j in np.argwhere(values >= 0.005 * top):
        color = "black" if values[i, j] > 0.6 * top else "white"
        text = form.format(values[i, j]).lstrip("0")
        axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    return image


# ---- the method, step by step ----------------------------------------------------------------------------------------


def save_explanation(
    prefix: str,
    photo: np.ndarray,
    explanation: Explanation,
    table: ClassTable,
    pixels: Sequence[tuple[int, int]] = (),
    label: np.ndarray | None = None,
) -> list[Path]:
    """One figure a step of the method, ``PREFIX_1_regions.png`` and so on -> their paths.

    Args:
        photo: (H, W, 3).
        pixels: (x, y) whose relation to the regions is shown; left out: of each class the surest pixel.
        label: (H, W) train ids, to show where the prediction is wrong.
    """
    coarse, final = explanation.coarse.argmax(0).numpy(), explanation.final.argmax(0).numpy()
    confidence = explanation.final.amax(0).numpy()
    pixels = list(pixels) or surest_pixels(final, confidence)
    figures = {
        "1_regions": draw_regions(photo, explanation.m.numpy(), table),
        "2_representations": draw_representations(explanation.f.numpy(), table),
        "3_relation": draw_relation(photo, explanation.w.numpy(), final, pixels, table),
        "4_segmentations": draw_segmentations(photo, coarse, final, table),
        "5_confidence": draw_confidence(photo, confidence),
    }
    if label is not None:
        figures["6_errors"] = draw_errors(label, coarse, final, table)
    paths = []
    for name, fig in figures.items():
        paths.append(Path(f"{prefix}_{name}.png"))
        fig.savefig(paths[-1], dpi=100)
        plt.close(fig)
    return paths


def panels(
    photo: np.ndarray, rows: int, columns: int, width: float, extra: float = 0.6, title: float = 0.3
) -> tuple[plt.Figure, np.ndarray]:
    """A figure of pictures shaped as the photo, ``width`` inches each -> figure, axes (rows * columns,).

    Args:
        extra, title: inches that the figure and each row are higher than the pictures.
    """
    height = width * photo.shape[0] / photo.shape[1] + title
    fig, axes = plt.subplots(
        rows, columns, figsize=(columns * width, rows * height + extra), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    return fig, axes.ravel()


def class_legend(fig: plt.Figure, classes: Iterable[int], table: ClassTable) -> None:
    patches = [Patch(color=table.palette[k] / 255, label=table.names[k]) for k in classes]
    fig.legend(handles=patches, loc="outside lower center", ncols=10, frameon=False, fontsize=9)


def surest_pixels(final: np.ndarray, confidence: np.ndarray) -> list[tuple[int, int]]:
    """(x, y) of the surest pixel of each class that is predicted, by class."""
    found = []
    for k in np.unique(final):
        y, x = np.unravel_index(np.where(final == k, confidence, -1).argmax(), final.shape)
        found.append((int(x), int(y)))
    return found


def draw_regions(photo: np.ndarray, m: np.ndarray, table: ClassTable) -> plt.Figure:
    """Soft object regions (K, h, w), as multiples of 1/N, which each pixel would have if all weighed the same."""
    fig, axes = panels(photo, len(table) // 5 + 1, 5, 3.0, 0.9)  # a picture more than classes
    axes[0].imshow(photo)
    axes[0].set_title("photo", fontsize=10)
    for axis, name, weights in zip(axes[1:], table.names, m):
        scale = LogNorm(0.01, 100, clip=True)
        image = axis.imshow(np.maximum(weights * weights.size, 0.01), norm=scale, cmap="magma", interpolation="nearest")
        axis.set_title(name, fontsize=10)
    fig.colorbar(image, ax=axes, orientation="horizontal", shrink=0.5, aspect=50, pad=0.02).set_label(
        "weight of a pixel in its class's region, as a multiple of 1/N (softmax over the N pixels)"
    )
    fig.suptitle("1. Soft object regions: which pixels each class's representation is gathered from")
    return fig


def draw_representations(f: np.ndarray, table: ClassTable) -> plt.Figure:
    """Object region representations (K, C): the cosine of each with each."""
    unit = f / np.linalg.norm(f, axis=1, keepdims=True).clip(1e-12)
    cosine = unit @ unit.T
    fig, axis = plt.subplots(figsize=(10, 8.6), layout="constrained")
    image = draw_matrix(axis, cosine, table.names, table.names, 1, "{:.2f}", "viridis")  # of ReLUs: none is negative
    fig.colorbar(image, label="cosine of two representations", shrink=0.8)
    axis.set_title("2. Object region representations: how alike they are")
    return fig


def draw_relation(
    photo: np.ndarray, w: np.ndarray, final: np.ndarray, pixels: Sequence[tuple[int, int]], table: ClassTable
) -> plt.Figure:
    """Pixel-region relation (K, h, w) at some pixels: a row each, a column a region."""
    fig, (where, matrix) = plt.subplots(
        1, 2, figsize=(16, 0.6 + max(4.5, 0.36 * len(pixels) + 2)), width_ratios=[1, 1.15], layout="constrained"
    )
    where.imshow(photo)
    where.set_axis_off()
    rows, names = [], []
    for number, (x, y) in enumerate(pixels, 1):
        where.plot(x, y, "o", color="white", markersize=13, markeredgecolor="black")
        where.text(x, y, number, ha="center", va="center", fontsize=8)
        i, j = y * w.shape[1] // photo.shape[0], x * w.shape[2] // photo.shape[1]
        rows.append(w[:, i, j])
        names.append(f"{number}: {table.names[final[y, x]]} ({x}, {y})")
    image = draw_matrix(matrix, np.array(rows), names, table.names, 1, "{:.2f}", "magma")
    matrix.set(xlabel="region", ylabel="pixel: what it is predicted as (x, y)")
    fig.colorbar(image, ax=matrix, label="w: the pixel's relation to the region; a row sums to 1")
    fig.suptitle("3. Pixel-region relation: from which regions a pixel takes its context")
    return fig


def draw_segmentations(photo: np.ndarray, coarse: np.ndarray, final: np.ndarray, table: ClassTable) -> plt.Figure:
    """Coarse and final classes (H, W), and where they differ."""
    fig, axes = panels(photo, 2, 2, 6.5, 1.2)
    changed = coarse != final
    colours = table.palette[final]
    pictures = (photo, table.palette[coarse], colours, np.where(changed[..., None], colours, 255))
    titles = ("photo", "coarse: the regions' own classes", "final", f"what the context changed: {changed.mean():.1%}")
    for axis, picture, title in zip(axes, pictures, titles):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(title)
    class_legend(fig, np.union1d(coarse, final), table)
    fig.suptitle("4. Segmentations: before and after the object context")
    return fig


def draw_confidence(photo: np.ndarray, confidence: np.ndarray) -> plt.Figure:
    """The final probability of the class that was chosen (H, W)."""
    fig, axes = panels(photo, 1, 2, 6.5, 0.6)
    axes[0].imshow(photo)
    axes[0].set_title("photo")
    image = axes[1].imshow(confidence, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes[1].set_title(f"probability of the class chosen, mean {confidence.mean():.2f}")
    fig.colorbar(image, ax=axes, shrink=0.8)
    fig.suptitle("5. Confidence")
    return fig


def draw_errors(label: np.ndarray, coarse: np.ndarray, final: np.ndarray, table: ClassTable) -> plt.Figure:
    """Against the label (H, W): what is wrong, and what the context mended or spoiled."""
    scored = label != IGNORE
    fig, axes = panels(label, 2, 2, 6.5, 1.2)
    right, was_right = final == label, coarse == label
    change = np.full((*label.shape, 3), 255, np.uint8)
    change[right & ~was_right] = MENDED
    change[~right & was_right] = SPOILED
    change[~scored] = 0
    share = [x[scored].mean() if scored.any() else np.nan for x in (right, right & ~was_right, ~right & was_right)]
    pictures = (table.palette[label], table.palette[final], colour_errors(label, final, table), change)
    titles = (
        "label (black: not scored)",
        f"final: {share[0]:.1%} of the scored pixels are right",
        "wrong pixels, in the colour of what they were taken for",
        f"the context mended {share[1]:.1%} (green), spoiled {share[2]:.1%} (red)",
    )
    for axis, picture, title in zip(axes, pictures, titles):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(title)
    class_legend(fig, np.union1d(label[scored], final), table)
    fig.suptitle("6. Errors")
    return fig


# ---- curves ----------------------------------------------------------------------------------------------------------


class Log(NamedTuple):
    """The entries of a run's log, dicts as in log.jsonl."""

    name: str
    train: list[dict]  # iter, loss, lr
    val: list[dict]  # iter, mIoU (0 .. 1)


def read_log(path: Path) -> Log:
    """A run's curve from this project's ``log.jsonl`` or from the text that mmengine logs, in a file or on a terminal.

    Raises:
        InputError: there is no such file, or no line of either form in it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "log.jsonl"
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    folders = path.resolve().parents
    name = folders[0].name if path.suffix == ".jsonl" else path.stem
    if (
        re.fullmatch(r"\d{8}_\d{6}", name) and len(folders) > 1
    ):  # mmengine's WORK_DIR/20240501_100000/20240501_100000.log
        name = folders[1].name
    train, val = [], []
    for line in lines:
        entry = parse_json_line(line) if line.startswith("{") else parse_mmengine_line(line, train)
        if entry.get("split") and entry.get("mIoU", 0) is not None:  # None: nothing to score
            (train if entry["split"] == "train" else val).append(entry)
    if not train and not val:
        raise InputError(f"{path}: no log: expected log.jsonl or mmengine's 'Iter(train) [ 50/40000] ... loss: ...'")
    return Log(name, train, val)


def parse_json_line(line: str) -> dict:
    """A line of ``log.jsonl``; nothing if a crash cut it short."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {}


def parse_mmengine_line(line: str, train: list[dict]) -> dict:
    """'Iter(train) [ 1435/40000] lr: 9.7e-03 ... loss: 0.6168 ...' or 'Iter(val) [500/500] ... mIoU: 76.61 ...'.

    The brackets of a validation count pictures, so it belongs to the last training line's iteration.
    """
    values = {key: float(value) for key, value in re.findall(r"(\w+): ([-+.\deE]+|nan|inf)(?=\s|$)", line)}
    iteration = re.search(r"Iter\(train\)\s*\[\s*(\d+)\s*/\s*\d+\]", line)
    if iteration and "loss" in values:
        return {"split": "train", "iter": int(iteration[1]), "loss": values["loss"], "lr": values.get("lr", np.nan)}
    if "mIoU" in values and train:
        return {"split": "val", "iter": train[-1]["iter"], "mIoU": values["mIoU"] / 100}
    return {}


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Running mean over the last ``window`` values (over fewer at the beginning).

    >>> smooth([4, 2, 0, 0], window=2).tolist()
    [4.0, 3.0, 1.0, 0.0]
    """
    sums = np.cumsum(np.concatenate([[0.0], values]))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    return (sums[stop] - sums[start]) / (stop - start)


def plot_curves(logs: Sequence[Log], path: Path, log_scale: bool = False) -> None:
    """Loss (raw and smoothed), learning rate and validation mIoU of one or more runs, a panel each.

    Args:
        log_scale: for loss and learning rate.
    """
    fig, (loss, lr, score) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for i, log in enumerate(logs):
        color = f"C{i % 10}"
        if log.train:
            iters = [entry["iter"] for entry in log.train]
            values = [entry["loss"] for entry in log.train]
            window = len(values) // 15 + 1
            loss.plot(iters, values, color=color, alpha=0.3, linewidth=1)
            loss.plot(iters, smooth(values, window), color=color, label=f"{log.name}, mean of {window} entries")
            lr.plot(iters, [entry["lr"] for entry in log.train], color=color, label=log.name)
        if log.val:
            scores = [100 * entry["mIoU"] for entry in log.val]
            score.plot([entry["iter"] for entry in log.val], scores, "o-", color=color, label=log.name)
            score.annotate(
                f"{scores[-1]:.2f}", (log.val[-1]["iter"], scores[-1]), (0, 6), textcoords="offset points", ha="center"
            )
    loss.set(title="training loss", xlabel="iteration", ylabel="loss")
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
