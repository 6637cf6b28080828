"""What a run leaves on the disk: checkpoints, written whole or not at all, and a log that fits them.

A checkpoint holds tensors (on the CPU, so that any machine can read them) and plain Python only:

{"model": state_dict, "config": arguments of build_model, "classes": the class table in the form of classes.json,
 "iter": iterations done, "best": best mIoU, "optimizer": state_dict, "scaler": state_dict, "args": flags, ...}
"""

import json
import os
from pathlib import Path

import torch

from .data.cityscapes import remove_unfinished, write_whole
from .data.classes import ClassTable
from .errors import InputError
from .models import OCRNet, build_model
from .models.weights import build_for, read_file

try:
    import fcntl
except ImportError:  # Windows: a run's folder is not locked there
    fcntl = None


def on_cpu(state: object) -> object:
    """The same nest of dicts, lists and values, its tensors on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(on_cpu(value) for value in state)
    return state


def save_checkpoint(path: Path, state: dict) -> None:
    """Write under another name, flush to the disk, rename: at any moment ``path`` is the old file or the new one.

    Raises:
        InputError: it cannot be written, as on a full disk. What was there before stays.
    """
    path = Path(path)
    try:
        with write_whole(path) as part, open(part, "wb") as file:
            torch.save(on_cpu(state), file)
            file.flush()
            os.fsync(file.fileno())
        if os.name == "posix":  # and the new name, which is an entry of the folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError for a write that failed
        kept = "the one before is whole" if path.exists() else "there was none before"
        while isinstance(error, RuntimeError) and error.__context__:
            error = error.__context__  # what it said it of
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{path}: this checkpoint could not be written, {kept} ({reason}): make room, then --resume"
        ) from error


def is_checkpoint(state: object) -> bool:
    return isinstance(state, dict) and {"model", "config"} <= state.keys()


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of this project onto the CPU, without running any code from the file.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    state = read_file(path)
    if not is_checkpoint(state):
        raise InputError(f"{path}: not a checkpoint of this project: expected entries 'model' and 'config'")
    return state


def restore_model(state: dict, path: Path) -> OCRNet:
    """The model that a checkpoint describes, with its weights. ``path`` is for the message.

    Raises:
        InputError: its tensors are not those of the model that its 'config' builds.
    """
    try:
        model = build_model(**state["config"])
        model.load_state_dict(state["model"], assign=True)  # with their layout in memory, on which the last bit hangs
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: its tensors and its 'config' are not of one model ({reason})") from None
    return model


def load_model(path: Path) -> tuple[OCRNet, ClassTable | None]:
    """The model of a file, with its weights, ready to predict, and what its classes are, if the file says so.

    Takes this project's checkpoints, and whole OCRNets of mmsegmentation and of the authors.
    """
    state = read_file(path)
    if not is_checkpoint(state):
        return build_for(path).eval(), None
    table = ClassTable.from_rows(state["classes"], str(path)) if "classes" in state else None
    return restore_model(state, path).eval(), table


class RunFolder:
    """The folder of a run, held by this process alone until it ends: its log and its checkpoints.

    Args:
        path: made if it is not there.
        iteration, validated: the last iteration that was trained, and validated, before: later entries of the log are
            dropped, for the run writes them again.

    Raises:
        InputError: another process holds the folder.
    """

    def __init__(self, path: Path, iteration: int = 0, validated: int = 0):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path / "log.jsonl", "a+b")  # noqa: SIM115 (open, and so locked, as long as the process)
        if fcntl:
            try:
                # of the kind that neither loader processes inherit nor a killed process leaves behind
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{path}: another run is writing there: choose another folder with --out") from None
        remove_unfinished(self.path.glob("*.part*"))
        self.file.truncate(self.length_until({"train": iteration, "val": validated}))

    def length_until(self, last: dict[str, int]) -> int:
        """Bytes of the log before its first entry that is later than the last one of its split, or cut short."""
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
        """Add a line to log.jsonl."""
        try:
            self.file.write(json.dumps(entry).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise InputError(f"{self.path / 'log.jsonl'}: cannot be written ({error.strerror})") from error

    def save(self, name: str, state: dict) -> None:
        """Write a checkpoint, after the log that belongs to it has reached the disk."""
        os.fsync(self.file.fileno())
        save_checkpoint(self.path / name, state)
