"""Start from somebody's weights, and say what came in.

Known so far: checkpoints of this project, and an ImageNet HRNet, whose names the backbone shares.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .ocrnet import OCRNet


class Report(NamedTuple):
    """Tensor names: what was loaded, what the file has beyond the model, what of the model kept its random start."""

    loaded: list[str]
    ignored: list[str]
    missing: list[str]

    def __str__(self) -> str:
        return f"{len(self.loaded)} tensors loaded, {len(self.ignored)} ignored, {len(self.missing)} missing"


def read_file(path: Path) -> Any:
    """What a file of torch.save holds, on the CPU, without running any code from it.

    Raises:
        InputError: there is no such file, or it is not one that can be read so.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # bytes of any other origin fail in any way
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise InputError(f"{path}: not a checkpoint that can be loaded safely ({reason})") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file.

    Raises:
        InputError: it cannot be read, or there are none.
    """
    state = read_file(path)
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise InputError(f"{path}: no tensors in it: expected a dict of tensors")
    return tensors


def load_weights(model: OCRNet, path: Path) -> Report:
    """Load what fits of a file: a checkpoint of this project, or an ImageNet HRNet into the backbone.

    Raises:
        InputError: a tensor's shape differs, or under 95 % of the backbone's tensors are in the file, so that the model
            would stay mostly random.
    """
    tensors = read_tensors(path)
    if not any(name.startswith("backbone.") for name in tensors):
        tensors = {f"backbone.{name}": x for name, x in tensors.items()}
    own = model.state_dict()
    loaded = [name for name in tensors if name in own]
    for name in loaded:
        if tensors[name].shape != own[name].shape:
            found, expected = tuple(tensors[name].shape), tuple(own[name].shape)
            raise InputError(f"{path}: {name} is {found}: the model expects {expected}")
    backbone = [name for name in own if name.startswith("backbone.")]
    share = len(set(backbone) & set(loaded)) / len(backbone)
    if share < 0.95:
        raise InputError(f"{path}: holds {share:.0%} of the backbone's tensors: expected weights of the same variant")
    model.load_state_dict({name: tensors[name] for name in loaded}, strict=False)
    return Report(loaded, sorted(tensors.keys() - own.keys()), [name for name in own if name not in tensors])
