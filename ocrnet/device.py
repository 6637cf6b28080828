"""--device sdaa|cuda|cpu: everything that depends on the device.

SDAA is Tecorigin's accelerator. ``import torch_sdaa`` adds the device "sdaa" and ``torch.sdaa`` to PyTorch; its process
group backend is "tccl".
"""

import contextlib
import ctypes
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
from tqdm import tqdm

from .errors import InputError
from .sync_bn import convert_sync_bn


class DeviceSpec(NamedTuple):
    backend: str  # of the process group
    amp_dtype: torch.dtype  # of autocast, see also Accelerator.default_amp_dtype
    amp: bool  # default of --amp
    plugin: str | None  # package that adds the device
    sync_bn: bool  # whether torch.nn.SyncBatchNorm supports it
    compiler: str  # backend of torch.compile
    exact_sums: bool  # whether it is known to add int64 and float64 exactly


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products. Without them bf16 is several times slower than fp32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not say
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


# In order of preference.
DEVICES = {
    "sdaa": DeviceSpec("tccl", torch.float16, True, "torch_sdaa", False, "teco_inductor", False),
    "cuda": DeviceSpec("nccl", torch.float16, True, None, True, "inductor", True),
    "cpu": DeviceSpec("gloo", torch.bfloat16, cpu_has_bf16(), None, False, "inductor", True),
}
AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def is_available(name: str) -> bool:
    """Whether a device of ``DEVICES`` can be used here. Imports its plugin."""
    if name == "cpu":
        return True
    plugin = DEVICES[name].plugin
    if plugin and importlib.util.find_spec(plugin):
        importlib.import_module(plugin)
    return hasattr(torch, name) and getattr(torch, name).is_available()


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next tensors, where it would return each to the system.

    The system clears every page it hands out, which takes a quarter of a training step on a CPU or more. Peak memory
    grows by up to a fifth. glibc's own MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ in the environment are left as
    they are. Without glibc this does nothing.
    """
    if os.environ.keys() & {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}:
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no mallopt, no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: blocks up to 1 GiB come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at its top that is kept


def isolated_store(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """The part of ``store`` that belongs to the processes of this start.

    Since torch 2.5 torchrun keeps one store over restarts, with the addresses of dead processes, and
    TORCHELASTIC_RESTART_COUNT differs between hosts (https://github.com/pytorch/pytorch/issues/135712). Here each
    process writes a new name, reads all names and joins that list. A list that all have joined has no dead process.

    Raises:
        dist.DistError: a process did not join within the store's timeout.
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
    raise dist.DistError("not all processes joined")


class Accelerator:
    """The device of this process, and its place among the processes that torchrun started.

    Attributes:
        device: torch.device of this process.
        rank, local_rank, world_size: among all processes, among those of this host, and their number. Without
            torchrun 0, 0 and 1.
        spec: of ``DEVICES``.
        amp, amp_dtype: whether autocast is on, and its type.
        memory_format: of the images and the model in training.

    Args:
        name: of ``DEVICES``. None for the first that is available.
        amp: mixed precision. None for the device's default.
        amp_dtype: "fp16" or "bf16". None for the device's default.
        timeout: seconds to wait for another process.

    Raises:
        InputError: the device is not available, or this host has fewer of them than processes.
    """

    def __init__(
        self, name: str | None = None, amp: bool | None = None, amp_dtype: str | None = None, timeout: float = 600
    ):
        available = [other for other in DEVICES if name in (None, other) and is_available(other)]
        if not available:
            expected = ", ".join(filter(is_available, DEVICES))
            raise InputError(f"--device {name}: expected one of {expected}, or no --device")
        name = available[0]
        self.spec = DEVICES[name]
        self.amp = self.spec.amp if amp is None else amp
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.parent = os.getppid()
        self.local_rank = local_rank = int(os.environ.get("LOCAL_RANK", 0))
        # With AVX2 only, oneDNN's weight gradient is slow in channels_last: a step of hr18 takes 9.0 s instead of 6.6
        # (one 512x1024 crop, fp32, 2 cores of an AMD EPYC, torch 2.14.1).
        slow = name == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
        self.memory_format = torch.contiguous_format if slow else torch.channels_last
        self.module = getattr(torch, name)  # torch.cuda, torch.sdaa, torch.cpu
        if name == "cpu":
            self.device = torch.device("cpu")
            keep_freed_memory()
        else:
            count = self.module.device_count()
            if local_rank >= count:
                raise InputError(f"--device {name}: expected at most {count} processes on this host, one per device")
            self.device = torch.device(name, local_rank)
            self.module.set_device(local_rank)  # before the process group, as tccl requires
        self.amp_dtype = AMP_DTYPES[amp_dtype] if amp_dtype else self.default_amp_dtype()
        if "RANK" in os.environ:  # started by torchrun, also with one process
            limit = timedelta(seconds=timeout)
            store, rank, size = next(rendezvous("env://", timeout=limit))
            store = isolated_store(store, rank, size)
            dist.init_process_group(self.spec.backend, store=store, rank=rank, world_size=size, timeout=limit)

    def default_amp_dtype(self) -> torch.dtype:
        """bf16, which needs no loss scaling, on CUDA cards of compute capability 8.0 or more; else that of ``spec``."""
        has_bf16 = self.device.type == "cuda" and self.module.get_device_capability(self.device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else self.spec.amp_dtype

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def print0(self, text: str) -> None:
        """Print on rank 0, above the progress bar."""
        if self.is_main:
            tqdm.write(text)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, which fp16 needs as small gradients would become 0. Disabled for other types."""
        enabled = self.amp and self.amp_dtype == torch.float16
        if self.spec.plugin:
            return self.module.amp.GradScaler(enabled=enabled)
        return torch.amp.GradScaler(self.device.type, enabled=enabled)

    def compile(self, model: nn.Module) -> nn.Module:
        """The model, compiled by torch.compile. Its parameters are shared."""
        return torch.compile(model, backend=self.spec.compiler)

    @property
    def metric_device(self) -> torch.device:
        """Where pixels are counted: on the device if its int64 and float64 sums are known to be exact, else the CPU."""
        return self.device if self.spec.exact_sums else torch.device("cpu")

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """The model in DistributedDataParallel, under torchrun."""
        if not dist.is_initialized():
            return model
        device_ids = None if self.device.type == "cpu" else [self.device.index]
        return nn.parallel.DistributedDataParallel(model, device_ids=device_ids)

    def convert_sync_bn(self, model: nn.Module) -> nn.Module:
        """The model with synchronized BatchNorm, under torchrun: PyTorch's where the device supports it."""
        if not dist.is_initialized():
            return model
        return nn.SyncBatchNorm.convert_sync_batchnorm(model) if self.spec.sync_bn else convert_sync_bn(model)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sum(torch.zeros(1, device=self.device)).item()  # reading waits for the device

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of ``x`` over all processes, in place. Asynchronous on a device until it is read."""
        if dist.is_initialized():
            dist.all_reduce(x)
        return x

    def broadcast(self, value: object) -> object:
        """Rank 0's value: CPU tensors and plain Python."""
        values = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def is_orphan(self) -> bool:
        """Whether the torchrun that started this process is gone."""
        return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            # Gloo's thread takes the GIL to release the last reduced tensor, while destroy_process_group holds the GIL
            # and waits for that thread. Without the pause torch 2.4 sometimes deadlocks.
            time.sleep(0.2)
            dist.destroy_process_group()

    def __str__(self) -> str:
        name = "" if self.device.type == "cpu" else f" ({self.module.get_device_name(self.device.index)})"
        return f"{self.device.type}{name}, {self.world_size} process{'es' if self.world_size > 1 else ''}"
