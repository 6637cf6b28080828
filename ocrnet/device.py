"""--device sdaa|cuda|cpu: everything that depends on the device.

SDAA is Tecorigin's accelerator. ``import torch_sdaa`` adds the device "sdaa" and ``torch.sdaa`` to PyTorch; its process
group backend is "tccl".
"""

import contextlib
import ctypes
import importlib.util
import os
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from . import InputError
from .cuda_graph import CudaGraph
from .sync_bn import convert_sync_bn


class DeviceSpec(NamedTuple):
    backend: str  # of the process group
    amp_dtype: torch.dtype  # of autocast; bf16 on CUDA cards of compute capability 8.0 or more
    amp: bool  # default of --amp
    compilers: tuple[str, ...]  # backends of torch.compile, the preferred one first


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products. Without them bf16 is several times slower than fp32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not say
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


# In order of preference.
DEVICES = {
    "sdaa": DeviceSpec("tccl", torch.float16, True, ("teco_inductor", "inductor")),
    "cuda": DeviceSpec("nccl", torch.float16, True, ("inductor",)),
    "cpu": DeviceSpec("gloo", torch.bfloat16, cpu_has_bf16(), ("inductor",)),
}
AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TIMEOUT = timedelta(minutes=10)  # of messages between processes


def is_available(name: str) -> bool:
    """Whether a device of ``DEVICES`` can be used here. Imports the package that adds it."""
    if name == "sdaa" and importlib.util.find_spec("torch_sdaa"):
        importlib.import_module("torch_sdaa")
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


def agree_on_prefix(store: dist.Store, rank: int, world_size: int) -> str:
    """A prefix of the store's keys that the processes of this start have in common, and those of no start before.

    After a failure ``torchrun --max-restarts`` starts all processes anew with the old store, in which the addresses of
    the dead ones are left. Each process adds a random token. The tokens of all are the prefix, once every process has
    seen the same ones.
    """
    store.set(f"token {rank}", uuid.uuid4().hex)
    seen, deadline = "", time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        tokens = " ".join(store.get(f"token {other}").decode() for other in range(world_size))
        if store.add(tokens, int(tokens != seen)) == world_size:
            return tokens
        seen = tokens
        time.sleep(0.05)
    raise InputError(f"rank {rank}: expected {world_size} processes, found fewer after {TIMEOUT}")


class Accelerator:
    """The device of this process, and its place among the processes that torchrun started.

    Attributes:
        device: torch.device of this process.
        rank, local_rank, world_size: among all processes, among those of this host, and their number. Without
            torchrun 0, 0 and 1.
        amp, amp_dtype: whether autocast is on, and its type.
        memory_format: of the images and the model in training.

    Args:
        name: of ``DEVICES``. None for the first that is available.
        amp: mixed precision. None for the device's default.
        amp_dtype: "fp16" or "bf16". None for the device's default.

    Raises:
        InputError: the device is not available, or this host has fewer of them than processes.
    """

    def __init__(self, name: str | None = None, amp: bool | None = None, amp_dtype: str | None = None):
        if name and not is_available(name):
            raise InputError(f"--device {name}: expected one of {', '.join(filter(is_available, DEVICES))}")
        name = name or next(filter(is_available, DEVICES))
        self.spec = DEVICES[name]
        self.module = getattr(torch, name)  # torch.sdaa, torch.cuda, torch.cpu
        self.rank, self.local_rank, self.world_size = 0, 0, 1
        if "RANK" in os.environ:  # started by torchrun, also with one process
            self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))  # mpirun and srun may not set it
        if name == "cpu":
            self.device = torch.device("cpu")
            keep_freed_memory()
        else:
            count = self.module.device_count()
            if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > count:
                raise InputError(f"--device {name}: expected at most {count} processes, one for each device")
            self.device = torch.device(name, self.local_rank % count)  # srun may show each process its own device only
            self.module.set_device(self.device.index)  # before the process group, as tccl requires
        if "RANK" in os.environ:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
            store = dist.PrefixStore(agree_on_prefix(store, rank, world_size), store)
            dist.init_process_group(self.spec.backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
            # for small messages of the CPUs, which wait for no device and are exact
            self.host_group = dist.new_group(backend="gloo", timeout=TIMEOUT)

        has_bf16 = name == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0)
        default = torch.bfloat16 if has_bf16 else self.spec.amp_dtype
        self.amp_dtype = AMP_DTYPES[amp_dtype] if amp_dtype else default
        self.amp = self.spec.amp if amp is None else amp
        if not self.amp:
            torch.backends.cudnn.allow_tf32 = False  # by default fp32 convolutions have 10 bits of mantissa on a card
        # With AVX2 only, oneDNN's weight gradient is slow in channels_last: a step of hr18 takes 9.0 s instead of 6.6
        # (one 512x1024 crop, fp32, 2 cores of an AMD EPYC, torch 2.14.1).
        slow = name == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
        self.memory_format = torch.contiguous_format if slow else torch.channels_last

    def __str__(self) -> str:
        cpu = self.device.type == "cpu"
        name_of = getattr(self.module, "get_device_name", str)  # which a backend may lack
        name = f"{torch.get_num_threads()} threads" if cpu else name_of(self.device)
        precision = f"autocast {self.amp_dtype}" if self.amp else "fp32"
        return f"{self.world_size} x {self.device.type} ({name}), {precision}"

    # ---- precision and wrappers ----

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.amp_dtype) if self.amp else contextlib.nullcontext()

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, which fp16 needs as small gradients would become 0. Disabled for other types."""
        enabled = self.amp and self.amp_dtype == torch.float16
        if self.device.type == "sdaa" and hasattr(self.module, "amp"):
            return self.module.amp.GradScaler(enabled=enabled)
        return torch.amp.GradScaler(self.device.type, enabled=enabled)

    def compile(self, model: nn.Module, frozen: bool = False) -> nn.Module:
        """The model, compiled by torch.compile. Its parameters are shared; ``frozen`` on a CPU they are constants.

        Constants get the layout that the CPU likes best, which makes hr18t in bf16 twice as fast as compiled without.
        """
        if frozen and self.device.type == "cpu":
            from torch._inductor import config  # here, because it takes a second

            config.freezing = True
        if self.world_size > 1:
            torch._dynamo.config.optimize_ddp = False  # splitting the graph at DDP's buckets fails on torch 2.4
        known = torch._dynamo.list_backends()
        backend = next((name for name in self.spec.compilers if name in known), self.spec.compilers[-1])
        self.print0(f"torch.compile, backend {backend}")
        return torch.compile(model, backend=backend)

    def graph(self, function: Callable) -> Callable:
        """The function as a CUDA graph; on other devices as it is. See ``CudaGraph`` for what it must not do."""
        return CudaGraph(function, self.device) if self.device.type == "cuda" else function

    def convert_sync_bn(self, model: nn.Module) -> nn.Module:
        """With several processes, the model with synchronized BatchNorm: PyTorch's, for CUDA only, or ours."""
        if self.world_size == 1:
            return model
        cuda = self.device.type == "cuda"
        return nn.SyncBatchNorm.convert_sync_batchnorm(model) if cuda else convert_sync_bn(model)

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """With several processes, the model in DistributedDataParallel."""
        if self.world_size == 1:
            return model
        device_ids = None if self.device.type == "cpu" else [self.device.index]
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
        wrapped.broadcast_buffers = False  # from now on synchronized BatchNorm keeps them equal
        return wrapped

    def manual_seed(self, seed: int) -> None:
        """Seed the CPU's and the device's generator."""
        torch.manual_seed(seed)  # which reaches CUDA, but not each backend that is added to PyTorch
        if self.device.type == "sdaa":
            self.module.manual_seed_all(seed)

    # ---- between processes ----

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def print0(self, text: str) -> None:
        """Print on rank 0, above the progress bar. A closed pipe (``| head``) does not end the run."""
        if self.is_main:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except BrokenPipeError:
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on the CPU. All of them must call it."""
        x = x.cpu().clone()
        if dist.is_initialized():
            dist.all_reduce(x, group=self.host_group)
        return x

    def any(self, value: bool) -> bool:
        """Whether ``value`` is true in any process."""
        return bool(self.sum_over_ranks(torch.tensor([float(value)])))

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)

    def broadcast(self, value: object) -> object:
        """Rank 0's value: CPU tensors and plain Python."""
        values = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            # Gloo's thread takes the GIL to release the last reduced tensor, while destroy_process_group holds the GIL
            # and waits for that thread. Without the pause torch 2.4 sometimes deadlocks.
            time.sleep(0.2)
            dist.destroy_process_group()
