"""N processes with batch size b are equivalent to one process with batch size N * b."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT, RUN, entries
from PIL import Image
from torch import nn

from ocrnet.device import Accelerator, agree_on_prefix
from ocrnet.models import build_model
from ocrnet.sync_bn import SyncBatchNorm2d, convert_sync_bn

CASES = [((3, 1), torch.float64), ((2, 2), torch.bfloat16)]


def batches(sizes, dtype):
    """x and dy of each rank, ``sizes`` images with a large mean."""
    torch.manual_seed(0)
    return [((torch.randn(b, 3, 4, 5) * 2 + 300).to(dtype), torch.randn(b, 3, 4, 5).to(dtype)) for b in sizes]


def forward_backward(cls, x, dy):
    """y, dx, the parameters' gradients, the state and then y in evaluation, in fp64, or for bf16 under autocast."""
    bn = cls(3, eps=0.01, momentum=0.3).to(torch.promote_types(x.dtype, torch.float32))
    bn.weight.data.copy_(torch.tensor([0.5, 1, 2]))
    bn.bias.data.copy_(torch.tensor([1, 0, -1]))
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = bn(x)
    y.backward(dy)
    return y.detach(), x.grad, torch.stack([bn.weight.grad, bn.bias.grad]), bn.state_dict(), bn.eval()(x).detach()


def exchange(accelerator, rank):
    """What ranks tell each other: int64 that float64 cannot hold, float64 that float32 cannot hold, objects, flags."""
    accelerator.host_group = None  # the process group was made without torchrun's environment
    floats = torch.tensor([1 + 2.0**-40, torch.nan], dtype=torch.float64)
    sums = [accelerator.sum_over_ranks(x) for x in (torch.tensor([[2**53 + rank]]), floats)]
    flags = [accelerator.any(value) for value in (False, rank == 1, True)]
    return *sums, accelerator.broadcast({"rank": rank}), flags


def run_rank(rank, folder):
    """What a process does: save ``forward_backward`` of its images, and ``exchange``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    of_bn = [forward_backward(SyncBatchNorm2d, *batches(*case)[rank]) for case in CASES]
    messages = exchange(Accelerator("cpu"), rank)
    torch.Tensor.is_cpu = False  # statistics are computed as on other devices
    on_device = forward_backward(SyncBatchNorm2d, *batches(*CASES[0])[rank])
    torch.save([*of_bn, messages, on_device], folder / f"{rank}.pt")
    time.sleep(0.2)  # see Accelerator.close
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """The results of two processes, in pairs: of each case, of ``exchange``, and of the first case as on a device."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(run_rank, (folder,), nprocs=2, start_method="forkserver")
    return list(zip(*(torch.load(folder / f"{rank}.pt") for rank in (0, 1))))


@pytest.mark.parametrize("part", [0, 3], ids=["cpu", "as on a device"])
def test_sync_bn_is_batch_norm_of_the_joined_batch(of_ranks, part):
    x, dy = (torch.cat(tensors) for tensors in zip(*batches(*CASES[0])))
    expected = forward_backward(nn.BatchNorm2d, x, dy)
    ys, dxs, gradients, states, evaluated = zip(*of_ranks[part])
    found = torch.cat(ys), torch.cat(dxs), sum(gradients), states[0], torch.cat(evaluated)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)  # so that ranks never differ


def test_sync_bn_under_autocast_keeps_its_statistics_in_fp32(of_ranks):
    x, dy = (torch.cat(tensors) for tensors in zip(*batches(*CASES[1])))
    y, dx, _, state, _ = forward_backward(nn.BatchNorm2d, x, dy)
    ys, dxs, _, states, _ = zip(*of_ranks[1])
    assert ys[0].dtype == torch.bfloat16 and states[0]["running_mean"].dtype == torch.float32
    torch.testing.assert_close(torch.cat(ys), y)
    torch.testing.assert_close(torch.cat(dxs), dx, rtol=0.02, atol=0.02)
    torch.testing.assert_close(states, (state, state))


def test_conversion_keeps_weights_names_and_results():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model(torch.randn(2, 3, 8, 8))  # so that the running statistics are not those of a new layer
    x = torch.randn(2, 3, 8, 8)
    before, expected = {name: value.clone() for name, value in model.state_dict().items()}, model.eval()(x)
    assert convert_sync_bn(model) is model and type(model[1]) is SyncBatchNorm2d
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())
    assert torch.equal(model(x), expected)
    assert torch.equal(model.train()(x), nn.BatchNorm2d(4)(model[0](x)))  # without a process group: BatchNorm


def test_processes_sum_exactly_and_agree(of_ranks):
    for integers, floats, of_rank_0, flags in of_ranks[2]:
        assert integers.tolist() == [[2**54 + 1]]
        assert floats[0] == 2 + 2.0**-39 and floats[1].isnan()
        assert of_rank_0 == {"rank": 0} and flags == [False, True, True]


def test_processes_that_start_again_share_new_keys_in_the_old_store():
    store = dist.HashStore()

    def start():
        def one(rank):
            time.sleep(0.2 * (rank == 0))  # the others find what rank 0 has left at the start before
            return agree_on_prefix(store, rank, 3)

        with ThreadPoolExecutor(3) as pool:
            return {*pool.map(one, range(3))}

    [first] = start()
    store.set("token 1", "left by a process that died before the others came")
    [second] = start()
    assert first != second


def test_a_killed_process_is_restarted_once(tmp_path):
    code = (
        "import os, signal; from ocrnet.device import Accelerator; accelerator = Accelerator('cpu')\n"
        "accelerator.barrier()\n"
        "if accelerator.rank == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "total = accelerator.sum_over_ranks(__import__('torch').ones(1))\n"
        "open(f'{accelerator.rank}', 'w').write(str(total.item())); accelerator.close()"
    )
    (tmp_path / "worker.py").write_text(code)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    launcher = ["torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1", f"--master-port={port}", "worker.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *launcher], cwd=tmp_path, env=environment, check=True, timeout=120)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2.0", "2.0"]


def test_accumulated_batches_are_equivalent_to_one_with_the_same_statistics(script, data, tmp_path):
    # Two images that are symmetric: any two crops in a row are these two, so each batch has the same statistics. With
    # seed 3 each process gets one of them twice.
    for folder, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        for split in ("train", "val"):
            for i, source in enumerate(sorted(data.glob(f"{folder}/{split}/*/*_{ending}.png"))[:2]):
                half = np.asarray(Image.open(source))[:64, :64]
                target = tmp_path / folder / split / "a" / f"a_{i}_0_{ending}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1)).save(target)
    flags = [*RUN, "--model", "hr18t", "--crop-size", 64, 128, "--scale-range", 1, 1, "--no-color-jitter"]
    flags += ["--max-iters", 1, "--seed", 3, "--data-path", tmp_path]
    script("train.py", *flags, "--batch-size", 4, "--output-dir", tmp_path / "large")
    accumulated = ["--batch-size", 1, "--accum-steps", 2, "--output-dir", tmp_path / "small"]
    script("train.py", *flags, *accumulated, processes=2)
    torch.manual_seed(3)
    start = build_model("hr18t").state_dict()
    steps, losses = [], []
    for name in ("large", "small"):
        state = torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
        steps.append(torch.cat([(state[key] - x).flatten() for key, x in start.items() if key.endswith("weight")]))
        losses.append(entries(tmp_path / name / "log.jsonl")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # the gradient of this network at random weights is accurate to about one percent in fp32
    assert (steps[0] - steps[1]).norm() < 0.05 * steps[0].norm()
