"""--device sdaa|cuda|cpu: everything that differs between them, in one table.

SDAA is Tecorigin's accelerator: ``import torch_sdaa`` adds the device "sdaa" and ``torch.sdaa`` to PyTorch, and its
process-group backend is "tccl". Nothing outside this file asks which device it is.
"""

import importlib.util
import os
import time
import uuid
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from .errors import InputError
from .sync_bn import convert_sync_bn


class Kind(NamedTuple):
    backend: str  # of the process group
    amp_dtype: torch.dtype  # of autocast
    amp: bool  # whether mixed precision is on unless told otherwise
    plugin: str | None  # the package that brings the device
    sync_bn: bool  # whether torch.nn.SyncBatchNorm works there


# In order of preference. On a CPU mixed precision is off: without bf16 instructions it is several times slower.
KINDS = {
    "sdaa": Kind("tccl", torch.float16, True, "torch_sdaa", False),
    "cuda": Kind("nccl", torch.float16, True, None, True),
    "cpu": Kind("gloo", torch.bfloat16, False, None, False),
}


def is_present(name: str) -> bool:
    """Whether a device of this kind can be used here. Imports its plugin, which is what makes it known to PyTorch."""
    if name == "cpu":
        return True
    plugin = KINDS[name].plugin
    if plugin and importlib.util.find_spec(plugin):
        importlib.import_module(plugin)
    return hasattr(torch, name) and getattr(torch, name).is_available()


def meet(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """A part of the store that belongs to the processes running now, whatever earlier ones left in the store.

    Since torch 2.5 torchrun keeps one store for all its restarts. A process started again finds there the address of
    one that is dead, now and then before the new address, and waits for it in vain. So every process writes down a name
    of its own, reads everybody's, and joins that list of names. A list that all have joined holds nobody dead: whoever
    joins it has just found its own new name there.

    Raises:
        dist.DistError: not all came within the store's timeout.
    """
    end = time.monotonic() + store.timeout.total_seconds()
    store.set(f"process {rank}", uuid.uuid4().hex)
    joined = None
    while time.monotonic() < end:
        names = " ".join(store.get(f"process {r}").decode() for r in range(world_size))
        if store.add(names, int(names != joined)) == world_size:
            return dist.PrefixStore(names, store)
        joined = names
        time.sleep(0.02)
    raise dist.DistError("not all processes came to the start")


class Accelerator:
    """This process's device and its place among the processes that torchrun started.

    Attributes:
        device: torch.device of this process.
        rank, world_size: 0 and 1 without torchrun.
        kind: its line of ``KINDS``.

    Args:
        name: of ``KINDS``; None for the first that is there.
        timeout: seconds that a process waits for another one before it gives up.

    Raises:
        InputError: the device was asked for and is not there, or there are fewer of it than processes on this host.
    """

    def __init__(self, name: str | None = None, timeout: float = 600):
        if name is None:
            name = next(kind for kind in KINDS if is_present(kind))
        elif not is_present(name):
            present = ", ".join(kind for kind in KINDS if is_present(kind))
            raise InputError(f"--device {name}: not there: expected one of {present}, or leave --device out")
        self.kind = KINDS[name]
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.parent = os.getppid()
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.module = getattr(torch, name)  # torch.cuda, torch.sdaa, torch.cpu
        if name == "cpu":
            self.device = torch.device("cpu")
        else:
            count = self.module.device_count()
            if local_rank >= count:
                raise InputError(
                    f"--device {name}: process {local_rank} of this host has no card: there are {count}: start as many"
                )
            self.device = torch.device(name, local_rank)
            self.module.set_device(local_rank)  # before the process group: tccl refuses otherwise
        if "RANK" in os.environ:  # under torchrun, be it with one process
            limit = timedelta(seconds=timeout)
            store, rank, world_size = next(rendezvous("env://", timeout=limit))
            dist.init_process_group(
                self.kind.backend, store=meet(store, rank, world_size), rank=rank, world_size=world_size, timeout=limit
            )

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @property
    def has_own_memory(self) -> bool:
        """Whether batches are copied to the device, which is faster from pinned memory."""
        return self.device.type != "cpu"

    def autocast(self, enabled: bool) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.kind.amp_dtype, enabled=enabled)

    def grad_scaler(self, enabled: bool) -> torch.amp.GradScaler:
        """Loss scaling for fp16, whose small gradients would vanish; without effect for anything else."""
        enabled = enabled and self.kind.amp_dtype == torch.float16
        if self.kind.plugin:
            return self.module.amp.GradScaler(enabled=enabled)
        return torch.amp.GradScaler(self.device.type, enabled=enabled)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model for the training step: under torchrun one whose gradients are means over all processes."""
        if not dist.is_initialized():
            return model
        device_ids = None if self.device.type == "cpu" else [self.device.index]
        return nn.parallel.DistributedDataParallel(model, device_ids=device_ids)

    def sync_bn(self, model: nn.Module) -> nn.Module:
        """The model with BatchNorm over all processes' images: PyTorch's own where the device has it."""
        if not dist.is_initialized():
            return model
        return nn.SyncBatchNorm.convert_sync_batchnorm(model) if self.kind.sync_bn else convert_sync_bn(model)

    def barrier(self) -> None:
        """Wait for all processes."""
        if dist.is_initialized():
            dist.all_reduce(torch.zeros(1, device=self.device))

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The tensors (...) of all processes, by rank: (R, ...), the same on each."""
        rows = x.new_zeros(self.world_size, *x.shape)
        rows[self.rank] = x
        if dist.is_initialized():
            dist.all_reduce(rows)  # of zeros but for one's own: every process group has all_reduce
        return rows

    def any(self, flag: object) -> torch.Tensor:
        """A tensor above 0 if any process's flag is true. Reading it waits for the card, so read it late."""
        x = torch.full((), float(bool(flag)), device=self.device)
        if dist.is_initialized():
            dist.all_reduce(x)
        return x

    def broadcast(self, value: object) -> object:
        """What the first process has, be it tensors on the CPU or plain Python, on every process."""
        values = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def is_orphan(self) -> bool:
        """Whether torchrun, which started this process, is gone."""
        return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            # Gloo's thread needs the interpreter to let go of the last tensor it summed. Destroying the group holds the
            # interpreter and waits for that thread: without this pause a deadlock, now and then, in torch 2.4.
            time.sleep(0.2)
            dist.destroy_process_group()

    def __str__(self) -> str:
        name = "" if self.device.type == "cpu" else f" ({self.module.get_device_name(self.device.index)})"
        return f"{self.device.type}{name}, {self.world_size} process{'es' if self.world_size > 1 else ''}"
