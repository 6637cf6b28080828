"""The network: image in, logits out. Independent of data and devices."""

from .hrnet import HRNet
from .ocr import FCNHead, ObjectAttention, OCRHead, SpatialGather
from .ocrnet import BACKBONES, HEAD_INITS, HEADS, OCRNet, build_model, reset_parameters
from .weights import load_weights

__all__ = [
    "BACKBONES",
    "FCNHead",
    "HEAD_INITS",
    "HEADS",
    "HRNet",
    "OCRHead",
    "OCRNet",
    "ObjectAttention",
    "SpatialGather",
    "build_model",
    "load_weights",
    "reset_parameters",
]
