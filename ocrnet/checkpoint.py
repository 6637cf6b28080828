"""Checkpoints: written atomically, read without running code.

A checkpoint holds CPU tensors and plain Python only:

{"model": state_dict, "config": arguments of build_model, "classes": rows of classes.json, "iter": optimizer steps,
 "validated": iteration of the last validation, "best": best mIoU, "optimizer": state_dict, "scaler": state_dict,
 "settings": flags and what else a resumed run is compared with, see run.py}
"""

import os
from pathlib import Path

import torch

from .data.classes import ClassTable, classes_from_meta
from .errors import InputError
from .files import atomic_write
from .models import OCRNet, build_model
from .models.weights import build_from_checkpoint, check_finite, read_file


def to_cpu(state: object) -> object:
    """A copy of nested dicts, lists and values with its tensors on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(to_cpu(value) for value in state)
    return state


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint atomically and flush it to the disk.

    Raises:
        InputError: it cannot be written, as on a full disk. The old file stays.
    """
    path = Path(path)
    try:
        with atomic_write(path) as part, open(part, "wb") as file:
            torch.save(to_cpu(state), file)
            file.flush()
            os.fsync(file.fileno())
        if os.name == "posix":  # flush the rename, too
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a failed write
        kept = "the last one is complete" if path.exists() else "there is none yet"
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: the checkpoint could not be written, {kept} ({reason})") from error


def is_checkpoint(state: object) -> bool:
    return isinstance(state, dict) and {"model", "config"} <= state.keys()


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of this project onto the CPU.

    Raises:
        InputError: the file cannot be read, or is not a checkpoint of this project.
    """
    state = read_file(path)
    if not is_checkpoint(state):
        raise InputError(f"{path}: expected a checkpoint of this project with entries 'model' and 'config'")
    return state


def restore_model(state: dict, path: Path) -> OCRNet:
    """Build the model of a checkpoint, with its weights. ``path`` is for errors.

    Raises:
        InputError: 'model' and 'config' do not fit, or a tensor is nan or infinite.
    """
    try:
        model = build_model(**state["config"])
        model.load_state_dict(state["model"], assign=True)  # with their memory format, which affects the last bit
        model.float()  # half-precision tensors
    except (InputError, RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: its tensors do not fit its 'config' ({reason})") from None
    check_finite(model.state_dict(), path)
    return model


def load_model(path: Path) -> tuple[OCRNet, ClassTable | None]:
    """The model of a file in evaluation mode, and its classes if the file has them.

    Accepts checkpoints of this project, and whole OCRNets of mmsegmentation and of the authors.
    """
    state = read_file(path)
    if not is_checkpoint(state):
        return build_from_checkpoint(path).eval(), classes_from_meta(state, str(path))
    table = ClassTable.from_rows(state["classes"], str(path)) if "classes" in state else None
    return restore_model(state, path).eval(), table
