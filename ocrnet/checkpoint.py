"""Checkpoints: tensors and plain Python only, written whole or not at all.

{"model": state_dict, "config": {"model": "hr18", "num_classes": 19}, "iter": iterations done, "best": best mIoU,
 "optimizer": state_dict, "scaler": state_dict, "args": the flags of the run}
"""

import os
from pathlib import Path

import torch

from .data.cityscapes import write_whole
from .errors import InputError
from .models import OCRNet, build_model
from .models.weights import read_file


def save_checkpoint(path: Path, state: dict) -> None:
    """Write under another name, flush to the disk, rename: at any moment ``path`` is the old file or the new one."""
    with write_whole(Path(path)) as part, open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of this project onto the CPU, without running any code from the file.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    state = read_file(path)
    if not isinstance(state, dict) or not {"model", "config"} <= state.keys():
        raise InputError(f"{path}: not a checkpoint of this project: expected entries 'model' and 'config'")
    return state


def load_model(path: Path) -> OCRNet:
    """The model that a checkpoint describes, with its weights, ready to predict."""
    state = load_checkpoint(path)
    model = build_model(state["config"]["model"], state["config"]["num_classes"])
    model.load_state_dict(state["model"])
    return model.eval()
