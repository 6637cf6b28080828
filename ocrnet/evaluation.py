"""Evaluation: the scores of a data set.

Notation: K classes.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .data.classes import ClassTable, read_classes
from .data.datasets import EvalDataset
from .data.images import read_label, to_tensor
from .data.layout import CITYSCAPES_LAYOUT, Sample, find_images, find_layout, find_samples, has_labels
from .data.train_ids import check_samples
from .device import Accelerator
from .errors import InputError
from .inference import Segment, forward_image, rank_shard, save_png, segment_file
from .instance_iou import InstanceDataset, InstanceIoU, has_instances
from .metrics import ConfusionMatrix, row_baseline
from .signals import ignore_signals_in_worker


def evaluate(
    model: nn.Module,
    dataset: EvalDataset,
    num_classes: int,
    accelerator: Accelerator,
    segment: Segment | None,
    workers: int = 0,
    instance_iou: InstanceIoU | None = None,
    observe: Callable[[Sequence[Tensor], Tensor], None] | None = None,
) -> ConfusionMatrix:
    """The confusion matrix of a data set, summed over all processes. The model is in evaluation mode meanwhile.

    Rank r of R takes images r, r + R, ..., so each image counts once. The model must not be wrapped in DDP, as ranks
    may have different numbers of images.

    Args:
        segment: ``inference.segment`` with its arguments after (model, image) bound.
        instance_iou: updated too; requires an ``InstanceDataset``.
        observe: takes the place of ``segment``: called with the outputs (1, K, H, W) of one forward pass and the label
            (1, H, W), int64, of each image of this process.
    """
    training = model.training
    model.eval()
    confusion = ConfusionMatrix(num_classes, accelerator.metric_device)
    shard = range(accelerator.rank, len(dataset), accelerator.world_size)
    loader = DataLoader(
        dataset, batch_size=1, sampler=shard, num_workers=workers, worker_init_fn=ignore_signals_in_worker
    )
    quiet = None if accelerator.is_main else True  # None: a bar on terminals
    for image, label, *instances in tqdm(loader, desc="evaluating", leave=False, disable=quiet):
        if observe:
            outputs = forward_image(model, image, accelerator)
            observe(outputs, label.to(accelerator.device).long())
            prediction = outputs[0].max(dim=1).indices
        else:
            prediction = segment(model, image)  # (1, H, W)
        prediction = prediction.to(accelerator.metric_device)
        confusion.update(label.to(accelerator.metric_device), prediction)  # label (1, H, W)
        if instance_iou:
            instance_iou.update(instances[0].to(accelerator.metric_device), prediction)
    confusion.reduce(accelerator.device)
    if instance_iou:
        instance_iou.reduce(accelerator.device)
    model.train(training)
    return confusion


def baseline_of(train: list[Sample], val: list[Sample], num_classes: int) -> ConfusionMatrix:
    """``row_baseline`` of two splits, with a progress bar."""
    bars = [tqdm(samples, desc="baseline", disable=None, leave=False) for samples in (train, val)]
    return row_baseline(*((to_tensor(read_label(sample.label)) for sample in bar) for bar in bars), num_classes)


def evaluate_split(
    model: nn.Module,
    table: ClassTable,
    root: Path,
    split: str,
    accelerator: Accelerator,
    segment: Segment,
    workers: int = 0,
    baseline: bool = False,
) -> dict:
    """All scores of a split as plain numbers, see ``summarize``; of the row baseline too if asked for.

    Raises:
        InputError: the classes of the data set are not those of ``table``, the split's labels are not public, or its
            files are invalid.
    """
    own = read_classes(root)
    if own.names != table.names:
        raise InputError(
            f"--data-path {root}: expected the classes of the checkpoint, {', '.join(table.names)}, "
            f"found {', '.join(own.names)}"
        )
    if not has_labels(root, split, own):
        raise InputError(
            f"--split {split}: has no public labels: write PNGs, as the test server takes them, with --export DIR"
        )
    samples = find_samples(root, split)
    train = find_samples(root, "train") if baseline else []
    check_samples(samples[accelerator.rank :: accelerator.world_size], len(table), quiet=not accelerator.is_main)
    accelerator.barrier()
    instance_iou = InstanceIoU(accelerator.metric_device) if has_instances(samples, table) else None
    dataset = InstanceDataset(samples) if instance_iou else EvalDataset(samples)
    confusion = evaluate(model, dataset, len(table), accelerator, segment, workers, instance_iou)
    scores = {"images": len(samples), **summarize(confusion, table, instance_iou)}
    if baseline and accelerator.is_main:
        scores["row_baseline"] = summarize(baseline_of(train, samples, len(table)), table)
    return scores


def export_split(
    model: nn.Module,
    root: Path,
    split: str,
    folder: Path,
    table: ClassTable,
    accelerator: Accelerator,
    segment: Segment,
) -> None:
    """Write the label ids of each image to ``folder``.

    Cityscapes' under the name of the image, as its test server takes them; of the plain layout with their folders.
    """
    images, layout = find_images(root, split), find_layout(root)
    label_ids = np.array(table.ids, np.uint8)  # (K,) train id -> label id
    folder.mkdir(parents=True, exist_ok=True)
    for path in rank_shard(images, accelerator, "exporting"):
        inside = path.relative_to(root / layout.images / split).with_suffix(".png")
        target = folder / (path.name if layout is CITYSCAPES_LAYOUT else inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        save_png(label_ids[segment_file(model, path, segment)[1]], target)
    accelerator.print0(f"{len(images)} images of label ids in {folder}")


def sample_predictions(
    model: nn.Module, dataset: EvalDataset, accelerator: Accelerator, count: int = 4
) -> list[tuple[np.ndarray, ...]]:
    """(image, label, final prediction, prediction of the auxiliary output) of images spread over a data set.

    uint8 (H, W, 3), then train ids (H, W). With FCNHead there is no auxiliary output.
    """
    samples = []
    for i in range(0, len(dataset), max(len(dataset) // count, 1))[:count]:
        image, label, *_ = dataset[i]
        outputs = forward_image(model, image[None], accelerator)
        predictions = (logits[0].argmax(0).cpu().numpy() for logits in outputs)
        samples.append((image.permute(1, 2, 0).numpy(), label.numpy(), *predictions))
    return samples


# ---- scores as numbers and as tables ---------------------------------------------------------------------------------


def without_nan(names: list[str], values: Tensor) -> dict[str, float | None]:
    """A value for each name; None, which JSON has, instead of nan."""
    return {name: None if math.isnan(x) else x for name, x in zip(names, values.tolist())}


def summarize(confusion: ConfusionMatrix, table: ClassTable, instance_iou: InstanceIoU | None = None) -> dict:
    """Scores 0 .. 1; None for a class that is neither labeled nor predicted."""
    categories = confusion.merged(table.category_of).iou()
    scores = {
        "mIoU": confusion.mean_iou(),
        "mIoU_present": float(confusion.iou()[confusion.present()].mean()),
        "mIoU_categories": float(categories.nanmean()),
        "pixel_accuracy": confusion.pixel_accuracy(),
        "IoU": without_nan(table.names, confusion.iou()),
        "IoU_categories": without_nan(table.categories, categories),
        "pixels": dict(zip(table.names, confusion.counts.sum(1).tolist())),
    }
    if instance_iou:
        iiou, iiou_categories = instance_iou.iou(confusion)
        scores["iIoU"] = without_nan(table.names, iiou)
        scores["iIoU_categories"] = without_nan(table.categories, iiou_categories)
    return scores


def format_shares(pixels: Tensor, table: ClassTable) -> str:
    """A line per class that occurs, with its share of ``pixels``, int64 (K,); the largest first."""
    shares = 100 * pixels.double() / pixels.sum().clamp(min=1)
    found = [k for k in shares.argsort(descending=True, stable=True).tolist() if pixels[k]]
    width = max((len(table.names[k]) for k in found), default=0)
    return "\n".join(f"{table.names[k]:{width}} {shares[k]:6.1f} %" for k in found)


def format_percent(score: float | None) -> str:
    return "nan" if score is None or math.isnan(score) else f"{100 * score:.2f}"


def print_table(title: str, columns: dict[str, dict]) -> None:
    """Columns of scores as percent, a row per name."""
    width = max(17, *(len(name) + 2 for column in columns.values() for name in column))
    print(f"{title:{width}}" + "".join(f"{name:>13}" for name in columns))
    for name in next(iter(columns.values())):
        print(f"{name:{width}}" + "".join(f"{format_percent(column[name]):>13}" for column in columns.values()))


def print_scores(scores: dict) -> None:
    """The tables of classes and categories, with their means."""
    keys = [key for key in ("IoU", "iIoU") if key in scores]
    iou, pixels = scores["IoU"], scores["pixels"]
    shares = {name: count / max(sum(pixels.values()), 1) for name, count in pixels.items()}
    print_table("class", {**{f"{key} %": scores[key] for key in keys}, "% of pixels": shares})
    counted = sum(x is not None for x in iou.values())
    print(f"mIoU {format_percent(scores['mIoU'])}, mean of {counted} of {len(iou)} classes")
    absent = [name + (" (predicted: IoU 0)" if iou[name] is not None else "") for name in iou if not pixels[name]]
    if absent:
        print(
            f"mIoU {format_percent(scores['mIoU_present'])}, mean of the {len(iou) - len(absent)} classes in the labels"
        )
        print(f"not in the labels: {', '.join(absent)}")
    if len(scores["IoU_categories"]) < len(iou):
        print()
        print_table("category", {f"{key} %": scores[key + "_categories"] for key in keys})
        print(f"mIoU {format_percent(scores['mIoU_categories'])} of the categories")
    print(f"\npixel accuracy {format_percent(scores['pixel_accuracy'])}")
    if "row_baseline" in scores:
        numbers = [format_percent(scores["row_baseline"][key]) for key in ("mIoU", "mIoU_present")]
        print(f"most frequent class of each row in train: mIoU {numbers[0]}, of the classes in the labels {numbers[1]}")
