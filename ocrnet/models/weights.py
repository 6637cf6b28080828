"""Loading weights of other projects: their tensor names mapped to ours.

Recognized by their names: checkpoints of this project, mmsegmentation's OCRNet, the authors' HRNet-OCR, an ImageNet
HRNet and torchvision's ResNet. The backbones have the names of the last two.
"""

import re
import socket
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import InputError
from .hub import url_of
from .ocrnet import BACKBONES, OCRNet, build_model

# Regular expressions at the start of a name -> our names. The first that matches is applied.
MMSEGMENTATION = {
    r"decode_head\.0\.convs\.0\.": "head.region_head.0.",
    r"decode_head\.0\.conv_seg\.": "head.region_head.2.",
    r"decode_head\.1\.bottleneck\.": "head.pixel_head.",
    r"decode_head\.1\.object_context_block\.query_project\.": "head.attention.phi.",
    r"decode_head\.1\.object_context_block\.key_project\.": "head.attention.psi.",
    r"decode_head\.1\.object_context_block\.value_project\.": "head.attention.delta.",
    r"decode_head\.1\.object_context_block\.out_project\.": "head.attention.rho.",
    r"decode_head\.1\.object_context_block\.bottleneck\.": "head.g.",
    r"decode_head\.1\.conv_seg\.": "head.classifier.1.",
    r"decode_head\.convs\.0\.": "head.hidden.",  # of its HRNet + FCN
    r"decode_head\.conv_seg\.": "head.classifier.1.",
    r"backbone\.stem\.7\.": "backbone.bn1.",  # ResNetV1c: the last BatchNorm of the deep stem
    r"backbone\.stem\.": "backbone.conv1.",
}
AUTHORS = {
    r"aux_head\.([01])\.": r"head.region_head.0.\1.",
    r"aux_head\.3\.": "head.region_head.2.",
    r"conv3x3_ocr\.": "head.pixel_head.",
    r"ocr_distri_head\.object_context_block\.f_pixel\.": "head.attention.phi.",
    r"ocr_distri_head\.object_context_block\.f_object\.": "head.attention.psi.",
    r"ocr_distri_head\.object_context_block\.f_down\.": "head.attention.delta.",
    r"ocr_distri_head\.object_context_block\.f_up\.": "head.attention.rho.",
    r"ocr_distri_head\.conv_bn_dropout\.": "head.g.",
    r"cls_head\.": "head.classifier.1.",
    r"": "backbone.",
}
# an ImageNet HRNet, torchvision's ResNet, or ResNetV1c
BACKBONE = {r"stem\.7\.": "backbone.bn1.", r"stem\.": "backbone.conv1.", r"": "backbone."}
AUTHORS_DROPOUT = 0.05
TIMEOUT = 30  # seconds that a server may be silent

CLASSIFIERS = ("head.region_head.2.", "head.classifier.1.")
# ImageNet classifiers, the class weights in the authors' loss, and counters of averaged models
IGNORED_PREFIXES = (
    "incre_modules.", "downsamp_modules.", "final_layer.", "classifier.", "fc.", "loss.", "n_averaged", "steps",
)  # fmt: skip
# Where files keep their tensors. mmengine's ema_state_dict is last: its state_dict has the averaged weights.
ENTRIES = ("state_dict_ema", "model_ema", "model", "state_dict", "ema_state_dict")


class Report(NamedTuple):
    """What became of a file's tensors."""

    source: str
    loaded: list[str]  # our names
    ignored: list[str]  # the file's names
    missing: list[str]  # our names; these keep their initial values

    def __str__(self) -> str:
        def count(names: list[str]) -> str:
            return f"{len(names)}" + (f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "")

        text = f"{len(self.loaded)} tensors loaded from {self.source}, {count(self.ignored)} of the file ignored"
        return f"{text}, {count(self.missing)} of the model stay random"


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_file(source: Path | str, model: str = "") -> Any:
    """The contents of a torch.save file, or of weights with a name of hub.py, on the CPU, without running code from it.

    Args:
        model: of ``BACKBONES``, for the name "imagenet".

    Raises:
        InputError: the file is missing, damaged or needs code to load, or its download fails.
    """
    path = Path(source)
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        return download(url_of(str(source), model))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # damaged bytes raise many types
        size = path.stat().st_size
        start = path.read_bytes()[:12] if path.is_file() else b""
        found = f"{type(error).__name__}, {size:,} bytes that begin with {start!r}"
        if start.startswith(b"PK") and "weights_only" in str(error).lower():
            found = "one that needs code to load; if you trust it, save its state_dict alone where it was written"
        raise InputError(f"{path}: expected a checkpoint that loads with weights_only, found {found}") from None


def download(url: str) -> Any:
    """The contents of a file that torch.hub keeps in ``~/.cache/torch/hub/checkpoints`` after the first time."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # of the network, the hash, or the file
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise InputError(f"{url}: not loaded ({error}): download it elsewhere and put it into {folder}") from None
    finally:
        socket.setdefaulttimeout(before)


def read_tensors(state: Any, source: Path | str) -> dict[str, Tensor]:
    """The named tensors in the contents of a file: averaged weights where it has them beside others.

    Names lose the prefixes that DDP, torch.compile and wrappers add.

    Raises:
        InputError: there are none, or one is nan or infinite.
    """
    for key in ENTRIES:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise InputError(f"{source}: expected a dict of tensors, found none")
    check_finite(tensors, source)
    return {re.sub(r"^((module|_orig_mod|model)\.)+", "", name): x for name, x in tensors.items()}


def check_finite(tensors: dict[str, Tensor], source: Path | str) -> None:
    """Raise InputError if a tensor has a value that is nan or infinite."""
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise InputError(f"{source}: {name}: expected finite values, found nan or infinity")


# ---- names -----------------------------------------------------------------------------------------------------------


def rename_keys(theirs: dict[str, Tensor]) -> tuple[str, dict[str, str]]:
    """Return the source of tensors of these names, and our name for each."""
    if "head.classifier.1.weight" in theirs:
        source, rules = "this project", {}
    elif "decode_head.1.conv_seg.weight" in theirs or "decode_head.conv_seg.weight" in theirs:
        source, rules = "mmsegmentation", MMSEGMENTATION
    elif "cls_head.weight" in theirs:
        source, rules = "the authors' HRNet-OCR", AUTHORS
    elif any(name.startswith("backbone.") for name in theirs):
        source, rules = "a backbone", {}
    else:
        source, rules = "an ImageNet backbone", BACKBONE

    def rename(name: str) -> str:
        for pattern, ours in rules.items():
            if re.match(pattern, name):
                name = re.sub(pattern, ours, name, count=1)
                break
        if source == "mmsegmentation":  # ConvModule has conv and bn where our Sequential has 0 and 1
            return re.sub(r"^(head\..*)\.bn\.", r"\1.1.", re.sub(r"^(head\..*)\.conv\.", r"\1.0.", name))
        if source == "the authors' HRNet-OCR":  # Sequential(conv, Sequential(bn, relu), conv, ...)
            name = re.sub(r"^(head\.(?:attention|g)\..*[13])\.0\.", r"\1.", name)
            return re.sub(r"\.(phi|psi)\.([0-3])\.", lambda m: f".{m[1]}.{int(m[2]) // 2}.{int(m[2]) % 2}.", name)
        return name

    return source, {name: rename(name) for name in theirs}


def head_of(names: Iterable[str]) -> str | None:
    """The head, of ``HEADS``, that tensors of these names (ours) belong to. None for a backbone."""
    if "head.hidden.0.weight" in names:
        return "fcn"
    return "ocr" if "head.classifier.1.weight" in names else None


@cache
def backbone_shapes(build: Callable[[], nn.Module]) -> dict[str, torch.Size]:
    """The shapes of a backbone's parameters under our names, without the first convolution (or deep stem)."""
    with torch.device("meta"):
        shapes = {f"backbone.{name}": x.shape for name, x in build().named_parameters()}
    return {name: shape for name, shape in shapes.items() if not name.startswith("backbone.conv1.")}


def backbone_of(tensors: dict[str, Tensor]) -> str | None:
    """The largest of ``BACKBONES`` all of whose parameters are among ``tensors`` (our names). None without."""
    shapes = {name: backbone_shapes(build) for name, build in BACKBONES.items()}
    fits = [
        name for name in shapes if all(x in tensors and tensors[x].shape == shape for x, shape in shapes[name].items())
    ]
    return max(fits, key=lambda name: len(shapes[name]), default=None)


def fold_biases(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold the bias of a convolution into the running mean of the BatchNorm after it, if our convolution has no bias.

    (Wx + b - mean) / std = (Wx - (mean - b)) / std. In training BatchNorm subtracts the bias anyway.
    """
    tensors = dict(tensors)
    for name in [name for name in tensors if name.endswith(".0.bias") and name not in own]:
        mean = name.removesuffix("0.bias") + "1.running_mean"
        if mean in tensors:
            tensors[mean] = tensors[mean] - tensors.pop(name)
    return tensors


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_weights(model: OCRNet, source: Path | str) -> Report:
    """Load the tensors of a file, or of a name of hub.py, into the model.

    Accepts checkpoints of this project, mmsegmentation's OCRNet, the authors' HRNet-OCR, an ImageNet HRNet and
    torchvision's ResNet. What belongs to the weights but is not a tensor is set too: align_corners and dropout of the
    authors, and ResNet's deep stem. Another head is left out, and so are classifiers with another number of classes.

    Raises:
        InputError: the file cannot be read, belongs to another model (a shape differs, or a tensor has no place in
            this one), or holds less than 95 % of the backbone's tensors, which would leave the model random.
    """
    return load_tensors(model, read_tensors(read_file(source, model.config["name"]), source), source)


def load_tensors(model: OCRNet, theirs: dict[str, Tensor], source: Path | str) -> Report:
    """``load_weights`` after reading the file. ``source`` is for errors."""
    origin, names = rename_keys(theirs)
    tensors = {names[name]: x for name, x in theirs.items()}

    def remedy() -> str:
        name, fits = model.config["name"], backbone_of(tensors)
        return f"--model {fits} fits" if fits not in (None, name) else f"it does not fit {name}"

    if origin == "the authors' HRNet-OCR":
        model.config["align_corners"] = True
        model.set_align_corners(True)
        model.config["dropout"] = model.head.classifier[0].p = AUTHORS_DROPOUT
    if "backbone.conv1.6.weight" in tensors and hasattr(model.backbone, "use_deep_stem"):
        model.config["deep_stem"] = True
        model.backbone.use_deep_stem()
    own = model.state_dict()
    tensors = fold_biases(tensors, own)
    if head_of(tensors) != model.config["head"]:
        left_out = [name for name in tensors if name.startswith("head.")]
    else:  # classifiers of other classes
        left_out = [name for name in tensors if name.startswith(CLASSIFIERS) and len(tensors[name]) != len(own[name])]
    for name in left_out:
        del tensors[name]
    loaded = [name for name in tensors if name in own]
    backbone = [name for name in own if name.startswith("backbone.")]
    share = len(set(backbone) & set(loaded)) / len(backbone)
    if share < 0.95:
        raise InputError(f"{source}: expected 95 % of the backbone's tensors or more, found {share:.0%}: {remedy()}")
    for name in loaded:
        if tensors[name].shape != own[name].shape:
            expected, found = tuple(own[name].shape), tuple(tensors[name].shape)
            raise InputError(f"{source}: {name}: expected shape {expected}, found {found}: {remedy()}")
    ignored = sorted(name for name in theirs if names[name] in tensors.keys() - own.keys() | set(left_out))
    for name in ignored:
        if names[name] not in left_out and not name.removeprefix("backbone.").startswith(IGNORED_PREFIXES):
            raise InputError(f"{source}: found {name}, which the model does not have: {remedy()}")
    model.load_state_dict({name: tensors[name] for name in loaded}, strict=False)
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    return Report(origin, loaded, ignored, missing)


def build_from_checkpoint(state: Any, source: Path | str) -> OCRNet:
    """The OCRNet that the contents of a file belong to, with those weights. Backbone and K follow from the shapes.

    Raises:
        InputError: the head's tensors are missing, or no backbone fits; and as ``load_weights``.
    """
    theirs = read_tensors(state, source)
    tensors = {ours: theirs[name] for name, ours in rename_keys(theirs)[1].items()}
    head, backbone = head_of(tensors), backbone_of(tensors)
    if head is None:
        raise InputError(f"{source}: expected a whole OCRNet, found no head; train.py --weights accepts backbones")
    if backbone is None:
        raise InputError(f"{source}: expected a backbone of {', '.join(BACKBONES)}, found another")
    model = build_model(backbone, len(tensors["head.classifier.1.weight"]), head=head)
    report = load_tensors(model, theirs, source)
    if report.missing:
        raise InputError(f"{source}: {len(report.missing)} tensors are missing, {report.missing[0]} first")
    return model
