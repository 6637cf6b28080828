"""The table of devices, SDAA's line with a small fake of its package."""

import importlib.util
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ocrnet import device
from ocrnet.device import KINDS, Accelerator
from ocrnet.errors import InputError


@pytest.fixture
def sdaa(monkeypatch):
    """A fake torch_sdaa: two cards, and a record of what was called in which order."""
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
    monkeypatch.setattr(device, "meet", lambda store, rank, world_size: store)
    monkeypatch.setattr(device.dist, "init_process_group", lambda backend, **_: calls.append(("group", backend)))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    return calls


def test_sdaa_sets_the_device_before_the_group_and_scales_by_its_own_scaler(sdaa):
    accelerator = Accelerator("sdaa")
    assert sdaa == [("set_device", 1), ("group", "tccl")]
    assert accelerator.kind.amp and accelerator.kind.amp_dtype == torch.float16
    accelerator.grad_scaler(True)
    assert sdaa[-1] == ("GradScaler", True)
    assert (accelerator.rank, accelerator.world_size, accelerator.is_main) == (1, 2, False)


def test_without_a_name_sdaa_is_preferred_where_it_is_there(sdaa):
    assert Accelerator().device.type == "sdaa"


def test_more_processes_than_cards_are_refused(sdaa, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="process 2 of this host has no card: there are 2"):
        Accelerator("sdaa")


@pytest.mark.parametrize("name", ["sdaa", "cuda"])
def test_a_device_that_is_not_there_is_refused_by_name(name, monkeypatch):
    monkeypatch.setattr(device, "is_present", lambda kind: kind == "cpu")
    with pytest.raises(InputError, match=f"--device {name}: not there: expected one of cpu"):
        Accelerator(name)


def test_cpu_is_always_there_in_full_precision_and_without_loss_scaling():
    accelerator = Accelerator("cpu")
    assert KINDS["cpu"].backend == "gloo" and not accelerator.kind.amp
    assert not accelerator.grad_scaler(True).is_enabled()
    with accelerator.autocast(True):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with accelerator.autocast(False):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_one_process_needs_no_group():
    accelerator = Accelerator("cpu")
    model = torch.nn.Linear(1, 1)
    assert accelerator.wrap(model) is model and accelerator.world_size == 1
    assert accelerator.gather(torch.tensor(3.0)).tolist() == [3]
    assert accelerator.any(True) > 0 and not accelerator.any(False)
    assert accelerator.broadcast({"iter": 3}) == {"iter": 3}


def test_processes_started_again_find_nothing_that_dead_ones_left():
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        for attempt in range(3):
            second = pool.submit(device.meet, store, 1, 2)
            time.sleep(0.1)  # it has the name of the dead first process by now
            stores = device.meet(store, 0, 2), second.result()
            assert not any(found.check(["address"]) for found in stores)
            stores[attempt % 2].set("address", "of this attempt")
            assert all(found.get("address") == b"of this attempt" for found in stores)


def test_a_process_that_does_not_come_ends_the_others():
    store = dist.HashStore()
    device.meet(store, 0, 1)
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(dist.DistError):  # the second one's name is there, the second one is not
        store.set("process 1", "dead")
        device.meet(store, 0, 2)
