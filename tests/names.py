"""Other projects' names of our tensors: the inverse of ocrnet/models/weights.py, written independently."""

import re

from torch import Tensor, nn

MMSEGMENTATION_OCR, AUTHORS_OCR = "decode_head.1.object_context_block", "ocr_distri_head.object_context_block"
# Our prefix -> mmsegmentation's, the authors'. What follows a prefix is renamed below.
PREFIXES = {
    "head.region_head.0.": ("decode_head.0.convs.0.", "aux_head."),
    "head.region_head.2.": ("decode_head.0.conv_seg.", "aux_head.3."),
    "head.pixel_head.": ("decode_head.1.bottleneck.", "conv3x3_ocr."),
    "head.attention.phi.": (f"{MMSEGMENTATION_OCR}.query_project.", f"{AUTHORS_OCR}.f_pixel."),
    "head.attention.psi.": (f"{MMSEGMENTATION_OCR}.key_project.", f"{AUTHORS_OCR}.f_object."),
    "head.attention.delta.": (f"{MMSEGMENTATION_OCR}.value_project.", f"{AUTHORS_OCR}.f_down."),
    "head.attention.rho.": (f"{MMSEGMENTATION_OCR}.out_project.", f"{AUTHORS_OCR}.f_up."),
    "head.g.": (f"{MMSEGMENTATION_OCR}.bottleneck.", "ocr_distri_head.conv_bn_dropout."),
    "head.classifier.1.": ("decode_head.1.conv_seg.", "cls_head."),
    "head.hidden.": ("decode_head.convs.0.", ""),  # of HRNet + FCN
    "backbone.": ("backbone.", ""),
}
DEEP_STEM = {"backbone.conv1.": ("backbone.stem.", ""), "backbone.bn1.": ("backbone.stem.7.", "")}  # of ResNetV1c
# the authors' places of our layers: conv, (bn, relu), conv, (bn, relu), or the first half of it
AUTHORS_TWICE = {"0.0.": "0.", "0.1.": "1.0.", "1.0.": "2.", "1.1.": "3.0."}
AUTHORS_ONCE = {"0.": "0.", "1.": "1.0."}


def split_prefix(name: str, prefixes: dict) -> tuple:
    """(our prefix, what stands for it, what follows it) of a name."""
    ours = next(prefix for prefix in prefixes if name.startswith(prefix))
    return ours, prefixes[ours], name.removeprefix(ours)


def as_mmsegmentation(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of an OCRNet, or of HRNet + FCN, under mmsegmentation's names."""
    tensors = {}
    for name, x in model.state_dict().items():
        ours, (theirs, _), rest = split_prefix(name, (DEEP_STEM if model.config["deep_stem"] else {}) | PREFIXES)
        if model.config["head"] == "fcn":
            theirs = theirs.replace("decode_head.1.", "decode_head.")
        if ours.startswith("head."):  # ConvModule: conv and bn where our Sequential has 0 and 1
            rest = re.sub(r"\b0\.(\w+)$", r"conv.\1", rest)
            rest = re.sub(r"\b1\.(\w+)$", r"bn.\1", rest)
        tensors[theirs + rest] = x
    return tensors


def as_authors(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The state_dict of an OCRNet under the names of the authors' HRNet-OCR, each after ``prefix``."""
    tensors = {}
    for name, x in model.state_dict().items():
        ours, (_, theirs), rest = split_prefix(name, PREFIXES)
        if theirs.startswith("ocr_distri_head."):
            _, place, rest = split_prefix(rest, AUTHORS_TWICE if ours[-4:] in ("phi.", "psi.") else AUTHORS_ONCE)
            rest = place + rest
        tensors[prefix + theirs + rest] = x
    return tensors
