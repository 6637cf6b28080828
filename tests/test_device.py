"""The device of a process; SDAA with a small fake of its package."""

import importlib.util
import os
import platform
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

from ocrnet import device
from ocrnet.device import DEVICES, Accelerator, isolated_store
from ocrnet.errors import InputError


@pytest.fixture
def sdaa(monkeypatch):
    """A fake torch_sdaa with two devices, in rank 1 of 2. Return what is called, in order."""
    calls = []
    module = types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        set_device=lambda index: calls.append(("set_device", index)),
        get_device_name=lambda index: "fake",
        amp=types.SimpleNamespace(GradScaler=lambda enabled: calls.append(("GradScaler", enabled))),
    )
    monkeypatch.setitem(sys.modules, "torch_sdaa", types.ModuleType("torch_sdaa"))
    sys.modules["torch_sdaa"].__spec__ = importlib.util.spec_from_loader("torch_sdaa", None)
    monkeypatch.setattr(torch, "sdaa", module, raising=False)
    monkeypatch.setattr(device.torch, "device", lambda *args: types.SimpleNamespace(type=args[0], index=args[-1]))
    monkeypatch.setattr(device, "rendezvous", lambda url, timeout: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(device, "isolated_store", lambda store, rank, world_size: store)
    monkeypatch.setattr(device.dist, "init_process_group", lambda backend, **_: calls.append(("group", backend)))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    return calls


def test_sdaa_sets_its_device_before_the_process_group(sdaa):
    accelerator = Accelerator("sdaa")
    assert sdaa == [("set_device", 1), ("group", "tccl")]
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


def test_sdaa_compiles_with_its_own_backend_and_counts_on_the_cpu(sdaa, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, backend: compiled.append((model, backend)))
    accelerator, model = Accelerator("sdaa"), torch.nn.ReLU()
    accelerator.compile(model)
    assert compiled == [(model, "teco_inductor")]
    assert accelerator.metric_device.type == "cpu"


def test_sdaa_is_preferred_where_it_is_available(sdaa):
    assert Accelerator().device.type == "sdaa"


def test_more_processes_than_devices_are_refused(sdaa, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError) as error:
        Accelerator("sdaa")
    assert "--device sdaa" in str(error.value)
    assert sdaa == []  # before anything is set up


@pytest.mark.parametrize("name", ["sdaa", "cuda"])
def test_unavailable_device_is_refused(name, monkeypatch):
    monkeypatch.setattr(device, "is_available", lambda other: other == "cpu")
    with pytest.raises(InputError) as error:
        Accelerator(name)
    assert f"--device {name}" in str(error.value) and "cpu" in str(error.value)
    assert Accelerator().device.type == "cpu"


def dtype_under(accelerator):
    with accelerator.autocast():
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize("has, expected", [(["amx_bf16"], True), (["avx512_bf16"], True), (["avx512_f"], False)])
def test_bf16_is_the_default_on_cpus_that_have_it(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True), raising=False)
    assert device.cpu_has_bf16() is expected


def test_bf16_is_not_the_default_where_torch_does_not_say_what_the_cpu_has(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert device.cpu_has_bf16() is False


@pytest.mark.parametrize(
    "capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_cuda_takes_bf16_where_the_card_has_it(monkeypatch, capability, dtype):
    fake = dict(is_available=lambda: True, device_count=lambda: 1, set_device=lambda index: None)
    for name, function in {**fake, "get_device_capability": lambda card: capability}.items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert Accelerator("cuda").amp_dtype == dtype
    assert Accelerator("cuda", amp_dtype="fp16").amp_dtype == torch.float16


@pytest.mark.parametrize("capability, channels_last", [("AVX2", False), ("AVX512", True)])
def test_memory_format_is_the_faster_one_of_the_cpu(monkeypatch, capability, channels_last):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert (Accelerator("cpu").memory_format == torch.channels_last) == channels_last


def test_freed_memory_is_kept_by_glibc_unless_the_user_has_set_its_variables():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("glibc only")
    code = (
        "import resource, torch; from ocrnet.device import Accelerator; Accelerator('cpu'); torch.ones(10**7)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt; torch.ones(8 * 10**6)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"  # pages that the system cleared
    )
    pages = {}
    for name in ("", "MALLOC_TRIM_THRESHOLD_"):
        command = dict(env={**os.environ, "PYTHONPATH": str(ROOT), name or "NOTHING": "131072"}, check=True)
        pages[name] = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, **command).stdout)
    assert pages[""] < 1000 < pages["MALLOC_TRIM_THRESHOLD_"]  # 3.2e7 bytes are 7,812 pages


def test_cpu_of_the_tests_runs_in_fp32():
    accelerator = Accelerator("cpu")
    assert DEVICES["cpu"].backend == "gloo" and not accelerator.amp
    assert dtype_under(accelerator) == torch.float32 and not accelerator.grad_scaler().is_enabled()


@pytest.mark.parametrize(
    "amp_dtype, dtype, scaled",
    [(None, torch.bfloat16, False), ("bf16", torch.bfloat16, False), ("fp16", torch.half, True)],
)
def test_only_fp16_scales_the_loss(amp_dtype, dtype, scaled):
    accelerator = Accelerator("cpu", amp=True, amp_dtype=amp_dtype)
    assert accelerator.amp and accelerator.amp_dtype == dtype
    assert dtype_under(accelerator) == dtype and accelerator.grad_scaler().is_enabled() == scaled
    off = Accelerator("cpu", amp=False, amp_dtype=amp_dtype)
    assert dtype_under(off) == torch.float32 and not off.grad_scaler().is_enabled()


def test_one_process_needs_no_process_group(capsys):
    accelerator = Accelerator("cpu")
    model = torch.nn.BatchNorm2d(1)
    assert accelerator.wrap_ddp(model) is model and type(accelerator.convert_sync_bn(model)) is torch.nn.BatchNorm2d
    assert accelerator.is_main and accelerator.world_size == 1
    assert accelerator.sum(torch.tensor([3.0, 4.0])).tolist() == [3, 4]
    assert accelerator.broadcast({"iter": 3}) == {"iter": 3}
    accelerator.barrier()
    accelerator.print0("printed")
    assert capsys.readouterr().out == "printed\n"
    accelerator.close()


def test_only_rank_0_prints(sdaa, capsys):
    Accelerator("sdaa").print0("printed")
    assert capsys.readouterr().out == ""


def test_process_without_its_torchrun_is_an_orphan(monkeypatch):
    accelerator = Accelerator("cpu")
    monkeypatch.setattr(device.os, "getppid", lambda: accelerator.parent + 1)
    assert not accelerator.is_orphan()  # started without torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert accelerator.is_orphan()
    monkeypatch.setattr(device.os, "getppid", lambda: accelerator.parent)
    assert not accelerator.is_orphan()


# ---- processes that start again --------------------------------------------------------------------------------------


def test_restarted_processes_find_nothing_of_the_dead_ones():
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        for attempt in range(3):
            second = pool.submit(isolated_store, store, 1, 2)
            time.sleep(0.1)  # so that it reads the name of the dead first process
            stores = isolated_store(store, 0, 2), second.result()
            assert not any(found.check(["address"]) for found in stores)
            stores[attempt % 2].set("address", "of this attempt")
            assert all(found.get("address") == b"of this attempt" for found in stores)


def test_absent_process_ends_the_others():
    store = dist.HashStore()
    isolated_store(store, 0, 1)
    store.set_timeout(timedelta(seconds=0.2))
    store.set("process 1", "dead")  # its name is there, the process is not
    with pytest.raises(dist.DistError):
        isolated_store(store, 0, 2)
