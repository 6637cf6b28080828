"""The network, image in, logits out, and weights for it. Independent of data."""

from .hrnet import HRNet
from .ocr import FCNHead, ObjectAttention, OCRHead, SpatialGather
from .ocrnet import BACKBONES, HEADS, OCRNet, build_model
from .weights import load_weights

__all__ = [
    "BACKBONES", "FCNHead", "HEADS", "HRNet", "OCRHead", "OCRNet", "ObjectAttention", "SpatialGather", "build_model",
    "load_weights",
]  # fmt: skip
