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


def cross_entropy(
    logits: Tensor, label: Tensor, class_weights: Tensor | None = None, avg_non_ignore: bool = False
) -> Tensor:
    """The sum of ``per_pixel_cross_entropy`` over the number of *all* pixels, ignored ones included (mmsegmentation).

    A crop of ignored pixels gives 0, and processes whose crops have different numbers of ignored pixels weigh the same.

    Args:
        avg_non_ignore: divide by the class weights of the pixels that are not ignored, as the authors and
            F.cross_entropy do. (F.cross_entropy gives nan for a crop of ignored pixels, this 0.)
    """
    loss = per_pixel_cross_entropy(logits, label, class_weights).sum()
    if not avg_non_ignore:
        return loss / label.numel()
    valid = label != IGNORE_INDEX
    weight = valid.to(loss.dtype)  # (B, H, W)
    if class_weights is not None:
        weight = weight * class_weights[label.masked_fill(~valid, 0)]
    return loss / weight.sum().clamp(min=torch.finfo(loss.dtype).tiny)


def hard_pixels(logits: Tensor, label: Tensor, threshold: float, min_kept: int) -> Tensor:
    """Which pixels online hard example mining keeps: bool (B, H, W), False for ignored pixels.

    Those whose label has a probability below ``threshold``. If there are less than ``min_kept``, the threshold becomes
    the (min_kept + 1)-th smallest probability of the batch, or the largest.
    """
    with torch.no_grad():
        valid = label != IGNORE_INDEX
        index = label.masked_fill(~valid, 0)[:, None]  # (B, 1, H, W)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probability = wide.softmax(dim=1).gather(1, index)[:, 0]  # (B, H, W), of the label
        ascending = probability[valid].sort().values
        if len(ascending):
            threshold = ascending[min(min_kept, len(ascending) - 1)].clamp(min=threshold)
        return valid & (probability < threshold)


def ohem_mmsegmentation(
    logits: Tensor,
    label: Tensor,
    class_weights: Tensor | None = None,
    threshold: float = 0.7,
    min_kept: int = 100_000,
) -> Tensor:
    """OHEM as mmsegmentation's OHEMPixelSampler: the loss of the hard pixels over the number of *all* pixels.

    Args:
        min_kept: per image.
    """
    hard = hard_pixels(logits, label, threshold, min_kept * len(label))
    return (per_pixel_cross_entropy(logits, label, class_weights) * hard).sum() / label.numel()


def ohem_authors(
    logits: Tensor,
    label: Tensor,
    class_weights: Tensor | None = None,
    threshold: float = 0.9,
    min_kept: int = 131_072,
) -> Tensor:
    """OHEM as the authors' HRNet-OCR: the mean loss of the hard pixels. 0 if there are none, where theirs is nan.

    Args:
        min_kept: per batch of one process.
    """
    hard = hard_pixels(logits, label, threshold, min_kept)
    return per_pixel_cross_entropy(logits, label, class_weights)[hard].sum() / hard.sum().clamp(min=1)


OHEM = {"mmsegmentation": ohem_mmsegmentation, "authors": ohem_authors}


def ocr_loss(
    outputs: Sequence[Tensor],
    label: Tensor,
    class_weights: Tensor | None = None,
    ohem: str | None = None,
    avg_non_ignore: bool = False,
) -> tuple[Tensor, Tensor]:
    """final loss + 0.4 * auxiliary loss.

    Args:
        outputs: logits and, except with FCNHead, region_logits, (B, K, H, W) each.
        label: (B, H, W) int64.
        class_weights: (K,).
        ohem: of ``OHEM``, for the final loss. None for ``cross_entropy``.
        avg_non_ignore: see ``cross_entropy``. The authors' OHEM goes without it: their auxiliary loss is then the mean
            over all pixels.

    Returns:
        The loss, and its detached parts (final, auxiliary). The latter is 0 with FCNHead.
    """
    logits, *region_logits = outputs
    if ohem is None:
        final_loss = cross_entropy(logits, label, class_weights, avg_non_ignore)
    else:
        final_loss = OHEM[ohem](logits, label, class_weights)
    aux_loss = final_loss.new_zeros(())
    if region_logits:
        aux_loss = cross_entropy(region_logits[0], label, class_weights, avg_non_ignore)
    return final_loss + AUX_LOSS_WEIGHT * aux_loss, torch.stack([final_loss, aux_loss]).detach()
