"""IoU, as cityscapesScripts' evalPixelLevelSemanticLabeling defines it. For iIoU see instance_iou.py.

Notation: K classes, H W an image's size.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .data.classes import IGNORE_INDEX


def sum_over_processes(x: Tensor, device: torch.device | None = None) -> Tensor:
    """The exact sum of an int64 or float64 tensor over all processes.

    The numbers are gathered and added on the CPU, as a device may have no exact int64 or float64 addition (SDAA).

    Args:
        device: of the process group. None for that of x.
    """
    if not dist.is_initialized():
        return x
    words = x.view(torch.int64).to(device or x.device)
    parts = [torch.empty_like(words) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, words)
    return torch.stack([part.cpu().view(x.dtype) for part in parts]).sum(0).to(x.device)


class ConfusionMatrix:
    """K x K pixel counts: rows are labels, columns predictions.

    >>> confusion = ConfusionMatrix(num_classes=2)
    >>> confusion.update(target=torch.tensor([0, 0, 1, 255]), prediction=torch.tensor([0, 1, 1, 0]))
    >>> confusion.counts.tolist(), confusion.iou().tolist()
    ([[1, 1], [0, 1]], [0.5, 0.5])

    Args:
        num_classes: K. Pixels labeled 255 are ignored.
        device: of the counts.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, target: Tensor, prediction: Tensor) -> None:
        """Count pixels. Both are integer tensors of one shape.

        Raises:
            ValueError: the shapes differ, or a value is not a class.
        """
        if target.shape != prediction.shape:
            raise ValueError(f"expected one shape, found target {target.shape} and prediction {prediction.shape}")
        valid = target != IGNORE_INDEX
        target, prediction = target[valid].long(), prediction[valid].long()
        for name, values in (("target", target), ("prediction", prediction)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.num_classes:
                found = f"{int(values.min())} .. {int(values.max())}"
                raise ValueError(f"{name}: expected values 0 .. {self.num_classes - 1}, found {found}")
        pairs = torch.bincount(self.num_classes * target + prediction, minlength=self.num_classes**2)
        self.counts += pairs.view_as(self.counts).to(self.counts.device)

    def reduce(self, device: torch.device | None = None) -> None:
        """Sum over all processes, in place. See ``sum_over_processes``."""
        self.counts = sum_over_processes(self.counts, device)

    def true_positives(self) -> Tensor:
        """(K,) float64."""
        return self.counts.diag().cpu().double()

    def false_positives(self) -> Tensor:
        """(K,) float64."""
        return self.counts.sum(0).cpu().double() - self.true_positives()

    def iou(self) -> Tensor:
        """Intersection over union of each class (K,), 0 .. 1. nan for a class neither labeled nor predicted."""
        return self.true_positives() / (self.counts.sum(1).cpu().double() + self.false_positives())

    def mean_iou(self) -> float:
        """mIoU: the mean of the IoUs that are not nan."""
        return float(self.iou().nanmean())

    def pixel_accuracy(self) -> float:
        """Share of the valid pixels with the right class."""
        return float(self.counts.diag().sum().double() / self.counts.sum())

    def present(self) -> Tensor:
        """Which classes occur in the labels, bool (K,)."""
        return self.counts.sum(1).cpu() > 0

    def merged(self, group_of: Sequence[int]) -> "ConfusionMatrix":
        """The matrix of groups of classes. Class k is in group ``group_of[k]``; groups are numbered from 0."""
        groups = ConfusionMatrix(max(group_of) + 1)
        index = torch.tensor(group_of)
        groups.counts.index_put_((index[:, None], index[None, :]), self.counts.cpu(), accumulate=True)
        return groups


def row_baseline(train_labels: Iterable[Tensor], val_labels: Iterable[Tensor], num_classes: int) -> ConfusionMatrix:
    """The score without looking at an image: predict for each row the most frequent class of that row in training.

    Labels are integer tensors (H, W) of any sizes. Rows are compared by relative height, in 128 bands.
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
