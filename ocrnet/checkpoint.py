"""Checkpoints: tensors and plain Python only, written whole or not at all.

{"model": state_dict, "config": arguments of build_model, "iter": iterations done, "best": best mIoU,
 "optimizer": state_dict, "scaler": state_dict, "args": the flags of the run}
"""

import os
from pathlib import Path

import torch

from .data.cityscapes import write_whole
from .errors import InputError
from .models import OCRNet, build_model
from .models.weights import build_for, read_file


def save_checkpoint(path: Path, state: dict) -> None:
    """Write under another name, flush to the disk, rename: at any moment ``path`` is the old file or the new one."""
    with write_whole(Path(path)) as part, open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


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


def load_model(path: Path) -> OCRNet:
    """The model that a checkpoint describes, with its weights, ready to predict.

    Takes this project's checkpoints, and whole OCRNets of mmsegmentation and of the authors.
    """
    state = read_file(path)
    if is_checkpoint(state):
        model = build_model(**state["config"])
        model.load_state_dict(state["model"])
    else:
        model = build_for(path)
    return model.eval()
