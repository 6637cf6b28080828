"""The device of a process; SDAA with a small fake of its package."""

import ctypes
import importlib.util
import os
import sys
import types

import pytest
import torch
from torch._inductor import config

from ocrnet import InputError, device
from ocrnet.device import Accelerator
from ocrnet.sync_bn import SyncBatchNorm2d


@pytest.fixture
def sdaa(monkeypatch):
    """A fake torch_sdaa with two devices, in rank 1 of 2. Return what is called, in order."""
    calls = []
    module = types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        set_device=lambda index: calls.append(("set_device", index)),
        get_device_name=lambda index: "fake",
        manual_seed_all=lambda seed: calls.append(("seed", seed)),
        amp=types.SimpleNamespace(GradScaler=lambda enabled: calls.append(("GradScaler", enabled))),
    )
    monkeypatch.setitem(sys.modules, "torch_sdaa", types.ModuleType("torch_sdaa"))
    sys.modules["torch_sdaa"].__spec__ = importlib.util.spec_from_loader("torch_sdaa", None)
    monkeypatch.setattr(torch, "sdaa", module, raising=False)
    monkeypatch.setattr(device.torch, "device", lambda *args: types.SimpleNamespace(type=args[0], index=args[-1]))
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(device.dist, name, lambda backend, **_: calls.append(("group", backend)))
    monkeypatch.setattr(device.dist, "rendezvous", lambda *args, **_: iter([(device.dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(device, "agree_on_prefix", lambda *args: "prefix")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    return calls


def test_sdaa_is_preferred_and_sets_its_device_before_the_process_group(sdaa):
    accelerator = Accelerator()
    assert sdaa == [("set_device", 1), ("group", "tccl"), ("group", "gloo")]
    assert (accelerator.rank, accelerator.world_size, accelerator.is_main) == (1, 2, False)
    assert (accelerator.device.type, accelerator.device.index) == ("sdaa", 1)


def test_sdaa_scales_the_loss_with_its_own_scaler(sdaa):
    accelerator = Accelerator("sdaa")
    assert accelerator.amp and accelerator.amp_dtype == torch.float16
    accelerator.grad_scaler()
    assert sdaa[-1] == ("GradScaler", True)
    for flags in (dict(amp=False), dict(amp_dtype="bf16")):
        Accelerator("sdaa", **flags).grad_scaler()
        assert sdaa[-1] == ("GradScaler", False)


@pytest.mark.parametrize("known", [["inductor", "teco_inductor"], ["inductor"]])
def test_sdaa_compiles_with_its_own_backend_where_there_is_one(sdaa, monkeypatch, capsys, known):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, backend: compiled.append((model, backend)))
    monkeypatch.setattr(torch._dynamo, "list_backends", lambda: known)
    accelerator, model = Accelerator("sdaa"), torch.nn.ReLU()
    accelerator.rank = 0
    accelerator.compile(model, frozen=True)
    assert compiled == [(model, known[-1])] and not config.freezing
    assert f" {known[-1]}\n" in capsys.readouterr().out


def test_sdaa_seeds_its_generators_and_needs_no_loss_scaling_of_its_own(sdaa):
    accelerator = Accelerator("sdaa")
    accelerator.manual_seed(5)
    assert sdaa[-1] == ("seed", 5) and torch.initial_seed() == 5
    del torch.sdaa.amp, torch.sdaa.get_device_name
    assert isinstance(accelerator.grad_scaler(), torch.amp.GradScaler)
    with Accelerator("sdaa", amp=False).autocast():  # torch.autocast("sdaa") would need functions of the package
        pass
    assert "sdaa" in str(accelerator)  # without the device's name


def test_weights_are_constants_only_where_a_cpu_evaluates(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, backend: backend)
    monkeypatch.setattr(config, "freezing", False)
    accelerator = Accelerator("cpu")
    assert accelerator.compile(torch.nn.ReLU()) == "inductor" and not config.freezing
    accelerator.compile(torch.nn.ReLU(), frozen=True)
    assert config.freezing


def test_more_processes_than_devices_are_refused(sdaa, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match="--device sdaa"):
        Accelerator("sdaa")
    assert sdaa == []  # before anything is set up


@pytest.mark.parametrize("local_rank, count, index", [(None, 2, 1), ("5", 1, 0), ("1", 2, 1)])
def test_processes_that_torchrun_did_not_start_find_their_device(sdaa, monkeypatch, local_rank, count, index):
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.delenv("LOCAL_RANK")  # mpirun does not set it
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.sdaa, "device_count", lambda: count)  # 1: a scheduler shows each process its own
    assert Accelerator("sdaa").device.index == index and sdaa[0] == ("set_device", index)


@pytest.mark.parametrize("name", ["sdaa", "cuda"])
def test_unavailable_device_is_refused(name, monkeypatch, train_here):
    monkeypatch.setattr(device, "is_available", lambda other: other == "cpu")
    with pytest.raises(InputError, match=f"^--device {name}: .* cpu$"):
        train_here("--device", name)
    assert Accelerator().device.type == "cpu"


@pytest.mark.parametrize("has", ["amx_bf16", "avx512_bf16", "avx512_f", None])
def test_bf16_is_the_default_on_cpus_that_have_it(monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True}, raising=False)
    if has is None:  # older versions of torch do not say
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert device.cpu_has_bf16() is ("bf16" in str(has))


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_cuda_takes_bf16_where_the_card_has_it(monkeypatch, capability):
    dtype = torch.float16 if capability == (7, 5) else torch.bfloat16
    fake = dict(is_available=lambda: True, device_count=lambda: 1, set_device=lambda index: None)
    for name, function in {**fake, "get_device_capability": lambda card: capability}.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(device, "CudaGraph", lambda function, card: (function, card.type))
    accelerator = Accelerator("cuda")
    assert accelerator.amp and accelerator.amp_dtype == dtype and accelerator.memory_format == torch.channels_last
    assert accelerator.spec.backend == "nccl" and accelerator.spec.compilers == ("inductor",)
    assert accelerator.graph(min) == (min, "cuda") and Accelerator("cpu").graph(min) is min
    assert Accelerator("cuda", amp_dtype="fp16").amp_dtype == torch.float16


@pytest.mark.parametrize("capability, channels_last", [("AVX2", False), ("AVX512", True)])
def test_memory_format_is_the_faster_one_of_the_cpu(monkeypatch, capability, channels_last):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert (Accelerator("cpu").memory_format == torch.channels_last) == channels_last


@pytest.mark.parametrize("name", ["UNRELATED", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"])
def test_freed_memory_is_kept_by_glibc_unless_the_user_has_set_its_variables(monkeypatch, name):
    kept = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=lambda *args: kept.append(args)))
    monkeypatch.setenv(name, "131072")
    Accelerator("cpu")
    assert kept == ([(-3, 2**30), (-1, 2**31 - 1)] if name == "UNRELATED" else [])  # M_MMAP_ and M_TRIM_THRESHOLD


@pytest.mark.parametrize("amp", [False, True])
def test_fp32_is_exact_on_a_card_too(monkeypatch, amp):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert ("fp32" in str(Accelerator("cpu", amp=amp))) == (not amp) and torch.backends.cudnn.allow_tf32 == amp


def test_several_processes_wrap_the_model_for_their_device(sdaa, monkeypatch):
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda _, **x: types.SimpleNamespace(**x))
    cpu, sdaa, model = Accelerator("cpu"), Accelerator("sdaa"), torch.nn.Sequential(torch.nn.BatchNorm2d(1))
    assert [x.wrap_ddp(model).device_ids for x in (cpu, sdaa)] == [None, [1]]
    assert "2 x cpu" in str(cpu) and str(sdaa) == "2 x sdaa (fake), autocast torch.float16"
    assert type(sdaa.convert_sync_bn(model)[0]) is SyncBatchNorm2d
    sdaa.device.type = "cuda"
    assert type(sdaa.convert_sync_bn(torch.nn.BatchNorm2d(1))) is torch.nn.SyncBatchNorm


def test_the_package_of_a_device_is_imported(tmp_path, monkeypatch):
    assert importlib.util.find_spec("torch_sdaa") or not device.is_available("sdaa")
    (tmp_path / "torch_sdaa.py").write_text("import torch, types; torch.sdaa.is_available = lambda: True")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch, "sdaa", types.SimpleNamespace(is_available=lambda: False), raising=False)
    monkeypatch.delitem(sys.modules, "torch_sdaa", raising=False)
    assert device.is_available("sdaa")
    monkeypatch.setattr(torch.sdaa, "is_available", lambda: False)
    assert not device.is_available("sdaa")
    sys.modules.pop("torch_sdaa")


@pytest.mark.parametrize("amp_dtype", [None, "bf16", "fp16"])
def test_only_fp16_scales_the_loss(amp_dtype):
    half = torch.float16 if amp_dtype == "fp16" else torch.bfloat16
    for amp, dtype in ((True, half), (False, torch.float32)):
        accelerator = Accelerator("cpu", amp=amp, amp_dtype=amp_dtype)
        with accelerator.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
        assert accelerator.amp == amp and accelerator.grad_scaler().is_enabled() == (dtype == torch.float16)


def test_one_process_needs_no_process_group(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")  # as some clusters set it, but no RANK
    accelerator = Accelerator("cpu")
    model = torch.nn.BatchNorm2d(1)
    assert accelerator.wrap_ddp(model) is model and type(accelerator.convert_sync_bn(model)) is torch.nn.BatchNorm2d
    assert accelerator.is_main and accelerator.world_size == 1
    assert accelerator.sum_over_ranks(torch.tensor([3.0, 4.0])).tolist() == [3, 4]
    assert accelerator.broadcast({"iter": 3}) == {"iter": 3}
    assert accelerator.any(True) and not accelerator.any(False)
    accelerator.barrier()
    accelerator.print0("printed")
    assert capsys.readouterr().out == "printed\n"
    accelerator.close()


def test_a_closed_pipe_does_not_end_a_run(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    pipe = os.fdopen(write, "w")
    monkeypatch.setattr(sys, "stdout", pipe)
    for _ in range(2):
        Accelerator("cpu").print0("nobody reads this")
        assert sys.stdout is not pipe
    with pytest.raises(BrokenPipeError):
        pipe.close()
