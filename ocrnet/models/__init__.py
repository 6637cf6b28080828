"""The network: image in, two logit maps out. Knows nothing of data and devices; only weights.py reads files."""

from .hrnet import HRNet
from .ocr import ObjectAttention, OCRHead, SpatialGather
from .ocrnet import HEADS, VARIANTS, FCNHead, OCRNet, build_model
from .weights import load_weights

__all__ = [
    "FCNHead",
    "HEADS",
    "HRNet",
    "OCRHead",
    "OCRNet",
    "ObjectAttention",
    "SpatialGather",
    "VARIANTS",
    "build_model",
    "load_weights",
]
