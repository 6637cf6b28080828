"""Checkpoints: whole or absent, read without running code; and what must match when a run resumes.

A checkpoint holds CPU tensors and plain Python only:

{"model": state_dict, "config": arguments of build_model, "classes": rows of classes.json,
 "size": [H, W], the medians of the training images, to which evaluate.py brings photos,
 "about": a line that evaluate.py prints, in files that are published,
 "iter": optimizer steps, "validated": iteration of the last validation, "best": best mIoU, "optimizer": state_dict,
 "schedule": state_dict, "scaler": state_dict, "settings": the flags of train.py and what else is compared on resume}
"""

from pathlib import Path
from typing import Any

import torch

from . import InputError
from .data.classes import CITYSCAPES, ClassTable, classes_from_meta
from .files import atomic_write
from .models import OCRNet, build_model
from .models.weights import build_from_weights, check_finite, find_tensors, read_file, rename


def to_cpu(state: Any) -> Any:
    """Nested dicts, lists and values with their tensors on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    return [to_cpu(value) for value in state] if isinstance(state, list) else state


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint atomically.

    Raises:
        InputError: a weight is nan or infinite, or the file cannot be written. The old file stays.
    """
    state = to_cpu(state)
    check_finite(state["model"], f"{path} was not written, the last one stays: try a lower --lr, or --no-amp")
    with atomic_write(path) as part:
        torch.save(state, part)


def load_checkpoint(path: Path) -> dict:
    """Read the checkpoint of a run onto the CPU.

    Raises:
        InputError: the file cannot be read, or holds no run.
    """
    state = read_file(path)
    if not isinstance(state, dict) or not {"model", "config", "optimizer", "iter", "settings"} <= state.keys():
        raise InputError(f"{path}: expected the last.pt of a run; start from other weights with --weights")
    return state


def restore_model(state: dict, path: Path) -> OCRNet:
    """Build the model of a checkpoint, with its weights in float32. ``path`` is for errors.

    Raises:
        InputError: 'model' and 'config' do not fit, or a tensor is nan or infinite.
    """
    try:
        model = build_model(**state["config"])
        model.load_state_dict(state["model"], assign=True)  # with their memory format, which affects the last bit
        model.float()  # half-precision tensors
    except (InputError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: its tensors do not fit its 'config' ({' '.join(str(error).split())[:300]})"
        ) from None
    check_finite(model.state_dict(), path)
    return model


def load_model(source: Path | str) -> tuple[OCRNet, ClassTable | None]:
    """The model of a file or of a name of hub.py in evaluation mode, and its classes if the file has them.

    Accepts checkpoints of this project, and whole OCRNets of mmsegmentation and of the authors. The model's
    ``long_side`` is the longer side of its training images (0: unknown), ``entry`` the entry of the file with its
    weights (averaged ones are preferred), ``about`` the file's text of that name or "".
    """
    state = read_file(source)
    entry, tensors = find_tensors(state, source)
    if {"model", "config"} <= state.keys():
        if entry != "model":
            ours = {rename(name): x for name, x in tensors.items()}
            state["model"] = {name: ours[name] for name in state["model"].keys() & ours.keys()}
        table = ClassTable.from_rows(state["classes"], str(source)) if "classes" in state else None
        model = restore_model(state, source)
        model.long_side = max(state.get("size", [0]))
    else:
        model, table = build_from_weights(state, source), classes_from_meta(state, str(source))
        is_cityscapes = model.config["num_classes"] == len(CITYSCAPES) and table in (None, CITYSCAPES)
        model.long_side = 2048 if is_cityscapes else 0
    model.about, model.entry = str(state.get("about", "")), entry
    return model.eval(), table
