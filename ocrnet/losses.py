"""What training minimises, and how fast.

Letters: B batch, K classes, H W the crop's size, t an iteration, T their number.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

REGION_WEIGHT = 0.4  # of the soft object regions' loss (paper, section 4.2)


def pixel_loss(logits: Tensor, label: Tensor, ignore: int = 255) -> Tensor:
    """Cross-entropy in fp32 or wider: logits (B, K, H, W), label (B, H, W) int64 -> the mean over *all* pixels.

    Ignored pixels count in the divisor, as in mmsegmentation: a crop of nothing else gives 0 rather than nan, and
    processes whose crops have unequal shares of them still weigh the same.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, label, ignore_index=ignore, reduction="sum") / label.numel()


def ocr_loss(logits: Tensor, region_logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """-> loss to minimise, and its two parts (2,) without gradient: of the final segmentation and of the regions."""
    final, regions = pixel_loss(logits, label), pixel_loss(region_logits, label)
    return final + REGION_WEIGHT * regions, torch.stack([final.detach(), regions.detach()])


def poly_lr(lr: float, t: int, T: int, min_lr: float = 1e-4, power: float = 0.9) -> float:
    """Learning rate of iteration t = 0 .. T - 1: ``lr`` in the first, ``min_lr`` in the last.

    As mmengine's PolyLR, whose decay is over T - 1 steps.
    """
    return (lr - min_lr) * (1 - t / max(T - 1, 1)) ** power + min_lr
