"""N processes of batch b are one process of batch N * b."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from ocrnet.losses import ocr_loss
from ocrnet.models import OCRHead, OCRNet
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


def some_steps(rank, image, label, world_size):
    """Three SGD steps on this rank's share of each batch of four."""
    model = tiny().double()
    if world_size > 1:
        convert_sync_bn(model)
    wrapped = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for x, y in zip(image, label):
        loss, _ = ocr_loss(*wrapped(x[rank::world_size]), y[rank::world_size])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_processes_take_the_steps_of_one_with_the_whole_batch(tmp_path, world_size):
    torch.manual_seed(1)
    image, label = torch.randn(3, 4, 3, 64, 64).double(), torch.randint(0, 3, (3, 4, 64, 64))
    label[0, 1, :32] = 255
    alone = some_steps(0, image, label, 1)
    for rank in in_processes(some_steps, tmp_path, world_size, image, label, world_size):
        for name, value in alone.items():
            torch.testing.assert_close(rank[name], value, rtol=1e-8, atol=1e-10, msg=name)
