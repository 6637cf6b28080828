"""Scores, as cityscapesScripts' evalPixelLevelSemanticLabeling defines them.

Letters: K classes, H W a picture's size.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class ConfusionMatrix:
    """K x K pixel counts: row = what the label says, column = what was predicted.

    Args:
        num_classes: K. Label 255 is left out.
        device: where it is kept, which is where the process group wants it for ``reduce``.
    """

    def __init__(self, num_classes: int, device="cpu", ignore: int = 255):
        self.num_classes = num_classes
        self.ignore = ignore
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, target: Tensor, prediction: Tensor) -> None:
        """Count pixels: integer tensors of one shape.

        Raises:
            ValueError: the shapes differ, or a value is no class.
        """
        if target.shape != prediction.shape:
            raise ValueError(f"target {tuple(target.shape)} and prediction {tuple(prediction.shape)} differ in shape")
        scored = target != self.ignore
        target, prediction = target[scored].long(), prediction[scored].long()
        for name, values in (("target", target), ("prediction", prediction)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.num_classes:
                found = f"{int(values.min())} .. {int(values.max())}"
                raise ValueError(f"{name} values {found}: expected 0 .. {self.num_classes - 1}")
        pairs = torch.bincount(self.num_classes * target + prediction, minlength=self.num_classes**2)
        self.counts += pairs.view_as(self.counts).to(self.counts.device)

    def reduce(self) -> None:
        """Sum over all processes, in place. Without a process group nothing happens."""
        if dist.is_initialized():
            dist.all_reduce(self.counts)

    def iou(self) -> Tensor:
        """Intersection over union of each class (K,), 0 .. 1; nan where it is neither in the labels nor predicted."""
        hit = self.counts.diag().double()
        return hit / (self.counts.sum(0) + self.counts.sum(1) - hit)

    def mean_iou(self) -> float:
        """Mean of the IoUs that are not nan."""
        return float(self.iou().nanmean())

    def present(self) -> Tensor:
        """Which classes occur in the labels (K,)."""
        return self.counts.sum(1) > 0

    def pixel_accuracy(self) -> float:
        """Share of the scored pixels that are right."""
        return float(self.counts.diag().sum().double() / self.counts.sum())


def row_baseline(train_labels: Iterable[Tensor], val_labels: Iterable[Tensor], num_classes: int) -> ConfusionMatrix:
    """The score of looking at no photo at all: each row of the picture gets the class that fills it most in training.

    Labels are integer tensors (H, W) of any sizes; rows are compared by their relative height, in 128 bands.
    """
    bands = 128

    def band_of_rows(label: Tensor) -> Tensor:
        return (torch.arange(label.shape[0]) * bands // label.shape[0])[:, None].expand(label.shape)

    counts = torch.zeros(bands * 256, dtype=torch.int64)
    for label in train_labels:
        counts += torch.bincount((band_of_rows(label) * 256 + label).flatten(), minlength=bands * 256)
    most_frequent = counts.view(bands, 256)[:, :num_classes].argmax(1)
    confusion = ConfusionMatrix(num_classes)
    for label in val_labels:
        confusion.update(label, most_frequent[band_of_rows(label)])
    return confusion
