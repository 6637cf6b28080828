"""N processes of batch b are one process of batch N * b."""

import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import RUN, entries
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from ocrnet.data.cityscapes import EndlessSampler, RandomCrops, find_samples
from ocrnet.data.transforms import to_input
from ocrnet.losses import ocr_loss
from ocrnet.models import OCRHead, OCRNet, build_model
from ocrnet.models.hrnet import HRNet
from ocrnet.sync_bn import SyncBatchNorm2d, convert_sync_bn


def in_processes(work, folder, count, *args):
    """Run work(rank, *args) in processes with a Gloo group; the results by rank."""
    mp.start_processes(_one, (work, folder, count, args), nprocs=count, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _one(rank, work, folder, count, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{count}", rank=rank, world_size=count)
    torch.save(work(rank, *args), folder / f"{rank}.pt")
    time.sleep(0.2)  # see Accelerator.close
    dist.destroy_process_group()


def batches(dtype, sizes):
    """One batch a rank, of these numbers of images, with a large mean and a gradient for each."""
    torch.manual_seed(0)
    return [(torch.randn(b, 3, 4, 5, dtype=dtype) * 2 + 30, torch.randn(b, 3, 4, 5, dtype=dtype)) for b in sizes]


def layer(kind, dtype):
    bn = kind(3).to(dtype)
    bn.weight.data = torch.tensor([0.5, 1, 2], dtype=dtype)
    bn.bias.data = torch.tensor([1, 0, -1], dtype=dtype)
    return bn


def forward_backward(rank, x, dy):
    bn = layer(SyncBatchNorm2d, x[rank].dtype)
    input = x[rank].requires_grad_()
    y = bn(input)
    y.backward(dy[rank])
    return y.detach(), input.grad, bn.weight.grad, bn.bias.grad, bn.state_dict()


@pytest.mark.parametrize("sizes", [(2, 2), (1, 1), (3, 1)])
def test_sync_bn_is_batch_norm_of_the_joined_batch(tmp_path, sizes):
    x, dy = zip(*batches(torch.float64, sizes))
    bn = layer(nn.BatchNorm2d, torch.float64)
    joined = torch.cat(x).requires_grad_()
    y = bn(joined)
    y.backward(torch.cat(dy))
    ranks = in_processes(forward_backward, tmp_path, 2, x, dy)
    torch.testing.assert_close(torch.cat([r[0] for r in ranks]), y.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]), joined.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ranks[0][2] + ranks[1][2], bn.weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ranks[0][3] + ranks[1][3], bn.bias.grad, rtol=1e-12, atol=1e-12)
    for rank in ranks:
        for name, value in bn.state_dict().items():
            torch.testing.assert_close(rank[4][name], value, rtol=1e-12, atol=1e-12)


def under_autocast(rank, x, dy):
    bn = layer(SyncBatchNorm2d, torch.float32)
    input = x[rank].bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bn(input)
    y.backward(dy[rank].bfloat16())
    return y.detach(), input.grad, bn.running_mean, bn.running_var


def test_sync_bn_under_autocast_keeps_its_statistics_in_fp32(tmp_path):
    x, dy = zip(*batches(torch.float32, (2, 2)))
    bn = layer(nn.BatchNorm2d, torch.float32)
    joined = torch.cat(x).bfloat16().requires_grad_()
    y = bn(joined)
    y.backward(torch.cat(dy).bfloat16())
    ranks = in_processes(under_autocast, tmp_path, 2, x, dy)
    assert ranks[0][0].dtype == torch.bfloat16 and ranks[0][2].dtype == torch.float32
    torch.testing.assert_close(torch.cat([r[0] for r in ranks]), y.detach())
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]), joined.grad, rtol=0.02, atol=0.02)
    torch.testing.assert_close(ranks[1][2], bn.running_mean)
    torch.testing.assert_close(ranks[1][3], bn.running_var)


def test_conversion_keeps_weights_and_names_and_evaluates_alike():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 8, 8)
    before, expected = model.state_dict(), model.eval()(x)
    convert_sync_bn(model)
    assert type(model[1]) is SyncBatchNorm2d
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(x), expected)
    assert torch.equal(model.train()(x), nn.BatchNorm2d(4)(model[0](x)))  # without a group: plain BatchNorm


def tiny():
    torch.manual_seed(0)
    head = OCRHead(60, 60, 60, num_classes=3, channels=8, key_channels=4)
    return OCRNet(HRNet(width=4, num_modules=(1, 1, 1), num_blocks=1), head)


def some_steps(rank, root, dtype, world_size, batch_size, workers, lr=0.01, steps=3, seed=0):
    """SGD steps on this rank's share of global batches of four random crops, as train.py takes them."""
    model = tiny().to(dtype)
    if world_size > 1:
        convert_sync_bn(model)
    wrapped = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    crops = RandomCrops(find_samples(root, "train"), (64, 96), seed)
    sampler = EndlessSampler(len(crops), seed, rank, world_size)
    batches = iter(DataLoader(crops, batch_size, sampler=sampler, num_workers=workers))
    for _ in range(steps):
        photo, label, colour = next(batches)
        loss, _ = ocr_loss(wrapped(to_input(photo, colour).to(dtype)), label.long().clamp(max=2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize(("world_size", "workers"), [(2, 1), (4, 0)])
def test_several_processes_take_the_steps_of_one_with_the_whole_batch(data, tmp_path, world_size, workers):
    alone = some_steps(0, data, torch.float64, 1, 4, 2)
    sizes = world_size, 4 // world_size, workers
    for rank in in_processes(some_steps, tmp_path, world_size, data, torch.float64, *sizes):
        for name, value in alone.items():
            torch.testing.assert_close(rank[name], value, rtol=1e-10, atol=1e-10, msg=name)


def three_steps_in_fp32(rank, root, *sizes):
    return [some_steps(rank, root, torch.float32, *sizes, steps=1, seed=seed) for seed in range(3)]


def test_in_fp32_they_do_so_up_to_rounding(data, tmp_path):
    # one step each: now and then rounding turns a ReLU, in one process as in two, and later steps part by 3e-4
    alone = three_steps_in_fp32(0, data, 1, 4, 0)
    for one, *two in zip(alone, *in_processes(three_steps_in_fp32, tmp_path, 2, data, 2, 2, 0)):
        assert all(torch.equal(two[0][name], value) for name, value in two[1].items())  # to the bit between them
        weights = [torch.cat([x.flatten() for x in state.values()]) for state in (one, two[0])]
        assert (weights[0] - weights[1]).norm() < 1e-5 * weights[0].norm()


# ---- accumulation ----


def test_accumulated_batches_make_the_step_of_the_large_one_where_their_statistics_are_alike(script, data, tmp_path):
    # two pictures that are their own mirror images: every two crops in a row are these two, and with seed 3 each
    # process has the same one twice
    for folder, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelTrainIds")):
        for split in ("train", "val"):
            for i, source in enumerate(sorted(data.glob(f"{folder}/{split}/*/*_{ending}.png"))[:2]):
                half = np.asarray(Image.open(source))[:64, :64]
                target = tmp_path / folder / split / "a" / f"a_{i}_0_{ending}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1)).save(target)
    flags = [*RUN, "--crop", 64, 128, "--scales", 1, 1, "--no-colour", "--iters", 1, "--data", tmp_path, "--seed", 3]
    script("train.py", *flags, "--batch-size", 4, "--out", tmp_path / "large")
    script("train.py", *flags, "--batch-size", 1, "--accumulate", 2, "--out", tmp_path / "small", processes=2)
    torch.manual_seed(3)
    start = build_model("hr18s").state_dict()
    steps, losses = [], []
    for name in ("large", "small"):
        state = torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
        steps.append(torch.cat([(state[key] - x).flatten() for key, x in start.items() if key.endswith("weight")]))
        losses.append(entries(tmp_path / name / "log.jsonl")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # a gradient in fp32 through this net at random weights is good to about one percent
    assert (steps[0] - steps[1]).norm() < 0.05 * steps[0].norm()
