"""Evaluation: the scores of a data set.

Notation: K classes.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import InputError
from .batches import make_loader
from .data.classes import ClassTable
from .data.datasets import EvalDataset, median_size
from .device import Accelerator
from .inference import Forward, class_map
from .metrics import ConfusionMatrix


def evaluate(
    forward: Forward,
    dataset: EvalDataset,
    accelerator: Accelerator,
    workers: int = 0,
    criterion: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, ...]] | None = None,
) -> tuple[ConfusionMatrix, float]:
    """The confusion matrix of a data set, summed over all processes, and the mean of ``criterion`` over its images.

    Rank r of R takes images r, r + R, ..., so each image counts once. The model of ``forward`` must not be wrapped in
    DDP, as ranks may have different numbers of images.

    Args:
        criterion: ``ocr_loss``, whose first result counts. Without it the mean is 0.

    Raises:
        InputError: no pixel is labeled.
    """
    # SDAA may have no exact int64 sums
    counting_device = torch.device("cpu") if accelerator.device.type == "sdaa" else accelerator.device
    confusion = ConfusionMatrix(len(dataset.table), counting_device)
    losses = [torch.zeros((), device=accelerator.device)]
    shard = range(accelerator.rank, len(dataset), accelerator.world_size)
    height, width = median_size(dataset.samples)
    loader = make_loader(dataset, 1, shard, accelerator, workers, height * width)
    for image, label in tqdm(loader, "evaluating", leave=False, disable=None if accelerator.is_main else True):
        outputs = forward(image)
        prediction = class_map(outputs[0])  # (1, H, W)
        confusion.update(label.to(counting_device), prediction.to(counting_device))
        if criterion:
            losses.append(criterion(outputs, label.to(accelerator.device).long())[0])
    confusion.counts = accelerator.sum_over_ranks(confusion.counts)
    if not confusion.counts.any():
        first = dataset.samples[0].label
        raise InputError(
            f"{first} and the others: expected labeled pixels, found none; evaluate.py --export needs none"
        )
    return confusion, accelerator.sum_over_ranks(torch.stack(losses).cpu().double().sum()[None]).item() / len(dataset)


def sample_predictions(forward: Forward, dataset: EvalDataset, count: int = 4) -> list[tuple[np.ndarray, ...]]:
    """(image, label, final prediction, prediction of the auxiliary output) of images spread over a data set.

    uint8 (H, W, 3), then train ids (H, W). With FCNHead there is no auxiliary output.
    """
    samples, count = [], min(count, len(dataset))
    for i in range(count):
        image, label = dataset[i * len(dataset) // count]
        predictions = (class_map(logits)[0].cpu().numpy() for logits in forward(image[None]))
        samples.append((image.permute(1, 2, 0).numpy(), label.numpy(), *predictions))
    return samples


# ---- scores as numbers and as a table --------------------------------------------------------------------------------


def summarize(confusion: ConfusionMatrix, table: ClassTable) -> dict:
    """Scores 0 .. 1; None, as JSON has no nan, for a class that is neither labeled nor predicted."""
    return {
        "mIoU": confusion.mean_iou(),
        "pixel_accuracy": confusion.pixel_accuracy(),
        "IoU": {name: None if math.isnan(x) else x for name, x in zip(table.names, confusion.iou().tolist())},
        "pixels": dict(zip(table.names, confusion.counts.sum(1).tolist())),
    }


def print_scores(scores: dict) -> None:
    """IoU and share of the labeled pixels of each class, and their mean."""
    iou, pixels = scores["IoU"], scores["pixels"]
    width = max(map(len, (*iou, "class"))) + 2
    print(f"{'class':{width}}{'IoU %':>8}{'% of pixels':>13}")
    for name, score in iou.items():
        text = "nan" if score is None else f"{100 * score:.2f}"
        print(f"{name:{width}}{text:>8}{100 * pixels[name] / sum(pixels.values()):>13.2f}")
    counted = sum(score is not None for score in iou.values())
    print(f"\nmIoU {100 * scores['mIoU']:.2f}, mean of {counted} of {len(iou)} classes")
    absent = [name for name in iou if iou[name] is not None and not pixels[name]]
    if absent:
        print(f"predicted, but not in the labels, so of IoU 0: {', '.join(absent)}")
    print(f"pixel accuracy {100 * scores['pixel_accuracy']:.2f}")
