"""The folder of a run: last.pt, best.pt and log.jsonl. Only rank 0 writes.

A checkpoint is whole or absent, and a run that is killed anywhere resumes from last.pt to the same weights.
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any

from . import InputError
from .checkpoint import load_checkpoint, save_checkpoint
from .device import Accelerator
from .files import atomic_write, named_errors
from .logs import parse_json_line

# Settings that a resumed run must have in common with its checkpoint. Others may differ, which is printed.
MUST_MATCH = (
    "model", "head", "classes", "train_images", "global_batch", "max_iters", "seed", "weights", "optimizer", "schedule"
)  # fmt: skip


class Run:
    """A run in its folder, new or resumed.

    Args:
        folder: is made with the first file.
        resume: continue from the last.pt in it, if there is one.

    Attributes:
        checkpoint: the contents of last.pt, None in a new run.
        iteration: optimizer steps that are done.
        validated: iteration of the last validation.
        best: the best mIoU.

    Raises:
        InputError: the folder holds a run that is not to be resumed, or last.pt cannot be read.
    """

    def __init__(self, folder: Path, resume: bool, accelerator: Accelerator):
        self.folder, self.accelerator = folder, accelerator
        self.last, self.log_path = folder / "last.pt", folder / "log.jsonl"
        found = [name for name in ("last.pt", "best.pt", "log.jsonl") if (folder / name).exists()]
        if found and not resume:
            raise InputError(f"--output-dir {folder}: holds a run: add --resume, or choose another folder")
        if "best.pt" in found and not self.last.exists():
            raise InputError(f"--resume: expected {self.last}, found only best.pt: start from it with --weights")
        self.checkpoint = accelerator.broadcast(
            load_checkpoint(self.last) if accelerator.is_main and self.last.exists() else None
        )
        progress = self.checkpoint or {"iter": 0, "validated": 0, "best": -math.inf}
        self.iteration, self.validated, self.best = progress["iter"], progress["validated"], progress["best"]

    def start(self, settings: dict, **parts: Any) -> None:
        """State what checkpoints hold, and restore it from last.pt where the run is resumed.

        Args:
            settings: the flags and what else is compared on resume. Differences are printed.
            parts: entry of a checkpoint -> a plain value, or an object with a ``state_dict``. The model is restored
                already. Optimizer and schedule keep the settings of the flags, such as the learning rate.

        Raises:
            InputError: a setting of ``MUST_MATCH``, the optimizer or the schedule differs.
        """
        optimizer, schedule = parts["optimizer"], parts["schedule"]
        sizes = " + ".join(str(len(group["params"])) for group in optimizer.param_groups)
        kinds = {"optimizer": f"{type(optimizer).__name__} of {sizes} tensors", "schedule": type(schedule).__name__}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
        del plain["resume"]  # which a run and those that resume it differ in
        self.settings, self.parts = plain | kinds, parts
        if self.checkpoint:
            self.compare(self.checkpoint["settings"])
            own = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": self.checkpoint["optimizer"]["state"], "param_groups": own})
            for name in parts.keys() - {"model", "optimizer", "schedule"}:
                if hasattr(parts[name], "load_state_dict") and self.checkpoint.get(name):
                    parts[name].load_state_dict(self.checkpoint[name])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no step of the optimizer came before
                for _ in range(self.iteration):
                    schedule.step()
            before, now = self.checkpoint.get("schedule", {}).get("_last_lr"), schedule.get_last_lr()
            if before not in (None, now):
                self.accelerator.print0(f"NOTE: the learning rate is {now}, it was {before}")
            self.checkpoint = None  # frees its memory
        if self.accelerator.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            trim_log(self.log_path, self.iteration, self.validated)

    def compare(self, saved: dict) -> None:
        """Print the settings that differ from the ``saved`` ones; InputError for those of ``MUST_MATCH``."""
        for name, now in self.settings.items():
            before = saved.get(name, now)  # runs of earlier versions have fewer
            if now != before and name in MUST_MATCH:
                raise InputError(f"--resume: expected {name} {before} as in {self.last}, found {now}")
            if now != before:
                self.accelerator.print0(f"NOTE: {name} is {now}, it was {before}")

    def due(self, every: int) -> bool:
        """Whether the iteration is a multiple of ``every``, or the last one."""
        return self.iteration % every == 0 or self.iteration == self.settings["max_iters"]

    def log(self, split: str, **entry: Any) -> None:
        """Append an entry to log.jsonl.

        Raises:
            InputError: the training loss is nan or infinite.
        """
        if self.accelerator.is_main:
            with named_errors(self.log_path), open(self.log_path, "a") as file:
                file.write(json.dumps({"split": split, "iter": self.iteration, **entry}) + "\n")
        if split == "train" and not math.isfinite(entry["loss"]):
            lr, loss = self.settings["lr"], entry["loss"]
            raise InputError(f"--lr {lr}: the loss is {loss}: add --resume, and a lower --lr or --no-amp")

    def save(self, name: str) -> None:
        """Write a checkpoint of the parts and the progress."""
        if self.accelerator.is_main:
            state = {key: x.state_dict() if hasattr(x, "state_dict") else x for key, x in self.parts.items()}
            state |= {"iter": self.iteration, "validated": self.validated, "best": self.best, "settings": self.settings}
            save_checkpoint(self.folder / name, state)

    def end(self, stopped: bool) -> None:
        """Wait until rank 0 has written everything, and print what there is."""
        self.accelerator.barrier()
        if stopped:
            self.accelerator.print0(f"stopped after iteration {self.iteration}: continue with --resume")
        elif self.accelerator.is_main:
            files = ", ".join(sorted(path.name for path in self.folder.iterdir()))
            self.accelerator.print0(f"best mIoU {self.best:.2%}; wrote {self.folder}/: {files}")


def trim_log(path: Path, iteration: int, validated: int) -> None:
    """Drop what a resumed run repeats: the entries after ``iteration``, the validations after ``validated``.

    Damaged lines go, too.
    """
    text = path.read_text(errors="replace") if path.exists() else ""

    def is_kept(line: str) -> bool:
        entry = parse_json_line(line)
        return entry.get("iter", math.inf) <= (validated if entry.get("split") == "val" else iteration)

    kept = "".join(f"{line}\n" for line in text.splitlines() if is_kept(line))
    if kept != text:
        with atomic_write(path) as part:
            part.write_text(kept)
