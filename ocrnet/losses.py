"""Losses.

Notation: B batch, K classes, H W the crop's size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.classes import IGNORE_INDEX

AUX_LOSS_WEIGHT = 0.4  # of the auxiliary output, region_logits (paper, section 4.2)


def per_pixel_cross_entropy(logits: Tensor, label: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """logits (B, K, H, W), label (B, H, W) int64 -> (B, H, W) in fp32 or wider, 0 for ignored pixels."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, label, class_weights, ignore_index=IGNORE_INDEX, reduction="none")


def cross_entropy(logits: Tensor, label: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The mean of ``per_pixel_cross_entropy`` over *all* pixels, ignored ones included.

    As in mmsegmentation. A crop of ignored pixels gives 0 instead of nan, and processes whose crops have different
    numbers of ignored pixels weigh the same.
    """
    return per_pixel_cross_entropy(logits, label, class_weights).sum() / label.numel()


def ohem_cross_entropy(
    logits: Tensor, label: Tensor, threshold: float, min_kept: int = 131_072, class_weights: Tensor | None = None
) -> Tensor:
    """Online hard example mining: the mean over the pixels whose label has a probability below ``threshold``.

    If less than ``min_kept`` pixels of the batch are that hard, the ``min_kept`` hardest count. The threshold is 0.9 in
    the authors' HRNet-OCR and 0.7 in mmsegmentation.
    """
    valid = label != IGNORE_INDEX
    with torch.no_grad():
        index = label.masked_fill(~valid, 0)[:, None]  # (B, 1, H, W)
        probability = logits.float().softmax(dim=1).gather(1, index)[:, 0][valid]  # of the label
        if probability.numel() > min_kept:
            threshold = max(threshold, float(probability.kthvalue(min_kept + 1)[0]))
        else:
            threshold = torch.inf
    hard = probability < threshold
    return per_pixel_cross_entropy(logits, label, class_weights)[valid][hard].sum() / hard.sum().clamp(min=1)


def ocr_loss(
    outputs: Sequence[Tensor], label: Tensor, class_weights: Tensor | None = None, ohem: float | None = None
) -> tuple[Tensor, Tensor]:
    """final loss + 0.4 * auxiliary loss.

    Args:
        outputs: logits and, except with FCNHead, region_logits, (B, K, H, W) each.
        label: (B, H, W) int64.
        class_weights: (K,).
        ohem: threshold of ``ohem_cross_entropy`` for the final loss. None for ``cross_entropy``.

    Returns:
        The loss, and its detached parts (final, auxiliary). The latter is 0 with FCNHead.
    """
    logits, *region_logits = outputs
    if ohem is None:
        final_loss = cross_entropy(logits, label, class_weights)
    else:
        final_loss = ohem_cross_entropy(logits, label, ohem, class_weights=class_weights)
    aux_loss = cross_entropy(region_logits[0], label, class_weights) if region_logits else final_loss.new_zeros(())
    return final_loss + AUX_LOSS_WEIGHT * aux_loss, torch.stack([final_loss, aux_loss]).detach()
