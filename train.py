"""Train OCRNet.

    python train.py --demo                          a small model on generated data, minutes on two CPU cores
    python train.py                                 the recipe in one process
    torchrun --nproc_per_node 4 train.py            the recipe: 4 devices, 2 images each, 40,000 iterations
    torchrun --nproc_per_node 4 train.py --resume   continue a stopped run

Writes log.jsonl, last.pt, best.pt, curve.png, samples.png and scores.png to --output-dir. SIGTERM and Ctrl-C save
last.pt and exit.
"""

import math
import random
import signal
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ocrnet.checkpoint import restore_model
from ocrnet.data.classes import CITYSCAPES, CLASS_WEIGHTS, ClassTable, balanced_weights, read_classes
from ocrnet.data.datasets import Data, EvalDataset, InfiniteSampler, TrainDataset
from ocrnet.data.layout import find_samples
from ocrnet.data.synthetic import write_dataset
from ocrnet.data.train_ids import check_samples, write_missing_train_ids
from ocrnet.data.transforms import preprocess
from ocrnet.device import AMP_DTYPES, DEVICES, Accelerator
from ocrnet.errors import InputError
from ocrnet.evaluation import baseline_of, evaluate, without_nan
from ocrnet.hub import find_weights
from ocrnet.losses import OHEM, ocr_loss
from ocrnet.metrics import sum_over_processes
from ocrnet.models import BACKBONES, HEAD_INITS, HEADS, build_model, load_weights, reset_parameters
from ocrnet.progress import Progress
from ocrnet.run import RunFolder, RunState, check_resumable, draw_run, load_last, run_settings
from ocrnet.schedule import poly_lr
from ocrnet.script import make_parser, run_script
from ocrnet.signals import StopSignal, ignore_signals_in_worker

DEMO = dict(
    data_path=Path("data/synthetic"), output_dir=Path("runs/demo"), model="hr18t", crop_size=[96, 192], workers=1,
    scale_range=[1.0, 1.0], color_jitter=False, batch_size=4, max_iters=1000, lr=0.2, weight_decay=2e-3, val_every=500,
    save_every=500, log_every=25,
)  # fmt: skip


# fmt: off
def parse_args() -> Namespace:
    parser = make_parser(__doc__, usage="train.py [options]")
    group = parser.add_argument_group("model and data")
    group.add_argument("--demo", action="store_true", help="generated data and short settings, which flags override")
    group.add_argument("--data-path", type=Path, default=Path("data/cityscapes"), metavar="DIR", help="data set")
    group.add_argument("--output-dir", type=Path, metavar="DIR", help="default: runs/MODEL, or runs/MODEL-fcn")
    group.add_argument("--model", choices=BACKBONES, default="hr18", help="backbone")
    group.add_argument("--head", choices=HEADS, default="ocr", help="fcn is a plain classifier")
    group.add_argument("--weights", metavar="FILE", help="initial weights: a file, imagenet, or a name of hub.py")
    group.add_argument("--resume", action="store_true", help="continue from last.pt in --output-dir, if it exists")
    group.add_argument("--dry-run", action="store_true", help="print what would be trained and exit")
    group = parser.add_argument_group("recipe")
    group.add_argument("--max-iters", type=int, default=40_000, metavar="N", help="optimizer steps")
    group.add_argument("--batch-size", type=int, default=2, metavar="N", help="images per process")
    group.add_argument("--accum-steps", type=int, default=1, metavar="N", help="batches per optimizer step")
    group.add_argument("--lr", type=float, default=0.01, metavar="X", help="learning rate for a global batch of 8")
    group.add_argument("--min-lr", type=float, default=1e-4, metavar="X", help="learning rate at the end")
    group.add_argument("--momentum", type=float, default=0.9, metavar="X", help="of SGD")
    group.add_argument("--weight-decay", type=float, default=5e-4, metavar="X", help="of SGD")
    group.add_argument("--crop-size", type=int, nargs=2, default=[512, 1024], metavar=("H", "W"), help="pixels")
    group.add_argument("--scale-range", type=float, nargs=2, default=[0.5, 2.0], metavar=("MIN", "MAX"), help="sizes")
    group.add_argument("--scale-step", type=float, default=0, metavar="X", help="MIN, MIN + X, ...; 0: any scale")
    group.add_argument("--cat-max-ratio", type=float, default=0.75, metavar="R", help="of a class in a crop; 1: any")
    group.add_argument("--color-jitter", action=BooleanOptionalAction, default=True, help="photometric distortion")
    group.add_argument("--class-weights", nargs="?", const="authors", choices=["authors", "auto"], help="in the loss")
    group.add_argument("--avg-non-ignore", action="store_true", help="divide the loss by the pixels not ignored")
    group.add_argument("--ohem", choices=OHEM, help="only hard pixels in the final loss, chosen as there")
    group.add_argument("--head-init", choices=HEAD_INITS, default="mmsegmentation", help="authors: PyTorch's default")
    group.add_argument("--dropout", type=float, metavar="P", help="before the classifier; default: HRNet 0, ResNet 0.1")
    group.add_argument("--align-corners", action="store_true", help="resize feature maps as the authors do")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, order, crops and dropout")
    group = parser.add_argument_group("device")
    group.add_argument("--device", choices=DEVICES, help="default: the first that is available")
    group.add_argument("--amp", action=BooleanOptionalAction, help="mixed precision; default: not on CPUs without bf16")
    group.add_argument("--amp-dtype", choices=AMP_DTYPES, help="default: fp16; bf16 on CPUs and newer CUDA cards")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--workers", type=int, default=4, metavar="N", help="data loader workers per process")
    group.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds to wait for another process")
    group = parser.add_argument_group("intervals, in iterations")
    group.add_argument("--val-every", type=int, default=4000, metavar="N", help="validation")
    group.add_argument("--save-every", type=int, default=4000, metavar="N", help="last.pt")
    group.add_argument("--log-every", type=int, default=50, metavar="N", help="a line of log.jsonl")

    if parser.parse_known_args()[0].demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args()
    for name in ("max_iters", "batch_size", "accum_steps", "val_every", "save_every", "log_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected 1 or more, found {getattr(args, name)}")
    if not 0 < args.scale_range[0] <= args.scale_range[1]:
        parser.error(f"--scale-range: expected 0 < MIN <= MAX, found {args.scale_range[0]} {args.scale_range[1]}")
    if args.scale_step < 0:
        parser.error(f"--scale-step: expected 0 or more, found {args.scale_step}")
    if not 0 < args.cat_max_ratio <= 1:
        parser.error(f"--cat-max-ratio: expected more than 0, at most 1, found {args.cat_max_ratio}")
    if min(args.crop_size) < 32:
        parser.error(f"--crop-size: expected 32 or more, found {args.crop_size[0]} {args.crop_size[1]}")
    args.output_dir = args.output_dir or Path("runs") / (args.model + ("" if args.head == "ocr" else "-" + args.head))
    return args
# fmt: on


def build_data(args: Namespace, accelerator: Accelerator) -> Data:
    """Find and check the data set. With --demo it is generated first."""
    if args.demo and accelerator.is_main:
        write_dataset(args.data_path)
        write_missing_train_ids(args.data_path)
    accelerator.barrier()
    table = read_classes(args.data_path)
    if args.class_weights == "authors" and table.names != CITYSCAPES.names:
        raise InputError(f"--class-weights: expected auto, or Cityscapes' classes, found others in {args.data_path}")
    train, val = find_samples(args.data_path, "train"), find_samples(args.data_path, "val")
    shard = (train + val)[accelerator.rank :: accelerator.world_size]
    counts = check_samples(shard, len(table), quiet=not accelerator.is_main)
    accelerator.barrier()
    of_train = len(train[accelerator.rank :: accelerator.world_size])  # these come first in the shard
    class_weights = build_class_weights(args, table, counts[:of_train], accelerator)
    train_set = TrainDataset(
        train, args.crop_size, args.seed, args.scale_range, args.color_jitter, args.cat_max_ratio, args.scale_step
    )
    return Data(table, train_set, EvalDataset(val), class_weights)


def build_class_weights(
    args: Namespace, table: ClassTable, counts: np.ndarray, accelerator: Accelerator
) -> Tensor | None:
    """The weights in the loss, (K,) on the device. None without --class-weights.

    Args:
        counts: pixels per class, the ignored ones last, of this rank's training images, (N, K + 1).
    """
    if args.class_weights is None:
        return None
    weights = CLASS_WEIGHTS
    if args.class_weights == "auto":
        pixels = torch.from_numpy(counts.reshape(-1, len(table) + 1)[:, :-1].astype(np.int64)).sum(0)  # also for N = 0
        weights = balanced_weights(sum_over_processes(pixels, accelerator.device).tolist())
    return torch.tensor(weights, device=accelerator.device)


def build_state(args: Namespace, num_classes: int, checkpoint: dict | None, accelerator: Accelerator) -> RunState:
    """Model, optimizer and scaler: new, or as in the checkpoint."""
    torch.manual_seed(args.seed)
    if checkpoint:
        model = restore_model(checkpoint, args.output_dir / "last.pt")
    else:
        model = build_model(args.model, num_classes, args.align_corners, args.dropout, head=args.head)
        if args.head_init == "authors":
            reset_parameters(model.head)
        if args.weights:
            path = find_weights(args.weights, accelerator, args.model)
            accelerator.print0(f"{path}: {load_weights(model, path)}")
    model = accelerator.convert_sync_bn(model).to(accelerator.device, memory_format=accelerator.memory_format)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    state = RunState(model, optimizer, accelerator.grad_scaler())
    if checkpoint:
        state.load_progress(checkpoint)
    return state


def describe(args: Namespace, state: RunState, data: Data, batch: int, accelerator: Accelerator) -> None:
    """Print what is trained, on what, and how. ``batch`` is the global batch."""
    print0, (h, w) = accelerator.print0, args.crop_size
    parameters = sum(p.numel() for p in state.model.parameters())
    precision = f"autocast {accelerator.amp_dtype}" if accelerator.amp else "fp32"
    print0(f"{args.model}, head {args.head}: {parameters:,} parameters, on {accelerator}, {precision}")
    print0(
        f"{args.data_path}: {len(data.train)} training and {len(data.val)} validation images, {len(data.table)} classes"
    )
    iterations = f"{args.max_iters:,} iterations" + (f" after {state.iteration:,}" if state.iteration else "")
    print0(f"{iterations} of {batch} crops of {h}x{w}, lr {args.lr}, seed {args.seed}; output in {args.output_dir}")
    if batch != 8 and not args.demo:
        print0(f"NOTE: --lr 0.01 of the recipe is for a global batch of 8, found {batch}")
    if not (args.weights or args.demo or state.iteration):
        print0("WARNING: training from RANDOM weights; published scores start from an ImageNet HRNet: --weights FILE")


def to_device(batch: Sequence[Tensor], accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """A batch of ``TrainDataset`` -> normalized images (B, 3, H, W) and labels int64 (B, H, W) on the device."""
    image, label, photometric = (x.to(accelerator.device, non_blocking=True) for x in batch)
    return preprocess(image, photometric).contiguous(memory_format=accelerator.memory_format), label.long()


def train_step(
    args: Namespace, state: RunState, model: nn.Module, data: Data, batches: Iterator, accelerator: Accelerator
) -> tuple[Tensor, float]:
    """One optimizer step over ``accum_steps`` batches.

    Returns:
        (loss, final loss, auxiliary loss), the mean of the batches, (3,) on the device; and seconds waited for data.
    """
    losses, waited = torch.zeros(3, device=accelerator.device), 0.0
    for micro_step in range(args.accum_steps):
        since = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - since
        image, label = to_device(batch, accelerator)  # (B, 3, H, W), (B, H, W)
        model.require_backward_grad_sync = micro_step == args.accum_steps - 1  # DDP: average gradients once per step
        with accelerator.autocast():
            outputs = model(image)  # logits, region_logits, (B, K, H, W) each
        loss, parts = ocr_loss(outputs, label, data.class_weights, args.ohem, args.avg_non_ignore)
        del outputs  # the largest tensors; the backward pass does not need them
        state.scaler.scale(loss / args.accum_steps).backward()
        losses += torch.cat([loss.detach()[None], parts]) / args.accum_steps
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return losses, waited


def validate(args: Namespace, state: RunState, data: Data, accelerator: Accelerator, folder: RunFolder) -> None:
    """Evaluate on val, log loss and scores, and write best.pt (if mIoU is the highest so far) and last.pt."""
    losses = torch.zeros(3, dtype=torch.float64)  # loss, final loss, auxiliary loss: sums over this process's images

    def add_loss(outputs: Sequence[Tensor], label: Tensor) -> None:
        loss, parts = ocr_loss(outputs, label, data.class_weights, args.ohem, args.avg_non_ignore)
        losses.add_(torch.cat([loss[None], parts]).cpu())

    since = time.perf_counter()
    confusion = evaluate(state.model, data.val, len(data.table), accelerator, None, args.workers, observe=add_loss)
    speed = len(data.val) / (time.perf_counter() - since)
    loss, final, aux = (sum_over_processes(losses, accelerator.device) / len(data.val)).tolist()
    miou, state.confusion, state.validated = confusion.mean_iou(), confusion, state.iteration
    if miou > state.best_miou:
        state.best_miou = miou
        folder.save("best.pt", state.state_dict())
    iou, miou_or_none = without_nan(data.table.names, confusion.iou()), None if math.isnan(miou) else miou
    folder.log({
        "split": "val", "iter": state.iteration, "mIoU": miou_or_none, "loss": loss, "loss_final": final,
        "loss_aux": aux, "images_per_s": speed, "IoU": iou,
    })  # fmt: skip
    folder.save("last.pt", state.state_dict())
    accuracy = confusion.pixel_accuracy()
    accelerator.print0(
        f"iter {state.iteration}: mIoU {miou:.2%}, pixel accuracy {accuracy:.2%}, loss {loss:.4f}, {speed:.1f} images/s"
    )


def train(
    args: Namespace, state: RunState, data: Data, accelerator: Accelerator, folder: RunFolder
) -> signal.Signals | None:
    """Train until --max-iters or a stop signal, which is returned."""
    model = accelerator.wrap_ddp(accelerator.compile(state.model) if args.compile else state.model)
    global_batch = args.batch_size * args.accum_steps * accelerator.world_size
    start = state.iteration * global_batch  # images seen
    sampler = InfiniteSampler(len(data.train), args.seed, accelerator.rank, accelerator.world_size, start)
    pin_memory = accelerator.device.type != "cpu"
    batches = iter(DataLoader(
        data.train, args.batch_size, sampler=sampler, num_workers=args.workers, pin_memory=pin_memory,
        worker_init_fn=ignore_signals_in_worker,
    ))  # fmt: skip
    progress = Progress(accelerator, state.iteration, args.max_iters, global_batch)
    stop, stopped = StopSignal(), None
    state.model.train()

    def due(every: int) -> bool:
        return state.iteration % every == 0 or state.iteration == args.max_iters

    if due(args.val_every) and state.iteration > state.validated:  # the run was stopped before this validation
        validate(args, state, data, accelerator, folder)
    while state.iteration < args.max_iters and not stopped:
        # all ranks stop together; the sum is read after the step, as reading waits for the device
        stop_requested = accelerator.sum(stop.requested(accelerator.is_orphan()).to(accelerator.device))
        # dropout depends on seed, iteration and rank only, so checkpoints need no generator state
        torch.manual_seed(random.Random(f"{args.seed} {state.iteration + 1} {accelerator.rank}").getrandbits(63))
        lr = poly_lr(args.lr, state.iteration, args.max_iters, args.min_lr)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        losses, waited = train_step(args, state, model, data, batches, accelerator)
        progress.update(losses, waited)
        state.iteration += 1

        if stop_requested.item() > 0:
            stopped = stop.received or signal.SIGTERM
        saving = due(args.save_every) or due(args.val_every) or stopped
        if saving or due(args.log_every):
            entry = progress.entry(state.iteration, lr)
            if not math.isfinite(entry["loss"]):  # before anything is saved
                raise InputError(f"--lr {args.lr}: the loss is {entry['loss']}: try a lower one, or --no-amp")
            folder.log(entry)
        if saving:
            folder.save("last.pt", state.state_dict())
            if due(args.val_every) and not stopped:
                validate(args, state, data, accelerator, folder)
            progress.restart()  # the reported speed is that of training
    progress.close()
    return stopped


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(args.device, args.amp, args.amp_dtype, args.timeout)
    print0 = accelerator.print0
    checkpoint = load_last(args.output_dir, args.resume, accelerator)
    data = build_data(args, accelerator)
    settings = run_settings(args, data.table, len(data.train), accelerator)
    if checkpoint:
        for note in check_resumable(checkpoint, settings, args.output_dir / "last.pt"):
            print0(f"NOTE: {note}")
    state = build_state(args, len(data.table), checkpoint, accelerator)
    describe(args, state, data, settings["global_batch"], accelerator)
    if args.dry_run:
        return accelerator.close()
    entries = {"classes": data.table.rows(), "settings": settings}
    folder = RunFolder(args.output_dir, accelerator.is_main, entries, state.iteration, state.validated)
    stopped = train(args, state, data, accelerator, folder)
    accelerator.barrier()  # the other ranks wait until rank 0 has written everything
    if stopped:
        print0(f"stopped by {stopped.name} after iteration {state.iteration}: continue with --resume")
    elif accelerator.is_main:
        draw_run(args.output_dir, state, data, accelerator)
        if args.demo:
            baseline = baseline_of(data.train.samples, data.val.samples, len(data.table)).mean_iou()
            print0(f"without looking at the image, the most frequent class of each row has mIoU {baseline:.2%}")
        names = ", ".join(sorted(path.name for path in args.output_dir.iterdir()))
        print0(f"best mIoU {state.best_miou:.2%}; wrote {args.output_dir}/: {names}")
    accelerator.close()
    if stopped:
        sys.exit(128 + stopped)  # as shells report signals, so a scheduler can tell a stopped run from a finished one


if __name__ == "__main__":
    run_script(main)
