"""From photos to class maps, and from a data set to its score.

Letters: B batch, K classes, H W a picture's size.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .data.transforms import to_input
from .device import Accelerator
from .metrics import ConfusionMatrix


@torch.inference_mode()
def predict(model: nn.Module, photo: Tensor, accelerator: Accelerator, amp: bool = False) -> Tensor:
    """uint8 photos (B, 3, H, W) of any size -> class probabilities (B, K, H, W), float32, on the device.

    The model is used as it stands: call ``model.eval()`` first.
    """
    image = to_input(photo.to(accelerator.device)).contiguous(memory_format=torch.channels_last)
    with accelerator.autocast(amp):
        logits, _ = model(image)
    return logits.float().softmax(dim=1)


def score(
    model: nn.Module, dataset: Dataset, num_classes: int, accelerator: Accelerator, amp: bool = False, workers: int = 0
) -> ConfusionMatrix:
    """The confusion matrix of a data set of (photo, label), whole pictures, summed over all processes.

    Process r of R takes pictures r, r + R, ...: each counts once, also where their number is no multiple of R. The
    model must not be wrapped in DDP, whose forward would wait for processes that have one picture less.
    """
    training = model.training
    model.eval()
    confusion = ConfusionMatrix(num_classes, accelerator.device)
    shard = range(accelerator.rank, len(dataset), accelerator.world_size)
    loader = DataLoader(dataset, batch_size=1, sampler=shard, num_workers=workers)
    quiet = True if not accelerator.is_main else None  # None: a bar where there is a terminal
    for photo, label in tqdm(loader, desc="scoring", leave=False, disable=quiet):
        prediction = predict(model, photo, accelerator, amp).argmax(dim=1)
        confusion.update(label.to(accelerator.device), prediction)
    confusion.reduce()
    model.train(training)
    return confusion
