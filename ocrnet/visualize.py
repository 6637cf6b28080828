"""Pictures: class maps in Cityscapes' colours, samples side by side, and the curves of a run.

Letters: H W a picture's size, K classes.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from .data.cityscapes import CLASSES, IGNORE
from .errors import InputError

matplotlib.use("Agg")  # files only: no screen is needed
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

PALETTE = np.zeros((256, 3), np.uint8)  # train id -> RGB; 255 is black
for _label in CLASSES:
    PALETTE[_label.train_id] = _label.color


def colourise(classes: np.ndarray) -> np.ndarray:
    """Train ids (H, W) -> Cityscapes' colours, uint8 (H, W, 3)."""
    return PALETTE[classes]


def overlay(photo: np.ndarray, classes: np.ndarray, strength: float = 0.5) -> np.ndarray:
    """Photo uint8 (H, W, 3) with the classes (H, W) laid over it; unlabelled pixels stay as they are."""
    mixed = (1 - strength) * photo + strength * colourise(classes)
    return np.where((classes == IGNORE)[..., None], photo, mixed).round().astype(np.uint8)


def save_samples(
    path: Path, photos: Sequence[np.ndarray], labels: Sequence[np.ndarray], predictions: Sequence[np.ndarray]
) -> None:
    """One row a picture: photo (H, W, 3), label (H, W), prediction (H, W); the classes' colours below."""
    rows = len(photos)
    aspect = photos[0].shape[0] / photos[0].shape[1]
    width = 4.0  # inches of a picture
    fig, axes = plt.subplots(
        rows, 3, figsize=(3 * width, rows * width * aspect + 1.1), squeeze=False, layout="constrained"
    )
    for row, photo, label, prediction in zip(axes, photos, labels, predictions):
        for axis, picture in zip(row, (photo, colourise(label), colourise(prediction))):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], ("photo", "label (black: not scored)", "prediction")):
        axis.set_title(title)
    patches = [Patch(color=np.array(label.color) / 255, label=label.name) for label in CLASSES]
    fig.legend(handles=patches, loc="outside lower center", ncols=10, frameon=False, fontsize=9)
    fig.savefig(path, dpi=100)
    plt.close(fig)


# ---- curves ----------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    name: str
    train: list[dict[str, float]]  # iter, loss, lr
    val: list[dict[str, float]]  # iter, mIoU (0 .. 1)


def read_log(path: Path) -> Run:
    """A run's curve from this project's ``log.jsonl`` or from the text that mmengine logs.

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
    name = path.resolve().parent.name if path.suffix == ".jsonl" else path.stem
    train, val = [], []
    for line in lines:
        entry = parse_json_line(line) if line.startswith("{") else parse_mmengine_line(line, train)
        if entry and entry.get("mIoU", 0) is not None:  # None: nothing to score
            (train if entry["split"] == "train" else val).append(entry)
    if not train and not val:
        raise InputError(f"{path}: no log: expected log.jsonl or mmengine's 'Iter(train) [ 50/40000] ... loss: ...'")
    return Run(name, train, val)


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
    """Running mean over the last ``window`` values (over fewer at the beginning)."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    return (sums[stop] - sums[start]) / (stop - start)


def plot_curves(runs: Sequence[Run], path: Path) -> None:
    """Loss (raw and smoothed), learning rate and validation mIoU of one or more runs, a panel each."""
    fig, (loss, lr, score) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for i, run in enumerate(runs):
        color = f"C{i % 10}"
        if run.train:
            iters = [entry["iter"] for entry in run.train]
            values = [entry["loss"] for entry in run.train]
            window = len(values) // 15 + 1
            loss.plot(iters, values, color=color, alpha=0.3, linewidth=1)
            loss.plot(iters, smooth(values, window), color=color, label=f"{run.name}, mean of {window} entries")
            lr.plot(iters, [entry["lr"] for entry in run.train], color=color, label=run.name)
        if run.val:
            scores = [100 * entry["mIoU"] for entry in run.val]
            score.plot([entry["iter"] for entry in run.val], scores, "o-", color=color, label=run.name)
            score.annotate(
                f"{scores[-1]:.2f}", (run.val[-1]["iter"], scores[-1]), (0, 6), textcoords="offset points", ha="center"
            )
    loss.set(title="training loss", xlabel="iteration", ylabel="loss (final + 0.4 regions)")
    lr.set(title="learning rate", xlabel="iteration", ylabel="learning rate")
    score.set(title="validation", xlabel="iteration", ylabel="mIoU (%)")
    score.margins(x=0.1, y=0.15)
    for axis in (loss, lr, score):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        else:
            axis.text(0.5, 0.5, "none in the log", transform=axis.transAxes, ha="center", color="gray")
    fig.savefig(path, dpi=100)
    plt.close(fig)
