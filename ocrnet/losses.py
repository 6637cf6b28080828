"""Losses, and the schedule of the learning rate.

Notation: B batch, K classes, H W the crop's size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.classes import IGNORE_INDEX

AUX_LOSS_WEIGHT = 0.4  # of the auxiliary output, region_logits (paper, section 4.2)


def cross_entropy(logits: Tensor, label: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The sum over the pixels that are not ignored, divided by the number of *all* pixels, as in mmsegmentation.

    A crop of ignored pixels gives 0, and processes whose crops have different numbers of ignored pixels weigh the same.
    logits (B, K, H, W), label (B, H, W) int64, class_weights (K,). The loss is in fp32 or wider.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    per_pixel = F.cross_entropy(logits, label, class_weights, ignore_index=IGNORE_INDEX, reduction="none")  # (B, H, W)
    return per_pixel.sum() / label.numel()


def ocr_loss(outputs: Sequence[Tensor], label: Tensor, class_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """final loss + 0.4 * auxiliary loss; and its detached parts (final, auxiliary), (2,).

    Args:
        outputs: of OCRNet. With FCNHead there are no region_logits, and the auxiliary loss is 0.
        label, class_weights: see ``cross_entropy``.
    """
    logits, *region_logits = outputs
    final_loss = cross_entropy(logits, label, class_weights)
    aux_loss = cross_entropy(region_logits[0], label, class_weights) if region_logits else final_loss.new_zeros(())
    return final_loss + AUX_LOSS_WEIGHT * aux_loss, torch.stack([final_loss, aux_loss]).detach()


def poly_lr(lr: float, t: int, T: int, min_lr: float = 1e-4, power: float = 0.9) -> float:
    """Polynomial decay from ``lr`` in iteration t = 0 to ``min_lr`` in the last, t = T - 1.

    As mmengine's PolyLR, which divides by T - 1. The paper's schedule ends at 0.

    >>> [round(poly_lr(0.01, t, T=40_000), 5) for t in (0, 20_000, 39_999)]
    [0.01, 0.00541, 0.0001]
    """
    min_lr = min(min_lr, lr)
    return (lr - min_lr) * max(1 - t / max(T - 1, 1), 0) ** power + min_lr
