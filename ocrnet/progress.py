"""The progress of training: mean losses and speed between log entries, as a bar on terminals, otherwise as lines."""

import time
from datetime import timedelta

import torch
from torch import Tensor
from tqdm import tqdm

from .device import Accelerator


class Progress:
    """Accumulates what a log entry reports.

    Args:
        start, max_iters: iterations done and in all.
        global_batch: images per iteration, over all processes.
    """

    def __init__(self, accelerator: Accelerator, start: int, max_iters: int, global_batch: int):
        self.accelerator, self.max_iters, self.global_batch = accelerator, max_iters, global_batch
        hidden = None if accelerator.is_main else True  # None: shown on terminals
        self.bar = tqdm(total=max_iters, initial=start, unit="it", smoothing=0.05, disable=hidden)
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self.losses, self.steps, self.waited = torch.zeros(3, device=self.accelerator.device), 0, 0.0
        self.since = time.perf_counter()

    def update(self, losses: Tensor, waited: float) -> None:
        """Count an iteration: its losses (3,), which are not read before ``entry``, and seconds waited for data."""
        self.losses += losses
        self.steps += 1
        self.waited += waited
        self.bar.update()

    def entry(self, iteration: int, lr: float) -> dict:
        """The log entry of this interval. Prints it and begins a new interval."""
        mean = self.accelerator.sum(self.losses / (self.steps * self.accelerator.world_size))  # over all processes
        loss, final, aux = mean.tolist()
        seconds = time.perf_counter() - self.since
        speed, waiting = self.steps * self.global_batch / seconds, self.waited / seconds
        text = f"loss {loss:.4f}  lr {lr:.2e}  {speed:.1f} images/s  {waiting:.0%} waiting for data"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            left = timedelta(seconds=round((self.max_iters - iteration) * self.global_batch / speed))
            self.accelerator.print0(f"iter {iteration}/{self.max_iters}  {text}  {left} left")
        self.restart()
        return {
            "split": "train", "iter": iteration, "loss": loss, "loss_final": final, "loss_aux": aux, "lr": lr,
            "images_per_s": speed, "waiting_for_data": waiting,
        }  # fmt: skip

    def close(self) -> None:
        self.bar.close()
