"""Loading weights of other projects: their tensor names mapped to ours.

Recognized by their names: checkpoints of this project, mmsegmentation's OCRNet, the authors' HRNet-OCR, an ImageNet
HRNet and torchvision's ResNet. The backbones have the names of the last two.
"""

import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
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
        def count(names: list[str], verb: str) -> str:
            some = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
            return f"{len(names)} {verb}{some}"

        loaded = f"{len(self.loaded)} tensors loaded from {self.source}"
        return f"{loaded}; {count(self.ignored, 'ignored')}; {count(self.missing, 'missing, which stay random')}"


def read_file(path: Path) -> Any:
    """The contents of a torch.save file, on the CPU, without running code from it.

    Raises:
        InputError: the file is missing, damaged, or needs code to load.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # damaged bytes raise many types
        hint = ""
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):  # such as mmengine's message hub
            command = f"torch.save(torch.load('{path}', weights_only=False)['state_dict'], 'weights.pth')"
            hint = (
                "; if you trust its origin, keep only its tensors, where the program that wrote it is installed: "
                f'python -c "import torch; {command}"'
            )
        raise InputError(
            f"{path}: expected a file that loads with weights_only ({type(error).__name__}){hint}"
        ) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file: averaged weights where it has them beside others.

    Names lose the prefixes that DDP, torch.compile and wrappers add.

    Raises:
        InputError: there are none, or one is nan or infinite; and as ``read_file``.
    """
    state = read_file(path)
    for key in ENTRIES:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise InputError(f"{path}: expected a dict of tensors, found none")
    check_finite(tensors, path)
    return {re.sub(r"^((module|_orig_mod|model)\.)+", "", name): x for name, x in tensors.items()}


def check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise InputError if a tensor has a value that is nan or infinite. ``path`` is for the error."""
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise InputError(f"{path}: {name}: expected finite values, found nan or infinity")


def rename_keys(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Return the source of tensors of these names, and our name for each."""
    names = list(names)
    if "head.classifier.1.weight" in names:
        source, rules = "this project", {}
    elif "decode_head.1.conv_seg.weight" in names or "decode_head.conv_seg.weight" in names:
        source, rules = "mmsegmentation", MMSEGMENTATION
    elif "cls_head.weight" in names:
        source, rules = "the authors' HRNet-OCR", AUTHORS
    elif any(name.startswith("backbone.") for name in names):
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

    return source, {name: rename(name) for name in names}


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


def apply_source_settings(model: OCRNet, names: Iterable[str], source: str) -> None:
    """Set what belongs to the weights but is not a tensor: align_corners and dropout, and ResNet's deep stem."""
    if source == "the authors' HRNet-OCR":
        model.config["align_corners"] = True
        model.set_align_corners(True)
        if model.config["dropout"] is None:  # not set by the user
            model.config["dropout"] = model.head.classifier[0].p = AUTHORS_DROPOUT
    if "backbone.conv1.6.weight" in names and hasattr(model.backbone, "use_deep_stem"):
        model.config["deep_stem"] = True
        model.backbone.use_deep_stem()


def load_weights(model: OCRNet, path: Path) -> Report:
    """Load the tensors of a file into the model.

    Accepts checkpoints of this project, mmsegmentation's OCRNet, the authors' HRNet-OCR, an ImageNet HRNet and
    torchvision's ResNet. See ``apply_source_settings`` for what else is set. Another head is left out, and so are
    classifiers with another number of classes.

    Raises:
        InputError: the file cannot be read, belongs to another model (a shape differs, or a tensor has no place in
            this one), or holds less than 95 % of the backbone's tensors, which would leave the model random.
    """
    return load_tensors(model, read_tensors(path), path)


def load_tensors(model: OCRNet, theirs: dict[str, Tensor], path: Path) -> Report:
    """``load_weights`` after reading the file. ``path`` is for errors."""
    source, names = rename_keys(theirs)
    tensors = {names[name]: x for name, x in theirs.items()}
    other_head, remedy = head_of(tensors) != model.config["head"], "set --model to that of the weights"
    apply_source_settings(model, tensors, source)
    own = model.state_dict()
    tensors = fold_biases(tensors, own)
    if other_head:
        others = [name for name in tensors if name.startswith("head.")]
    else:  # classifiers of other classes
        others = [name for name in tensors if name.startswith(CLASSIFIERS) and len(tensors[name]) != len(own[name])]
    for name in others:
        del tensors[name]
    loaded = [name for name in tensors if name in own]
    backbone = [name for name in own if name.startswith("backbone.")]
    share = len(set(backbone) & set(loaded)) / len(backbone)
    if share < 0.95:
        raise InputError(f"{path}: expected 95 % of the backbone's tensors or more, found {share:.0%}: {remedy}")
    for name in loaded:
        if tensors[name].shape != own[name].shape:
            expected, found = tuple(own[name].shape), tuple(tensors[name].shape)
            raise InputError(f"{path}: {name}: expected shape {expected}, found {found}: {remedy}")
    ignored = sorted(name for name in theirs if names[name] in tensors.keys() - own.keys() | set(others))
    for name in ignored:
        if names[name] not in others and not name.removeprefix("backbone.").startswith(IGNORED_PREFIXES):
            raise InputError(f"{path}: found {name}, which the model does not have: {remedy}")
    model.load_state_dict({name: tensors[name] for name in loaded}, strict=False)
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    return Report(source, loaded, ignored, missing)


def head_of(names: Iterable[str]) -> str | None:
    """The head, of ``HEADS``, that tensors of these names (ours) belong to. None for a backbone."""
    if "head.hidden.0.weight" in names:
        return "fcn"
    return "ocr" if "head.classifier.1.weight" in names else None


def build_from_checkpoint(path: Path) -> OCRNet:
    """Build the OCRNet that a file of weights belongs to, with those weights. Backbone and K follow from the shapes.

    Raises:
        InputError: the head's tensors are missing, or no backbone fits; and as ``load_weights``.
    """
    theirs = read_tensors(path)
    _, names = rename_keys(theirs)
    shapes = {names[name]: x.shape for name, x in theirs.items()}
    if head_of(shapes) is None:
        raise InputError(f"{path}: expected a whole OCRNet, found no head; train.py --weights accepts backbones")
    fits = None
    for name, backbone in BACKBONES.items():  # of several that fit the last: hr18 has every tensor of hr18s
        with torch.device("meta"):
            own = {f"backbone.{key}": x.shape for key, x in backbone().named_parameters()}
        if all(shapes.get(key) == shape for key, shape in own.items() if not key.startswith("backbone.conv1.")):
            fits = name
    if not fits:
        raise InputError(f"{path}: expected a backbone of {', '.join(BACKBONES)}, found another")
    model = build_model(fits, shapes["head.classifier.1.weight"][0], head=head_of(shapes))
    report = load_tensors(model, theirs, path)
    if report.missing:
        raise InputError(f"{path}: {len(report.missing)} tensors are missing, {report.missing[0]} first")
    return model
