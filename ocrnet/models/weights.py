"""Other people's weights: their tensors' names to ours, and a report of what came in.

A file's source is recognised from its names. Known: this project's checkpoints, mmsegmentation's OCRNet, the authors'
HRNet-OCR, an ImageNet HRNet and torchvision's ResNet, whose names the backbones share.
"""

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .ocrnet import HRNETS, RESNETS, OCRNet, build_model

# Beginnings of names, theirs to ours; a name that begins with none of them stays.
MMSEGMENTATION = {
    "decode_head.0.convs.0.conv.": "head.region_head.0.0.",
    "decode_head.0.convs.0.bn.": "head.region_head.0.1.",
    "decode_head.0.conv_seg.": "head.region_head.2.",
    "decode_head.1.bottleneck.conv.": "head.pixel_head.0.",
    "decode_head.1.bottleneck.bn.": "head.pixel_head.1.",
    "decode_head.1.object_context_block.query_project.0.conv.": "head.attention.phi.0.0.",
    "decode_head.1.object_context_block.query_project.0.bn.": "head.attention.phi.0.1.",
    "decode_head.1.object_context_block.query_project.1.conv.": "head.attention.phi.1.0.",
    "decode_head.1.object_context_block.query_project.1.bn.": "head.attention.phi.1.1.",
    "decode_head.1.object_context_block.key_project.0.conv.": "head.attention.psi.0.0.",
    "decode_head.1.object_context_block.key_project.0.bn.": "head.attention.psi.0.1.",
    "decode_head.1.object_context_block.key_project.1.conv.": "head.attention.psi.1.0.",
    "decode_head.1.object_context_block.key_project.1.bn.": "head.attention.psi.1.1.",
    "decode_head.1.object_context_block.value_project.conv.": "head.attention.delta.0.",
    "decode_head.1.object_context_block.value_project.bn.": "head.attention.delta.1.",
    "decode_head.1.object_context_block.out_project.conv.": "head.attention.rho.0.",
    "decode_head.1.object_context_block.out_project.bn.": "head.attention.rho.1.",
    "decode_head.1.object_context_block.bottleneck.conv.": "head.g.0.",
    "decode_head.1.object_context_block.bottleneck.bn.": "head.g.1.",
    "decode_head.1.conv_seg.": "head.classifier.1.",
    "backbone.stem.7.": "backbone.bn1.",  # ResNetV1c: the last BatchNorm of the deep stem
    "backbone.stem.": "backbone.conv1.",
}
AUTHORS = {
    "aux_head.0.": "head.region_head.0.0.",
    "aux_head.1.": "head.region_head.0.1.",
    "aux_head.3.": "head.region_head.2.",
    "conv3x3_ocr.": "head.pixel_head.",
    "ocr_distri_head.object_context_block.f_pixel.0.": "head.attention.phi.0.0.",
    "ocr_distri_head.object_context_block.f_pixel.1.0.": "head.attention.phi.0.1.",
    "ocr_distri_head.object_context_block.f_pixel.2.": "head.attention.phi.1.0.",
    "ocr_distri_head.object_context_block.f_pixel.3.0.": "head.attention.phi.1.1.",
    "ocr_distri_head.object_context_block.f_object.0.": "head.attention.psi.0.0.",
    "ocr_distri_head.object_context_block.f_object.1.0.": "head.attention.psi.0.1.",
    "ocr_distri_head.object_context_block.f_object.2.": "head.attention.psi.1.0.",
    "ocr_distri_head.object_context_block.f_object.3.0.": "head.attention.psi.1.1.",
    "ocr_distri_head.object_context_block.f_down.0.": "head.attention.delta.0.",
    "ocr_distri_head.object_context_block.f_down.1.0.": "head.attention.delta.1.",
    "ocr_distri_head.object_context_block.f_up.0.": "head.attention.rho.0.",
    "ocr_distri_head.object_context_block.f_up.1.0.": "head.attention.rho.1.",
    "ocr_distri_head.conv_bn_dropout.0.": "head.g.0.",
    "ocr_distri_head.conv_bn_dropout.1.0.": "head.g.1.",
    "cls_head.": "head.classifier.1.",
    "": "backbone.",
}
BACKBONE = {"": "backbone."}  # an ImageNet HRNet, or torchvision's ResNet
AUTHORS_DROPOUT = 0.05

CLASSIFIERS = ("head.region_head.2.", "head.classifier.1.")

# Tensors that are not of an OCRNet: ImageNet's classifiers, and the class weights of the authors' loss.
NOT_OURS = ("incre_modules.", "downsamp_modules.", "final_layer.", "classifier.", "fc.", "loss.")


class Report(NamedTuple):
    """What became of a file's tensors."""

    source: str
    loaded: list[str]  # our names
    ignored: list[str]  # the file's names
    missing: list[str]  # our names: these kept what they were

    def __str__(self) -> str:
        def some(names: list[str]) -> str:
            return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""

        counts = f"{len(self.loaded)} tensors loaded from {self.source}"
        ignored = f"{len(self.ignored)} ignored, for which the model has no place{some(self.ignored)}"
        return f"{counts}; {ignored}; {len(self.missing)} missing, which keep their initial values{some(self.missing)}"


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
        hint = ""
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            command = f"torch.save(torch.load('{path}', weights_only=False)['state_dict'], 'weights.pth')"
            hint = (  # there are other objects beside the tensors, as mmengine's training history
                "; if you trust its origin, keep its tensors alone, where the program that wrote it is installed: "
                f'python -c "import torch; {command}"'
            )
        raise InputError(f"{path}: not a checkpoint that can be loaded safely ({type(error).__name__}){hint}") from None


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
    return {name.removeprefix("module.").removeprefix("model."): x for name, x in tensors.items()}


def translate(tensors: dict[str, Tensor]) -> tuple[str, dict[str, str]]:
    """-> where the tensors come from, and our name for each of theirs."""
    if "head.classifier.1.weight" in tensors:
        source, names = "this project", {}
    elif "decode_head.1.conv_seg.weight" in tensors:
        source, names = "mmsegmentation", MMSEGMENTATION
    elif "cls_head.weight" in tensors:
        source, names = "the authors' HRNet-OCR", AUTHORS
    elif any(name.startswith("backbone.") for name in tensors):
        source, names = "a backbone", {}
    else:
        source, names = "an ImageNet backbone", BACKBONE

    def ours(name: str) -> str:
        theirs = next((start for start in names if name.startswith(start)), "")
        return names.get(theirs, "") + name[len(theirs) :]

    return source, {name: ours(name) for name in tensors}


def fold_biases(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the biases of convolutions whose BatchNorm follows, by moving that BatchNorm's running mean.

    (Wx + b - mean) / std = (Wx - (mean - b)) / std: exact. In training the batch's own mean takes a bias away anyway.
    """
    tensors = dict(tensors)
    for name in [name for name in tensors if name.endswith(".0.bias") and name not in own]:
        mean = name.removesuffix("0.bias") + "1.running_mean"
        if mean in tensors:
            tensors[mean] = tensors[mean] - tensors.pop(name)
    return tensors


def adapt(model: OCRNet, tensors: dict[str, Tensor], source: str) -> None:
    """Bring what is no tensor in line with the weights: the resizing they were trained with, dropout, ResNet's stem."""
    if source == "the authors' HRNet-OCR":
        model.config.update(align_corners=True)
        if model.config["dropout"] is None:  # not asked for otherwise
            model.config.update(dropout=AUTHORS_DROPOUT)
            model.head.classifier[0].p = AUTHORS_DROPOUT
        for module in model.modules():
            if hasattr(module, "align_corners"):
                module.align_corners = True
    if "backbone.conv1.6.weight" in tensors and model.config["name"] in RESNETS:
        model.config.update(deep_stem=True)
        model.backbone.use_deep_stem()


def load_weights(model: OCRNet, path: Path) -> Report:
    """Load a file's tensors into the model, as far as it has a place for them.

    Takes checkpoints of this project, mmsegmentation's OCRNet, the authors' HRNet-OCR, an ImageNet HRNet and
    torchvision's ResNet. What goes with the weights but is no tensor is set too, and kept in ``model.config``:
    align_corners and dropout for the authors', the deep stem for mmsegmentation's ResNet. Classifiers of another number
    of classes are left out.

    Raises:
        InputError: the file cannot be read safely, it is of another variant (a tensor's shape differs, or the model has
            no place for it), or it holds under 95 % of the backbone's tensors, so that the model would stay random.
    """
    return load_tensors(model, read_tensors(path), path)


def load_tensors(model: OCRNet, theirs: dict[str, Tensor], path: Path) -> Report:
    """``load_weights`` of a file's tensors, once they are read. ``path`` is for the messages."""
    source, names = translate(theirs)
    tensors = {names[name]: x for name, x in theirs.items()}
    head = head_of(tensors)
    if head not in (None, model.config["head"]):
        raise InputError(
            f"{path}: weights with head {head}: the model has {model.config['head']}: set --head to theirs"
        )
    adapt(model, tensors, source)
    own = model.state_dict()
    tensors = fold_biases(tensors, own)
    others = [name for name in tensors if name.startswith(CLASSIFIERS) and len(tensors[name]) != len(own[name])]
    for name in others:  # of other classes: learned anew
        del tensors[name]
    loaded = [name for name in tensors if name in own]
    backbone = [name for name in own if name.startswith("backbone.")]
    share = len(set(backbone) & set(loaded)) / len(backbone)
    if share < 0.95:
        raise InputError(
            f"{path}: holds {share:.0%} of the backbone's tensors: weights of another variant: set --model to theirs"
        )
    for name in loaded:
        if tensors[name].shape != own[name].shape:
            found, expected = tuple(tensors[name].shape), tuple(own[name].shape)
            raise InputError(f"{path}: {name} is {found}, the model expects {expected}: set --model to theirs")
    ignored = sorted(name for name in theirs if names[name] in tensors.keys() - own.keys() | set(others))
    for name in ignored:
        if names[name] not in others and not name.removeprefix("backbone.").startswith(NOT_OURS):
            raise InputError(
                f"{path}: the model has no place for {name}: weights of another variant: set --model to theirs"
            )
    model.load_state_dict({name: tensors[name] for name in loaded}, strict=False)
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    return Report(source, loaded, ignored, missing)


def head_of(names: Iterable[str]) -> str | None:
    """Which of ``HEADS`` tensors of these names are of, ours; None for a backbone alone."""
    if "head.hidden.0.weight" in names:
        return "fcn"
    return "ocr" if "head.classifier.1.weight" in names else None


def build_for(path: Path) -> OCRNet:
    """The OCRNet that a file of weights is of, with those weights: variant and class count are read off the shapes.

    Raises:
        InputError: as ``load_weights``, or the head's tensors are not in the file.
    """
    theirs = read_tensors(path)
    _, names = translate(theirs)
    shapes = {names[name]: x.shape for name, x in theirs.items()}
    if head_of(shapes) is None:
        raise InputError(
            f"{path}: no OCR head in it: expected a whole OCRNet; train.py --weights takes a backbone alone"
        )
    blocks = len({name.split(".")[2] for name in shapes if name.startswith("backbone.layer1.")})
    if "backbone.transition1.0.0.weight" in shapes:
        found = dict(width=shapes["backbone.transition1.0.0.weight"][0], num_blocks=blocks)
        fits = [name for name, variant in HRNETS.items() if variant.items() >= found.items()]
    else:
        stage3 = len({name.split(".")[2] for name in shapes if name.startswith("backbone.layer3.")})
        found = dict(blocks_of_stage_3=stage3)
        fits = [name for name, layers in RESNETS.items() if layers[2] == stage3]
    if not fits:
        raise InputError(f"{path}: of no known variant ({found}): expected one of {', '.join((*HRNETS, *RESNETS))}")
    model = build_model(fits[0], shapes["head.classifier.1.weight"][0], head=head_of(shapes))
    report = load_tensors(model, theirs, path)
    if report.missing:
        raise InputError(f"{path}: {len(report.missing)} tensors are missing, {report.missing[0]} first")
    return model
