"""What training minimises, and how fast.

Letters: B batch, K classes, H W the crop's size, t an iteration, T their number.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.classes import IGNORE

REGION_WEIGHT = 0.4  # of the soft object regions' loss (paper, section 4.2)


def pixel_loss(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy in fp32 or wider: logits (B, K, H, W), label (B, H, W) int64 -> the mean over *all* pixels.

    Ignored pixels count in the divisor, as in mmsegmentation: a crop of nothing else gives 0 rather than nan, and
    processes whose crops have unequal shares of them still weigh the same. ``weight`` (K,) is of each class.
    """
    return losses_of_pixels(logits, label, weight).sum() / label.numel()


def hard_pixel_loss(
    logits: Tensor,
    label: Tensor,
    threshold: float,
    min_kept: int = 131_072,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the hard pixels alone (OHEM): the mean over those whose class got a probability < threshold.

    Where fewer than ``min_kept`` of the batch are that hard, the hardest ``min_kept`` count. The authors' HRNet-OCR has
    threshold 0.9, mmsegmentation 0.7.
    """
    scored = label != IGNORE
    with torch.no_grad():
        index = label.masked_fill(~scored, 0)[:, None]
        probability = logits.float().softmax(dim=1).gather(1, index)[:, 0][scored]  # of the right class
        if probability.numel() > min_kept:
            threshold = max(threshold, float(probability.kthvalue(min_kept + 1)[0]))
        else:
            threshold = torch.inf
    hard = probability < threshold
    return losses_of_pixels(logits, label, weight)[scored][hard].sum() / hard.sum().clamp(min=1)


def losses_of_pixels(logits: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
    """(B, H, W), 0 where the label is 255."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, label, weight, ignore_index=IGNORE, reduction="none")


def ocr_loss(
    outputs: Sequence[Tensor], label: Tensor, weight: Tensor | None = None, ohem: float | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the final segmentation + 0.4 of the soft object regions.

    -> the loss to minimise, and its parts (final, regions) without gradient; the latter is 0 where there are none.

    Args:
        outputs: logits and, but for FCNHead, region logits (B, K, H, W).
        label: (B, H, W) int64.
        weight: of each class (K,).
        ohem: in the final segmentation's loss count only pixels that are this hard; see ``hard_pixel_loss``.
    """
    logits, *region_logits = outputs  # of which FCNHead has none
    final = pixel_loss(logits, label, weight) if ohem is None else hard_pixel_loss(logits, label, ohem, weight=weight)
    regions = pixel_loss(region_logits[0], label, weight) if region_logits else torch.zeros_like(final)
    return final + REGION_WEIGHT * regions, torch.stack([final.detach(), regions.detach()])


def poly_lr(lr: float, t: int, T: int, min_lr: float = 1e-4) -> float:
    """Learning rate of iteration t = 0 .. T - 1: ``lr`` in the first, ``min_lr`` in the last.

    As mmengine's PolyLR, whose decay is over T - 1 steps. The paper's ends at 0.

    >>> [round(poly_lr(0.01, t, T=40_000), 5) for t in (0, 20_000, 39_999)]
    [0.01, 0.00541, 0.0001]
    """
    return (lr - min_lr) * (1 - t / max(T - 1, 1)) ** 0.9 + min_lr
