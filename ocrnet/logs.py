"""Reading training logs: this project's log.jsonl, mmsegmentation 0.x's .log.json, and 1.x's text logs (mmengine)."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import InputError

MIN_ENTRIES = 10  # of each log, for a comparison


class Log(NamedTuple):
    """The entries of a log, as in log.jsonl."""

    name: str
    train: list[dict]  # iter, loss, lr, ...
    val: list[dict]  # iter, mIoU (0 .. 1), ...


def read_log(path: Path) -> Log:
    """Read a log file, or the log.jsonl of a run's folder.

    Raises:
        InputError: the file cannot be read, or has no entries.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "log.jsonl"
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    names = [folder.name for folder in path.resolve().parents]
    if path.suffix != ".jsonl":
        names.insert(0, path.stem.removesuffix(".log"))
    # WORK_DIR/20240501_100000/20240501_100000.log is WORK_DIR
    name = next((name for name in names if not re.fullmatch(r"\d{8}_\d{6}", name)), "")
    train, val, last = {}, {}, 0  # iteration -> entry; of an iteration that was repeated the last counts
    for line in lines:
        entry = parse_json_line(line, last) or parse_mmengine_line(line, last)
        if entry.get("split") == "train" and isinstance(entry.get("loss"), (int, float)):
            last = entry["iter"]
            train[last] = {"lr": math.nan} | {key: value for key, value in entry.items() if value is not None}
        elif entry.get("split") == "val" and entry.get("mIoU") is not None:  # None: no valid pixels
            val[entry["iter"]] = entry
    if not train and not val:
        raise InputError(f"{path}: expected log.jsonl, .log.json, or lines 'Iter(train) [ 50/40000] ... loss: ...'")
    return Log(name, *([entries[key] for key in sorted(entries)] for entries in (train, val)))


def parse_json_line(line: str, last: int = 0) -> dict:
    """A line of log.jsonl, or of mmsegmentation 0.x in that form. {} if it is something else or damaged.

    mmsegmentation's validations may count images, so their iteration is ``last``, that of the last training line.
    """
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(entry, dict) or type(entry.get("iter")) is not int:
        return {}
    if entry.get("mode") == "val":
        return {"split": "val", "iter": last, "mIoU": entry.get("mIoU")} if last else {}
    return entry | ({"split": "train"} if entry.get("mode") == "train" else {})


def parse_mmengine_line(line: str, last: int) -> dict:
    """'Iter(train) [ 1435/40000] lr: 9.7e-03 ... loss: 0.6168 ...' or 'Iter(val) [500/500] ... mIoU: 76.61 ...'.

    A validation line counts images, so its iteration is ``last``, that of the last training line.
    """
    values = {
        key: float(value)
        for key, value in re.findall(r"(\w+): ([-+]?(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|nan|inf))(?=\s|$)", line)
    }
    iteration = re.search(r"Iter\(train\)\s*\[\s*(\d+)\s*/\s*\d+\]", line)
    if iteration and "loss" in values:
        lr = values.get("lr", float("nan"))
        return {"split": "train", "iter": int(iteration[1]), "loss": values["loss"], "lr": lr}
    if "mIoU" in values and last:
        return {"split": "val", "iter": last, "mIoU": values["mIoU"] / 100}
    return {}


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Running mean over the finite ones of the last ``window`` values (fewer at the beginning), nan without any.

    >>> smooth([4, 2, 0, 0], window=2).tolist()
    [4.0, 3.0, 1.0, 0.0]
    """
    finite = np.isfinite(values)
    sums, counts = (np.cumsum([0, *x]) for x in (np.where(finite, values, 0.0), finite))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    with np.errstate(invalid="ignore"):
        return (sums[stop] - sums[start]) / (counts[stop] - counts[start])


def compare_losses(first: Log, second: Log) -> tuple[np.ndarray, np.ndarray]:
    """The smoothed training losses of two logs at the iterations of the first that both cover.

    Raises:
        InputError: fewer than ``MIN_ENTRIES`` of one are at iterations that both cover.
    """
    iterations = [[entry["iter"] for entry in log.train] for log in (first, second)]
    low, high = max(min(x, default=math.inf) for x in iterations), min(max(x, default=-math.inf) for x in iterations)
    common = [[entry for entry in log.train if low <= entry["iter"] <= high] for log in (first, second)]
    if min(map(len, common)) < MIN_ENTRIES:
        raise InputError(
            f"--compare: expected {MIN_ENTRIES} training entries or more of each log at the same iterations, found "
            f"{len(common[0])} of {first.name}, {len(common[1])} of {second.name}: train longer or log more often"
        )
    x, other_x = ([entry["iter"] for entry in entries] for entries in common)
    losses = ([entry["loss"] for entry in entries] for entries in common)
    # a loss that is not finite is equal to none
    a, b = (np.where(np.isfinite(values), smooth(values, smoothing_window(values)), np.nan) for values in losses)
    return a, np.interp(x, other_x, b)


def smoothing_window(values: Sequence[float]) -> int:
    """The entries that a drawn curve is a mean of: a fifteenth of the log."""
    return len(values) // 15 + 1
