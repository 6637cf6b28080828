"""From photos to class maps, and from a data set to its score.

Letters: B batch, K classes, H W a picture's size.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .data.cityscapes import leave_signals_to_parent
from .data.transforms import to_input
from .device import Accelerator
from .metrics import ConfusionMatrix, InstanceScore


@torch.inference_mode()
def predict(
    model: nn.Module,
    photo: Tensor,
    accelerator: Accelerator,
    amp: bool = False,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    slide: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
) -> Tensor:
    """uint8 photos (B, 3, H, W) of any size -> class probabilities (B, K, H, W), float32, on the device.

    The model is used as it stands: call ``model.eval()`` first.

    Args:
        scales: the photo is seen at each of these sizes; the result is the mean of the softmaxes.
        flip: and mirrored at each of them as well.
        slide: (h, w), a window moved over the photo instead of showing it whole; overlaps take the mean of logits.
        stride: (h, w) that the window moves; left out: two thirds of the window.
    """
    size = photo.shape[-2:]
    image = to_input(photo.to(accelerator.device))
    total = 0
    for scale in scales:
        scaled = image
        if scale != 1:
            new_size = [int(side * scale + 0.5) for side in size]
            scaled = F.interpolate(image, size=new_size, mode="bilinear", align_corners=False)
        for mirrored in (False, True) if flip else (False,):
            x = scaled.flip(3) if mirrored else scaled
            x = x.contiguous(memory_format=torch.channels_last)
            with accelerator.autocast(amp):
                logits = sliding(model, x, slide, stride) if slide else model(x)[0]
            logits = logits.float().flip(3) if mirrored else logits.float()
            if logits.shape[-2:] != size:
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=model.align_corners)
            total = total + logits.softmax(dim=1)
    return total / (len(scales) * (2 if flip else 1))


def sliding(model: nn.Module, image: Tensor, window: tuple[int, int], stride: tuple[int, int] | None = None) -> Tensor:
    """Logits (B, K, H, W) of an image (B, 3, H, W), seen through a window (h, w) at a time.

    The last window of a row or column is moved back to end at the border, as mmsegmentation does. A window as large as
    the image is the whole image.
    """
    stride = stride or tuple(max(side * 2 // 3, 1) for side in window)
    starts = []
    for side, part, step in zip(image.shape[-2:], window, stride):
        steps = max(side - part + step - 1, 0) // step + 1
        starts.append([max(min(i * step, side - part), 0) for i in range(steps)])
    total, counts = 0, image.new_zeros(1, 1, *image.shape[-2:])
    for top in starts[0]:
        for left in starts[1]:
            area = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = model(image[area])[0].float()
            if isinstance(total, int):
                total = logits.new_zeros(*logits.shape[:2], *image.shape[-2:])
            total[area] += logits
            counts[area] += 1
    return total / counts


def look(model: nn.Module, photo: Tensor, accelerator: Accelerator, amp: bool) -> tuple[Tensor, ...]:
    """One photo, uint8 (3, H, W), seen once at its own size -> the model's outputs (1, K, H, W)."""
    image = to_input(photo[None].to(accelerator.device)).contiguous(memory_format=torch.channels_last)
    with accelerator.autocast(amp):
        return model(image)


@torch.inference_mode()
def segment(model: nn.Module, photo: Tensor, accelerator: Accelerator, amp: bool = False) -> list[np.ndarray]:
    """One photo, uint8 (3, H, W), seen once at its own size -> classes (H, W) of each output, the final one first."""
    return [logits[0].argmax(0).cpu().numpy() for logits in look(model, photo, accelerator, amp)]


class Explanation(NamedTuple):
    """What OCRNet computes on its way for one photo; h w are the feature map's size, C its channels."""

    m: Tensor  # (K, h, w) weights of the soft object regions: over the pixels each sums to one
    f: Tensor  # (K, C) object region representations
    w: Tensor  # (K, h, w) pixel-region relation: at each pixel it sums to one over the regions
    coarse: Tensor  # (K, H, W) class probabilities of the first, coarse segmentation, which the regions come from
    final: Tensor  # (K, H, W) class probabilities of the final one


@torch.inference_mode()
def explain(model: nn.Module, photo: Tensor, accelerator: Accelerator, amp: bool = False) -> Explanation:
    """One photo, uint8 (3, H, W), seen once at its own size -> what the method computes on its way, float32."""
    gather, attention = model.head.gather, model.head.attention
    captured = []  # what goes through the gather: x, region logits at its size, f
    hook = gather.register_forward_hook(lambda _, inputs, output: captured.extend((*inputs, output)))
    logits, region_logits = look(model, photo, accelerator, amp)
    hook.remove()
    x, regions, f = captured
    with accelerator.autocast(amp):
        w = attention.relation(x, f).float().transpose(1, 2)  # (1, K, N)
    m = gather.weights(regions)  # (1, K, N)
    maps = [y[0].unflatten(1, regions.shape[-2:]).cpu() for y in (m, w)]
    coarse, final = (y.float().softmax(dim=1)[0].cpu() for y in (region_logits, logits))
    return Explanation(maps[0], f[0, :, :, 0].float().T.cpu(), maps[1], coarse, final)


def score(
    model: nn.Module,
    dataset: Dataset,
    num_classes: int,
    accelerator: Accelerator,
    workers: int = 0,
    instances: InstanceScore | None = None,
    predict: Callable[[nn.Module, Tensor, Accelerator], Tensor] = predict,
) -> ConfusionMatrix:
    """The confusion matrix of a data set of (photo, label), whole pictures, summed over all processes.

    Process r of R takes pictures r, r + R, ...: each counts once, also where their number is no multiple of R. The
    model must not be wrapped in DDP, whose forward would wait for processes that have one picture less.

    Args:
        instances: also updated, where the data set gives (photo, label, instances).
        predict: how a photo is looked at, such as ``partial(predict, flip=True)``.
    """
    training = model.training
    model.eval()
    confusion = ConfusionMatrix(num_classes, accelerator.device)
    shard = range(accelerator.rank, len(dataset), accelerator.world_size)
    loader = DataLoader(
        dataset, batch_size=1, sampler=shard, num_workers=workers, worker_init_fn=leave_signals_to_parent
    )
    quiet = True if not accelerator.is_main else None  # None: a bar where there is a terminal
    for photo, label, *instance in tqdm(loader, desc="scoring", leave=False, disable=quiet):
        label = label.to(accelerator.device)
        prediction = predict(model, photo, accelerator).argmax(dim=1)
        confusion.update(label, prediction)
        if instances:
            instances.update(instance[0].to(accelerator.device), prediction)
    confusion.reduce()
    if instances:
        instances.reduce()
    model.train(training)
    return confusion
