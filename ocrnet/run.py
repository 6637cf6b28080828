"""A run's folder, held by one run at a time: its log and its checkpoints. And what may differ when a run resumes."""

import json
import os
from pathlib import Path

from .checkpoint import save_checkpoint
from .errors import InputError
from .files import remove_partial_files

try:
    import fcntl
except ImportError:  # Windows: the folder is not locked
    fcntl = None

# Settings of a run: flags of train.py, and what follows from the data and the processes.
MUST_MATCH = (
    "model", "head", "align_corners", "dropout", "max_iters", "seed", "classes", "global_batch", "train_images",
)  # fmt: skip
MAY_DIFFER = (
    "lr", "min_lr", "momentum", "weight_decay", "crop_size", "scale_range", "color_jitter", "class_weights", "ohem",
    "accum_steps", "world_size", "device", "amp", "amp_dtype",
)  # fmt: skip


def check_resumable(checkpoint: dict, settings: dict, path: Path) -> list[str]:
    """Compare the settings of the checkpoint ``path`` with those of the run that resumes it.

    Returns:
        A note for each setting that may differ and does, and one for all that an older checkpoint does not have.

    Raises:
        InputError: a setting of ``MUST_MATCH`` differs.
    """
    saved = checkpoint.get("settings") or {**checkpoint.get("args", {}), **checkpoint.get("conditions", {})}
    for name in MUST_MATCH:
        if saved.get(name, settings[name]) != settings[name]:
            raise InputError(f"--resume: expected {name} {saved[name]} as in {path}, found {settings[name]}")
    notes = [
        f"{name} is {settings[name]}, it was {saved[name]}"
        for name in MAY_DIFFER
        if saved.get(name, settings[name]) != settings[name]
    ]
    unknown = [name for name in MUST_MATCH + MAY_DIFFER if name not in saved]
    return notes + ([f"an older checkpoint, which does not say: {', '.join(unknown)}"] if unknown else [])


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
