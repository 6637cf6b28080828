"""A run: its state, the settings that a resumed run is compared with, and its folder.

The folder holds log.jsonl, last.pt and best.pt, and belongs to one run at a time.
"""

import argparse
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint import load_checkpoint, save_checkpoint
from .data.classes import ClassTable
from .data.datasets import Data
from .device import Accelerator
from .errors import InputError
from .evaluation import sample_predictions
from .files import remove_partial_files
from .logs import read_log
from .metrics import ConfusionMatrix
from .models import OCRNet

try:
    import fcntl
except ImportError:  # Windows: the folder is not locked
    fcntl = None


@dataclass
class RunState:
    """What a checkpoint holds: the model, its optimizer, and the progress of the run."""

    model: OCRNet
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    iteration: int = 0  # optimizer steps done
    validated: int = 0  # iteration of the last validation
    best_miou: float = -math.inf
    confusion: ConfusionMatrix | None = None  # of the last validation; not in the checkpoint

    def state_dict(self) -> dict:
        progress = {"iter": self.iteration, "validated": self.validated, "best": self.best_miou}
        optimizer = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return {"model": self.model.state_dict(), "config": self.model.config, **optimizer, **progress}

    def load_progress(self, checkpoint: dict) -> None:
        """Load everything but the model, which ``restore_model`` builds."""
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty without loss scaling
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.iteration, self.validated = checkpoint["iter"], checkpoint["validated"]
        self.best_miou = checkpoint["best"]


# ---- resuming --------------------------------------------------------------------------------------------------------

# Settings that must not change when a run resumes, and settings that may.
MUST_MATCH = [
    "model", "head", "align_corners", "dropout", "max_iters", "seed", "classes", "global_batch", "train_images",
]  # fmt: skip
MAY_DIFFER = [
    "lr", "min_lr", "momentum", "weight_decay", "crop_size", "scale_range", "scale_step", "cat_max_ratio",
    "color_jitter", "class_weights", "avg_non_ignore", "ohem", "accum_steps", "world_size", "device", "amp",
    "amp_dtype",
]  # fmt: skip


def run_settings(args: argparse.Namespace, table: ClassTable, train_images: int, accelerator: Accelerator) -> dict:
    """The flags of train.py, and what else ``check_resumable`` compares."""
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return flags | dict(
        classes=", ".join(table.names),
        train_images=train_images,
        global_batch=args.batch_size * args.accum_steps * accelerator.world_size,
        world_size=accelerator.world_size,
        device=accelerator.device.type,
        amp=accelerator.amp,
        amp_dtype=str(accelerator.amp_dtype),
    )


def load_last(folder: Path, resume: bool, accelerator: Accelerator) -> dict | None:
    """last.pt of the run to resume, read by rank 0 for all ranks. None for a new run.

    Raises:
        InputError: the folder holds a run and ``resume`` is False, or last.pt is not the checkpoint of a run.
    """
    last, checkpoint = folder / "last.pt", None
    if accelerator.is_main and last.exists():
        if not resume:
            raise InputError(f"--output-dir {folder}: holds a run: add --resume, or choose another folder")
        checkpoint = load_checkpoint(last)
        if "optimizer" not in checkpoint:
            raise InputError(f"{last}: expected a run to resume, found only a model: start from it with --weights")
    return accelerator.broadcast(checkpoint)


def check_resumable(checkpoint: dict, settings: dict, path: Path) -> list[str]:
    """Compare the settings of the checkpoint ``path`` with those of the run that resumes it.

    Returns:
        A note for each setting that may differ and does, and one for all that an older checkpoint does not have.

    Raises:
        InputError: a setting of ``MUST_MATCH`` differs.
    """
    saved = checkpoint.get("settings")
    if saved is None:  # an older version: flags of other names, None where they were left out
        older = {**checkpoint.get("args", {}), **checkpoint.get("conditions", {})}
        saved = {name: value for name, value in older.items() if value is not None}
    for name in MUST_MATCH:
        if saved.get(name, settings[name]) != settings[name]:
            raise InputError(f"--resume: expected {name} {saved[name]} as in {path}, found {settings[name]}")
    notes = [
        f"{name} is {settings[name]}, it was {saved[name]}"
        for name in MAY_DIFFER
        if saved.get(name, settings[name]) != settings[name]
    ]
    unknown = [name for name in MUST_MATCH + MAY_DIFFER if name not in saved]
    return notes + ([f"not in the checkpoint, so not compared: {', '.join(unknown)}"] if unknown else [])


# ---- the folder ------------------------------------------------------------------------------------------------------


class RunFolder:
    """log.jsonl and the checkpoints of a run. On other ranks than 0 it does nothing.

    Args:
        path: created if it does not exist.
        is_main: whether this is rank 0.
        entries: added to every checkpoint.
        iteration, validated: of the checkpoint that is resumed. Later log entries are dropped, as the run repeats them.

    Raises:
        InputError: another process holds the folder.
    """

    def __init__(self, path: Path, is_main: bool, entries: dict | None = None, iteration: int = 0, validated: int = 0):
        self.path, self.is_main, self.entries = Path(path), is_main, entries or {}
        if not is_main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path / "log.jsonl", "a+b")  # noqa: SIM115 (open, and so locked, until the process ends)
        if fcntl:
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by data loader workers
            except BlockingIOError:
                raise InputError(f"--output-dir {path}: another run is writing there: choose another folder") from None
        remove_partial_files(self.path.glob("*.part*"))
        self.file.truncate(self._length_until({"train": iteration, "val": validated}))

    def _length_until(self, last: dict[str, int]) -> int:
        """Bytes of the log before the first entry that is incomplete or later than the last iteration of its split."""
        length = 0
        self.file.seek(0)
        for line in self.file:
            try:
                entry = json.loads(line)
                if not line.endswith(b"\n") or entry["iter"] > last[entry["split"]]:
                    break
            except (ValueError, KeyError, TypeError):
                break
            length += len(line)
        return length

    def log(self, entry: dict) -> None:
        """Append a line to log.jsonl."""
        if self.is_main:
            try:
                self.file.write(json.dumps(entry).encode() + b"\n")
                self.file.flush()
            except OSError as error:
                raise InputError(f"{self.path / 'log.jsonl'}: cannot be written ({error.strerror})") from error

    def save(self, name: str, state: dict) -> None:
        """Write a checkpoint, after its log has reached the disk."""
        if self.is_main:
            os.fsync(self.file.fileno())
            save_checkpoint(self.path / name, {**state, **self.entries})


def draw_run(folder: Path, state: RunState, data: Data, accelerator: Accelerator) -> None:
    """curve.png, samples.png and, if there was a validation, scores.png."""
    from .visualize import plot_curves, save_samples, save_scores  # only here: matplotlib is slow to import

    plot_curves([read_log(folder)], folder / "curve.png")
    save_samples(folder / "samples.png", sample_predictions(state.model.eval(), data.val, accelerator), data.table)
    if state.confusion:
        save_scores(folder / "scores.png", state.confusion, data.table)
