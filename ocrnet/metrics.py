"""Scores, as cityscapesScripts' evalPixelLevelSemanticLabeling defines them.

Letters: K classes, H W a picture's size.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .data.classes import IGNORE


class ConfusionMatrix:
    """K x K pixel counts: row = what the label says, column = what was predicted.

    >>> matrix = ConfusionMatrix(num_classes=2)
    >>> matrix.update(target=torch.tensor([0, 0, 1, 255]), prediction=torch.tensor([0, 1, 1, 0]))
    >>> matrix.counts.tolist(), matrix.iou().tolist()
    ([[1, 1], [0, 1]], [0.5, 0.5])

    Args:
        num_classes: K. Label 255 is left out.
        device: where it is kept, which is where the process group wants it for ``reduce``.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, target: Tensor, prediction: Tensor) -> None:
        """Count pixels: integer tensors of one shape.

        Raises:
            ValueError: the shapes differ, or a value is no class.
        """
        if target.shape != prediction.shape:
            raise ValueError(f"target {tuple(target.shape)} and prediction {tuple(prediction.shape)} differ in shape")
        scored = target != IGNORE
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
        counts = self.counts.cpu().double()
        hit = counts.diag()
        return hit / (counts.sum(0) + counts.sum(1) - hit)

    def mean_iou(self) -> float:
        """Mean of the IoUs that are not nan."""
        return float(self.iou().nanmean())

    def merged(self, group_of: Sequence[int]) -> "ConfusionMatrix":
        """The matrix of groups of classes: class k belongs to group ``group_of[k]``, numbered from 0 without gaps."""
        groups = ConfusionMatrix(max(group_of) + 1)
        index = torch.tensor(group_of)
        groups.counts.index_put_((index[:, None], index[None, :]), self.counts.cpu(), accumulate=True)
        return groups

    def present(self) -> Tensor:
        """Which classes occur in the labels (K,)."""
        return self.counts.sum(1) > 0

    def pixel_accuracy(self) -> float:
        """Share of the scored pixels that are right."""
        return float(self.counts.diag().sum().double() / self.counts.sum())


class InstanceScore:
    """iIoU: IoU in which every instance of a class weighs the same, however large it is.

    A pixel of an instance weighs as much as the class's average instance is larger than this one; pixels that are
    wrongly given to the class belong to no instance and weigh 1.

    Args:
        average_sizes: pixels of each class's average instance (K,), nan for classes without instances.
        group_of: for the same score of groups of classes, as in ``ConfusionMatrix.merged``.
    """

    def __init__(self, average_sizes: Tensor, group_of: Sequence[int], device: torch.device | str = "cpu"):
        self.average_sizes = average_sizes.to(device, torch.float64)
        self.group_of = torch.tensor(group_of, device=device)
        # weighted pixels of instances: by class, (as the class, as its group, in all)
        self.sums = torch.zeros(len(group_of), 3, dtype=torch.float64, device=device)

    def update(self, instances: Tensor, prediction: Tensor) -> None:
        """Integer tensors of one shape: 1000 (k + 1) + j for pixels of instance j = 0 .. 999 of class k, or 0, and what
        was predicted.
        """
        inside = instances > 0
        numbers, which = instances[inside].unique(return_inverse=True)
        classes, prediction = (numbers // 1000 - 1)[which].long(), prediction[inside].long()
        weight = self.average_sizes[classes] / torch.bincount(which)[which]
        hit = prediction == classes
        group_hit = self.group_of[prediction] == self.group_of[classes]
        self.sums.index_add_(0, classes, torch.stack([hit, group_hit, torch.ones_like(hit)], dim=1) * weight[:, None])

    def reduce(self) -> None:
        """Sum over all processes, in place."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)

    def iou(self, confusion: ConfusionMatrix) -> tuple[Tensor, Tensor]:
        """-> iIoU of each class (K,) and of each group; nan for those without instances."""
        hit, group_hit, total = self.sums.cpu().T
        without = self.average_sizes.cpu().isnan()  # classes without instances
        classes = (hit / (total + wrongly_given(confusion))).masked_fill(without, torch.nan)
        groups = confusion.merged(self.group_of.tolist())

        def by_group(values: Tensor) -> Tensor:
            return torch.zeros(groups.num_classes).double().index_add(0, self.group_of.cpu(), values)

        of_groups = by_group(group_hit) / (by_group(total) + wrongly_given(groups))
        return classes, of_groups.masked_fill(by_group((~without).double()) == 0, torch.nan)


def wrongly_given(confusion: ConfusionMatrix) -> Tensor:
    """Pixels predicted as each class that are of another (K,)."""
    return (confusion.counts.sum(0) - confusion.counts.diag()).cpu().double()


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
