"""iIoU: IoU in which every instance of a class weighs the same, as cityscapesScripts defines it. Cityscapes only.

Notation: K classes, H W an image's size.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data.classes import CITYSCAPES, IGNORE_INDEX, ClassTable
from .data.datasets import EvalDataset
from .data.images import decode
from .data.layout import Sample
from .metrics import ConfusionMatrix, sum_over_processes

# Pixels of the average instance in the training set (cityscapesScripts, evalPixelLevelSemanticLabeling).
AVERAGE_INSTANCE = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}


def instance_path(sample: Sample) -> Path:
    """The ``_instanceIds.png`` of a sample."""
    return sample.label.with_name(sample.label.name.replace("labelTrainIds", "instanceIds"))


def read_instances(sample: Sample) -> Tensor:
    """int32 (H, W): 1000 (k + 1) + j for instance j of class k, and 0 outside of instances or where ignored."""
    ids = np.asarray(decode(instance_path(sample))).astype(np.int32)  # 1000 * label id + j, or a label id
    train_ids = CITYSCAPES.train_id_of[ids // 1000].astype(np.int32)
    inside = (ids > 1000) & (train_ids != IGNORE_INDEX)
    return torch.from_numpy(np.where(inside, 1000 * (train_ids + 1) + ids % 1000, 0))


class InstanceDataset(EvalDataset):
    """Whole images with their instances. Item i is (image, label, instances); see ``read_instances``."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return *super().__getitem__(index), read_instances(self.samples[index])


def has_instances(samples: Sequence[Sample], table: ClassTable) -> bool:
    """Whether iIoU is defined: classes and files are Cityscapes', and all instances are there."""
    return table.names == CITYSCAPES.names and all(
        instance_path(sample) != sample.label and instance_path(sample).exists() for sample in samples
    )


class InstanceIoU:
    """iIoU of each class and category.

    A pixel of an instance weighs average instance size / size of this instance. False positives weigh 1.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        sizes = [AVERAGE_INSTANCE.get(name, torch.nan) for name in CITYSCAPES.names]
        self.average_sizes = torch.tensor(sizes, dtype=torch.float64, device=device)  # (K,)
        self.category_of = torch.tensor(CITYSCAPES.category_of, device=device)  # (K,)
        # weighted pixels of instances, per class: predicted as the class, predicted as its category, all
        self.sums = torch.zeros(len(sizes), 3, dtype=torch.float64, device=device)

    def update(self, instances: Tensor, prediction: Tensor) -> None:
        """Count pixels. Both are integer tensors of one shape; ``instances`` as ``read_instances`` gives them."""
        inside = instances > 0
        ids, which = instances[inside].unique(return_inverse=True)
        classes, prediction = (ids // 1000 - 1)[which].long(), prediction[inside].long()
        weight = self.average_sizes[classes] / torch.bincount(which)[which]
        in_class = prediction == classes
        in_category = self.category_of[prediction] == self.category_of[classes]
        counted = torch.stack([in_class, in_category, torch.ones_like(in_class)], dim=1) * weight[:, None]
        self.sums.index_add_(0, classes, counted)

    def reduce(self, device: torch.device | None = None) -> None:
        """Sum over all processes, in place. See ``metrics.sum_over_processes``."""
        self.sums = sum_over_processes(self.sums, device)

    def iou(self, confusion: ConfusionMatrix) -> tuple[Tensor, Tensor]:
        """iIoU of each class (K,) and of each category. nan for those without instances."""
        in_class, in_category, total = self.sums.cpu().T
        without = self.average_sizes.cpu().isnan()  # classes without instances
        classes = (in_class / (total + confusion.false_positives())).masked_fill(without, torch.nan)
        categories = confusion.merged(self.category_of.tolist())

        def per_category(values: Tensor) -> Tensor:
            return torch.zeros(categories.num_classes).double().index_add(0, self.category_of.cpu(), values)

        iou = per_category(in_category) / (per_category(total) + categories.false_positives())
        return classes, iou.masked_fill(per_category((~without).double()) == 0, torch.nan)
