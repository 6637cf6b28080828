"""The data sets that training and evaluation read, and the order of training.

Notation: H W an image's size, h w the crop's.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .classes import ClassTable
from .images import read_image, read_label, to_tensor
from .layout import Sample
from .packed import read_pixels
from .transforms import NO_CHANGE, crop_image, sample_crop, sample_photometric


class TrainDataset(Dataset):
    """Random crops. Item (epoch, index) is (image, label, photometric) of one sample:

    image uint8 (3, h, w), label uint8 (h, w), and the parameters of its photometric distortion, float32 (5,), which
    ``transforms.preprocess`` applies on the device. The item depends only on seed, epoch and index, not on the rank or
    the worker that reads it.

    Args:
        crop_size: (h, w).
        scale_range: range of the random resizing.
        color_jitter: sample a photometric distortion.
        cat_max_ratio, scale_step: see ``sample_crop``.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        crop_size: tuple[int, int],
        seed: int,
        scale_range: tuple[float, float] = (0.5, 2.0),
        color_jitter: bool = True,
        cat_max_ratio: float = 0.75,
        scale_step: float = 0.0,
    ):
        self.samples = samples
        self.crop_size = crop_size
        self.seed = seed
        self.scale_range = scale_range
        self.color_jitter = color_jitter
        self.cat_max_ratio = cat_max_ratio
        self.scale_step = scale_step

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        epoch, index = key
        rng = random.Random(f"{self.seed} {epoch} {index}")
        sample = self.samples[index]
        label = np.asarray(read_pixels(sample.label, read_label))  # (H, W)
        params, label = sample_crop(
            label, self.crop_size, rng, self.scale_range, self.cat_max_ratio, self.scale_step
        )  # label (h, w)
        image = read_pixels(sample.image, partial(read_image, rows=params.top + params.height))
        photometric = torch.tensor(sample_photometric(rng) if self.color_jitter else NO_CHANGE)
        return crop_image(image, params, self.crop_size), label, photometric


class EvalDataset(Dataset):
    """Whole images. Item i is (image, label) of sample i: uint8 (3, H, W) and uint8 (H, W)."""

    def __init__(self, samples: Sequence[Sample]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        sample = self.samples[index]
        return to_tensor(read_image(sample.image)), to_tensor(read_label(sample.label))


class Data(NamedTuple):
    """The data of a run."""

    table: ClassTable
    train: TrainDataset
    val: EvalDataset
    class_weights: Tensor | None = None  # in the loss: (K,) on the device


class InfiniteSampler(Sampler):
    """An infinite sequence of (epoch, index) in which every epoch is a new shuffle.

    Rank r of R takes every R-th entry from r on, so that R processes with batch size b see, step by step, the images
    of one process with batch size R * b. Nothing is padded or dropped at the end of an epoch. ``start`` entries of the
    whole sequence are skipped, so that a run resumes in the middle of an epoch.

    >>> one, two = (InfiniteSampler(size=3, seed=0, rank=rank, world_size=2) for rank in (0, 1))
    >>> [epoch for epoch, index in itertools.islice(one, 4)], [epoch for epoch, index in itertools.islice(two, 4)]
    ([0, 0, 1, 2], [0, 1, 1, 2])
    """

    def __init__(self, size: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0):
        self.size = size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        shuffled = None
        for position in itertools.count(self.start + self.rank, self.world_size):
            epoch, place = divmod(position, self.size)
            if epoch != shuffled:
                order = list(range(self.size))
                random.Random(f"{self.seed} {epoch}").shuffle(order)
                shuffled = epoch
            yield epoch, order[place]
