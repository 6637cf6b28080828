"""IoU, as cityscapesScripts' evalPixelLevelSemanticLabeling defines it. Notation: K classes."""

import numpy as np
import torch
from torch import Tensor

from .data.classes import IGNORE_INDEX


class ConfusionMatrix:
    """K x K pixel counts, on ``device``: rows are labels, columns predictions. Pixels labeled 255 are ignored.

    >>> confusion = ConfusionMatrix(num_classes=2)
    >>> confusion.update(target=torch.tensor([0, 0, 1, 255]), prediction=torch.tensor([0, 1, 1, 0]))
    >>> confusion.counts.tolist(), confusion.iou().tolist()
    ([[1, 1], [0, 1]], [0.5, 0.5])
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, target: Tensor, prediction: Tensor) -> None:
        """Count pixels. Both are integer tensors of one shape; targets are 0 .. 255.

        Raises:
            ValueError: they are not integer tensors of one shape with pixels, or a value is not a class.
        """
        valid = all(isinstance(x, Tensor) and not x.is_floating_point() for x in (target, prediction))
        if not valid or target.shape != prediction.shape or not target.numel():
            found = (f"{type(x).__name__} {getattr(x, 'dtype', '')} {[*np.shape(x)]}" for x in (target, prediction))
            raise ValueError(f"expected integer tensors of one shape with pixels, found {' and '.join(found)}")
        k = len(self.counts)
        low, high = prediction.aminmax()
        if low < 0 or high >= k:
            raise ValueError(f"prediction: expected values 0 .. {k - 1}, found {low} .. {high}")
        # rows of all 256 label values: selecting the valid pixels would take ten times as long
        pairs = torch.bincount((k * target.long() + prediction).flatten(), minlength=256 * k).view(-1, k)
        found = pairs.any(dim=1).nonzero().flatten().tolist()
        if not {*found} <= {*range(k), IGNORE_INDEX}:
            raise ValueError(f"target: expected values 0 .. {k - 1} and {IGNORE_INDEX}, found {found}")
        self.counts += pairs[:k]

    def iou(self) -> Tensor:
        """true positives / (true positives + false positives + false negatives), float64 (K,).

        nan for a class that is neither labeled nor predicted, and 0 for one that is predicted only.
        """
        counts = self.counts.cpu().double()
        return counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())

    def mean_iou(self) -> float:
        """mIoU: the mean of the IoUs that are not nan."""
        return float(self.iou().nanmean())

    def pixel_accuracy(self) -> float:
        """Share of the valid pixels with the right class."""
        return float(self.counts.diag().sum().double() / self.counts.sum())
