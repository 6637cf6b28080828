"""Data loaders, and the batches of a training run until it ends or is stopped.

All processes of a run must leave the loop after the same iteration, or the others would wait for those that left.
"""

import contextlib
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import InputError
from .data.datasets import PIXEL_BYTES, InfiniteSampler, TrainDataset
from .device import Accelerator
from .script import STOP_SIGNALS, catch_stop_signals, end_with_parent, last_line, received


def make_loader(
    dataset: Dataset, batch_size: int, sampler: Iterable, accelerator: Accelerator, workers: int, pixels: int
) -> DataLoader:
    """A data loader with at most ``workers`` processes, fewer where shared memory is small.

    A worker makes two batches in advance, and one more is in use. A container often has 64 MiB of shared memory.

    Args:
        pixels: of an image.
    """
    fitting = workers
    with contextlib.suppress(OSError):
        free = shutil.disk_usage("/dev/shm").free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        fitting = min(workers, free // (3 * batch_size * pixels * PIXEL_BYTES))
    if fitting < workers:
        accelerator.print0(f"NOTE: {fitting} data loader workers, as /dev/shm is too small for {workers}")
    return DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=fitting, worker_init_fn=init_worker,
        pin_memory=accelerator.device.type != "cpu",
    )  # fmt: skip


def init_worker(worker_id: int) -> None:
    """``worker_init_fn`` of a DataLoader: leave stop signals to the training process, and end with it."""
    for number in {*STOP_SIGNALS} - {signal.SIGTERM}:  # by which Python ends its workers
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


class Batches:
    """``for batch in Batches(...)``: the batches of this process from iteration ``start`` to ``max_iters``.

    Ends early, in all processes after the same iteration, where one of them got a stop signal or its data loader
    failed. Seeds the generators for each iteration, so that dropout does not depend on the iterations before, and
    measures the time.

    Args:
        dataset: gives the crops.
        batch_size: crops of this process for an optimizer step.
        start: the iterations that are done.

    Attributes:
        stopped: whether it ended early.
    """

    def __init__(
        self, dataset: TrainDataset, batch_size: int, workers: int, accelerator: Accelerator, start: int, max_iters: int
    ):
        self.accelerator, self.seed, self.done, self.max_iters = accelerator, dataset.seed, start, max_iters
        self.global_batch = batch_size * accelerator.world_size
        first = start * self.global_batch
        sampler = InfiniteSampler(len(dataset), dataset.seed, accelerator.rank, accelerator.world_size, first)
        loader = make_loader(dataset, batch_size, sampler, accelerator, workers, math.prod(dataset.crop_size))
        self.loader = iter(loader) if start < max_iters else iter(())
        self.batch, self.failure, self.stopped = next(self.loader, None), None, False
        catch_stop_signals()
        self.bar = tqdm(
            total=max_iters, initial=start, unit="it", smoothing=0.05, disable=None if accelerator.is_main else True
        )
        self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()

    def __iter__(self) -> Iterator[list[Tensor]]:
        while self.done < self.max_iters and not self.stopped:
            self.done, self.steps = self.done + 1, self.steps + 1
            seed = random.Random(f"{self.seed} {self.done} {self.accelerator.rank}").getrandbits(63)
            self.accelerator.manual_seed(seed)
            yield self.batch
            self.bar.update()
            if self.done < self.max_iters:
                asked = time.perf_counter()  # the device is still at work
                try:
                    self.batch = next(self.loader)
                except (RuntimeError, OSError, EOFError, InputError) as error:  # a killed worker, an invalid file
                    self.failure = error
                self.waited += time.perf_counter() - asked
                self.stopping()
        self.bar.close()

    def stopping(self) -> bool:
        """Whether a process got a stop signal or cannot go on. The same in all processes, which must all call it."""
        self.stopped = self.stopped or self.accelerator.any(bool(received or self.failure))
        return self.stopped

    def end(self) -> None:
        """Raise what ended the batches early: InputError for the data loader, SystemExit 128 + number for a signal."""
        if self.failure and not received:
            raise InputError(f"{last_line(self.failure)} (last.pt is saved: --resume continues)")
        if self.stopped:  # so a scheduler can tell a stopped run from a finished one
            sys.exit(128 + (received or [signal.SIGTERM])[0])

    # ---- time and progress ----

    def speed(self) -> dict[str, float]:
        """Images per second, and the share of the time spent waiting for data, since the last call."""
        seconds = time.perf_counter() - self.since
        speed = {"images_per_s": self.steps * self.global_batch / seconds, "waiting_for_data": self.waited / seconds}
        self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()
        return speed

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What happens inside does not count for ``speed``."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def show(self, loss: float, lr: float, images_per_s: float, waiting_for_data: float, **_: float) -> None:
        """Show an entry of the log beside the progress bar, or without a terminal as a line."""
        text = f"loss {loss:.4f}  lr {lr:.2e}  {images_per_s:.1f} images/s  {waiting_for_data:.0%} waiting for data"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            left = timedelta(seconds=round((self.bar.total - self.done) * self.global_batch / images_per_s))
            self.accelerator.print0(f"iter {self.done}/{self.bar.total}  {text}  {left} left")
