"""N processes with batch size b are equivalent to one process with batch size N * b."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import RUN, entries
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from ocrnet.data.classes import CITYSCAPES
from ocrnet.data.datasets import InfiniteSampler, TrainDataset, find_samples
from ocrnet.data.transforms import preprocess
from ocrnet.device import Accelerator, agree_on_prefix
from ocrnet.losses import ocr_loss
from ocrnet.models import HRNet, OCRHead, OCRNet, build_model
from ocrnet.sync_bn import SyncBatchNorm2d, convert_sync_bn


def in_processes(work, folder, count, *args):
    """Run work(rank, *args) in processes with a Gloo group. Return the results by rank."""
    mp.start_processes(_one, (work, folder, count, args), nprocs=count, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _one(rank, work, folder, count, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{count}", rank=rank, world_size=count)
    torch.save(work(rank, *args), folder / f"{rank}.pt")
    time.sleep(0.2)  # see Accelerator.close
    dist.destroy_process_group()


# ---- synchronized BatchNorm ------------------------------------------------------------------------------------------

CASES = [((2, 2), torch.float64), ((1, 1), torch.float64), ((3, 1), torch.float64), ((2, 2), torch.bfloat16)]


def batches(sizes, dtype):
    """x and dy of each rank, ``sizes`` images with a large mean."""
    torch.manual_seed(0)
    return [((torch.randn(b, 3, 4, 5) * 2 + 300).to(dtype), torch.randn(b, 3, 4, 5).to(dtype)) for b in sizes]


def forward_backward(cls, x, dy):
    """y, dx, the parameters' gradients and the state of a layer, in fp64, or for bf16 in fp32 under autocast."""
    bn = cls(3).to(torch.promote_types(x.dtype, torch.float32))
    bn.weight.data.copy_(torch.tensor([0.5, 1, 2]))
    bn.bias.data.copy_(torch.tensor([1, 0, -1]))
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = bn(x)
    y.backward(dy)
    return y.detach(), x.grad, torch.stack([bn.weight.grad, bn.bias.grad]), bn.state_dict()


def sync_bn(rank):
    return [forward_backward(SyncBatchNorm2d, *batches(*case)[rank]) for case in CASES]


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """For each case ``forward_backward`` of the two ranks."""
    ranks = in_processes(sync_bn, tmp_path_factory.mktemp("ranks"), 2)
    return dict(zip(CASES, zip(*ranks)))


@pytest.mark.parametrize("case", CASES[:3])
def test_sync_bn_is_batch_norm_of_the_joined_batch(of_ranks, case):
    x, dy = (torch.cat(tensors) for tensors in zip(*batches(*case)))
    y, dx, gradients, state = forward_backward(nn.BatchNorm2d, x, dy)
    ys, dxs, local_gradients, states = zip(*of_ranks[case])
    torch.testing.assert_close(torch.cat(ys), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(dxs), dx, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sum(local_gradients), gradients, rtol=1e-12, atol=1e-12)
    for of_rank in states:
        torch.testing.assert_close(of_rank, state, rtol=1e-12, atol=1e-12)


def test_sync_bn_under_autocast_keeps_its_statistics_in_fp32(of_ranks):
    x, dy = (torch.cat(tensors) for tensors in zip(*batches(*CASES[3])))
    y, dx, _, state = forward_backward(nn.BatchNorm2d, x, dy)
    ys, dxs, _, states = zip(*of_ranks[CASES[3]])
    assert ys[0].dtype == torch.bfloat16 and states[0]["running_mean"].dtype == torch.float32
    torch.testing.assert_close(torch.cat(ys), y)
    torch.testing.assert_close(torch.cat(dxs), dx, rtol=0.02, atol=0.02)
    for of_rank in states:
        torch.testing.assert_close(of_rank, state)


def test_conversion_keeps_weights_names_and_results():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model(torch.randn(2, 3, 8, 8))  # so that the running statistics are not those of a new layer
    x = torch.randn(2, 3, 8, 8)
    before, expected = {name: value.clone() for name, value in model.state_dict().items()}, model.eval()(x)
    convert_sync_bn(model)
    assert type(model[1]) is SyncBatchNorm2d
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())
    assert torch.equal(model(x), expected)
    assert torch.equal(model.train()(x), nn.BatchNorm2d(4)(model[0](x)))  # without a process group: BatchNorm


# ---- starts ----------------------------------------------------------------------------------------------------------


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


# ---- messages --------------------------------------------------------------------------------------------------------


def exchange(rank):
    """What ranks tell each other: int64 that float64 cannot hold, float64 that float32 cannot hold, objects, flags."""
    accelerator = Accelerator("cpu")
    accelerator.host_group = None  # the process group was made without torchrun's environment
    floats = torch.tensor([1 + 2.0**-40, torch.nan], dtype=torch.float64)
    sums = [accelerator.sum(x) for x in (torch.tensor([[2**53 + rank]]), floats)]
    flags = [accelerator.any(value) for value in (False, rank == 1, True)]
    return *sums, accelerator.broadcast({"rank": rank}), flags


def test_processes_sum_exactly_and_agree(tmp_path):
    for integers, floats, of_rank_0, flags in in_processes(exchange, tmp_path, 2):
        assert integers.tolist() == [[2**54 + 1]]
        assert floats[0] == 2 + 2.0**-39 and floats[1].isnan()
        assert of_rank_0 == {"rank": 0} and flags == [False, True, True]


# ---- training --------------------------------------------------------------------------------------------------------


def train_steps(rank, root, world_size, batch_size, workers):
    """Two SGD steps in float64, as in train.py, on this rank's share of global batches of four crops."""
    torch.manual_seed(0)
    head = OCRHead(60, 60, num_classes=3, channels=8, key_channels=4)
    model = OCRNet(HRNet(width=4, num_modules=(1, 1, 1), num_blocks=1), head).double()
    if world_size > 1:
        convert_sync_bn(model)
    wrapped = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    dataset = TrainDataset(find_samples(root, "train"), CITYSCAPES, (64, 96), seed=0)
    sampler = InfiniteSampler(len(dataset), 0, rank, world_size)
    batches = iter(DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers))
    for _ in range(2):
        image, label, photometric = next(batches)
        loss, _ = ocr_loss(wrapped(preprocess(image, photometric).double()), label.long().clamp(max=2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def test_four_processes_are_equivalent_to_one_with_the_global_batch(data, tmp_path):
    alone = train_steps(0, data, 1, 4, 2)
    ranks = in_processes(train_steps, tmp_path, 4, data, 4, 1, 0)
    for rank in ranks:
        for name, value in alone.items():
            assert torch.equal(rank[name], ranks[0][name]), name
            torch.testing.assert_close(rank[name], value, rtol=1e-10, atol=1e-10, msg=name)


# ---- gradient accumulation -------------------------------------------------------------------------------------------


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
