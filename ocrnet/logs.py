"""Reading training logs: this project's log.jsonl, and the text logs of mmengine (mmsegmentation 1.x)."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from .errors import InputError


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
    folders = path.resolve().parents
    name = folders[0].name if path.suffix == ".jsonl" else path.stem
    if re.fullmatch(r"\d{8}_\d{6}", name) and len(folders) > 1:  # WORK_DIR/20240501_100000/20240501_100000.log
        name = folders[1].name
    train, val = [], []
    for line in lines:
        entry = parse_json_line(line) if line.startswith("{") else parse_mmengine_line(line, train)
        if entry.get("split") and entry.get("mIoU", 0) is not None:  # None: no valid pixels
            (train if entry["split"] == "train" else val).append(entry)
    if not train and not val:
        raise InputError(f"{path}: expected log.jsonl, or mmengine's lines 'Iter(train) [ 50/40000] ... loss: ...'")
    return Log(name, train, val)


def parse_json_line(line: str) -> dict:
    """A line of log.jsonl. {} if it is incomplete, as after a crash."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {}


def parse_mmengine_line(line: str, train: list[dict]) -> dict:
    """'Iter(train) [ 1435/40000] lr: 9.7e-03 ... loss: 0.6168 ...' or 'Iter(val) [500/500] ... mIoU: 76.61 ...'.

    A validation line counts images, so its iteration is that of the last training line.
    """
    values = {key: float(value) for key, value in re.findall(r"(\w+): ([-+.\deE]+|nan|inf)(?=\s|$)", line)}
    iteration = re.search(r"Iter\(train\)\s*\[\s*(\d+)\s*/\s*\d+\]", line)
    if iteration and "loss" in values:
        lr = values.get("lr", float("nan"))
        return {"split": "train", "iter": int(iteration[1]), "loss": values["loss"], "lr": lr}
    if "mIoU" in values and train:
        return {"split": "val", "iter": train[-1]["iter"], "mIoU": values["mIoU"] / 100}
    return {}
