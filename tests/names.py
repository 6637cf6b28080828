"""Other projects' names of our tensors: the inverse of ocrnet/models/weights.py, written independently."""

import re

from torch import Tensor, nn

# Our prefix -> theirs. What follows a prefix is renamed by the functions below.
MMSEGMENTATION = {
    "head.region_head.0.": "decode_head.0.convs.0.",
    "head.region_head.2.": "decode_head.0.conv_seg.",
    "head.pixel_head.": "decode_head.1.bottleneck.",
    "head.attention.phi.": "decode_head.1.object_context_block.query_project.",
    "head.attention.psi.": "decode_head.1.object_context_block.key_project.",
    "head.attention.delta.": "decode_head.1.object_context_block.value_project.",
    "head.attention.rho.": "decode_head.1.object_context_block.out_project.",
    "head.g.": "decode_head.1.object_context_block.bottleneck.",
    "head.classifier.1.": "decode_head.1.conv_seg.",
    "backbone.": "backbone.",
}
MMSEGMENTATION_FCN = {
    "head.hidden.": "decode_head.convs.0.",
    "head.classifier.1.": "decode_head.conv_seg.",
    "backbone.": "backbone.",
}
DEEP_STEM = {"backbone.conv1.": "backbone.stem.", "backbone.bn1.": "backbone.stem.7."}  # of ResNetV1c
AUTHORS = {
    "head.region_head.0.": "aux_head.",
    "head.region_head.2.": "aux_head.3.",
    "head.pixel_head.": "conv3x3_ocr.",
    "head.attention.phi.": "ocr_distri_head.object_context_block.f_pixel.",
    "head.attention.psi.": "ocr_distri_head.object_context_block.f_object.",
    "head.attention.delta.": "ocr_distri_head.object_context_block.f_down.",
    "head.attention.rho.": "ocr_distri_head.object_context_block.f_up.",
    "head.g.": "ocr_distri_head.conv_bn_dropout.",
    "head.classifier.1.": "cls_head.",
    "backbone.": "",
}
AUTHORS_TWICE = {"0.0.": "0.", "0.1.": "1.0.", "1.0.": "2.", "1.1.": "3.0."}  # conv, (bn, relu), conv, (bn, relu)
AUTHORS_ONCE = {"0.": "0.", "1.": "1.0."}  # conv, (bn, relu)


def split_prefix(name: str, prefixes: dict[str, str]) -> tuple[str, str, str]:
    """(our prefix, theirs, what follows it) of a name."""
    ours = next(prefix for prefix in prefixes if name.startswith(prefix))
    return ours, prefixes[ours], name.removeprefix(ours)


def as_mmsegmentation(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of an OCRNet, or of HRNet + FCN, under mmsegmentation's names."""
    names = MMSEGMENTATION if model.config["head"] == "ocr" else MMSEGMENTATION_FCN
    prefixes = {**(DEEP_STEM if model.config["deep_stem"] else {}), **names}
    tensors = {}
    for name, x in model.state_dict().items():
        ours, theirs, rest = split_prefix(name, prefixes)
        if ours.startswith("head."):  # ConvModule: conv and bn where our Sequential has 0 and 1
            rest = re.sub(r"\b0\.(\w+)$", r"conv.\1", rest)
            rest = re.sub(r"\b1\.(\w+)$", r"bn.\1", rest)
        tensors[theirs + rest] = x
    return tensors


def as_authors(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The state_dict of an OCRNet under the names of the authors' HRNet-OCR, each after ``prefix``."""
    tensors = {}
    for name, x in model.state_dict().items():
        ours, theirs, rest = split_prefix(name, AUTHORS)
        pairs = {}
        if ours in ("head.attention.phi.", "head.attention.psi."):
            pairs = AUTHORS_TWICE
        elif ours in ("head.attention.delta.", "head.attention.rho.", "head.g."):
            pairs = AUTHORS_ONCE
        if pairs:
            _, position, rest = split_prefix(rest, pairs)
            rest = position + rest
        tensors[prefix + theirs + rest] = x
    return tensors
