"""Train OCRNet.

    python train.py --demo                          a small model on generated data, minutes on two CPU cores
    python train.py                                 the recipe in one process
    torchrun --nproc_per_node 4 train.py            the recipe: 4 devices, 2 images each, 40,000 iterations
    torchrun --nproc_per_node 4 train.py --resume   continue a stopped run

Writes log.jsonl, last.pt and best.pt to --output-dir, and with each validation curve.png, samples.png and scores.png.
SIGTERM, Ctrl-C and other stop signals save last.pt after the current iteration and exit with 128 + their number.

Three ideas before the loop. ``net`` is what is saved and validated, ``model`` is ``net`` compiled and wrapped. A crop
depends on (seed, epoch, index) only, and dropout is seeded anew in each iteration, so no generator has a state to save.
A checkpoint is whole or absent.
"""

import json
import math
import os
import random
import signal
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ocrnet import InputError
from ocrnet.checkpoint import check_resumable, load_checkpoint, restore_model, save_checkpoint
from ocrnet.data.classes import balanced_weights, read_classes
from ocrnet.data.datasets import EvalDataset, InfiniteSampler, TrainDataset, count_classes, find_samples, image_size
from ocrnet.data.synthetic import write_dataset
from ocrnet.data.transforms import preprocess
from ocrnet.device import AMP_DTYPES, DEVICES, Accelerator
from ocrnet.evaluation import evaluate, summarize
from ocrnet.inference import make_forward
from ocrnet.logs import trim_log
from ocrnet.losses import ocr_loss, poly_lr
from ocrnet.models import BACKBONES, HEADS, build_model, load_weights
from ocrnet.script import catch_stop_signals, fitting_workers, init_worker, make_parser, number, run_script

RECIPE_LR = 0.01
DEMO = dict(
    data_path=Path("data/synthetic"), output_dir=Path("runs/demo"), model="hr18t", crop_size=[96, 192], workers=1,
    scale_range=[1.0, 1.0], color_jitter=False, batch_size=4, max_iters=1000, lr=0.2, weight_decay=2e-3, val_every=500,
    save_every=500, log_every=25,
)  # fmt: skip


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(args.device, args.amp, args.amp_dtype)
    device, is_main, print0 = accelerator.device, accelerator.is_main, accelerator.print0
    global_batch = args.batch_size * args.accum_steps * accelerator.world_size
    last = args.output_dir / "last.pt"
    found = [name for name in ("last.pt", "best.pt", "log.jsonl") if (args.output_dir / name).exists()]
    if found and not args.resume:
        raise InputError(f"--output-dir {args.output_dir}: holds a run: add --resume, or choose another folder")
    if "best.pt" in found and not last.exists():
        raise InputError(f"--resume: expected {last}, found only best.pt: start from it with --weights")

    # data
    if args.demo and is_main:
        write_dataset(args.data_path)
    accelerator.barrier()
    table = read_classes(args.data_path)
    samples = find_samples(args.data_path, "train")
    train_set = TrainDataset(samples, table, args.crop_size, args.seed, args.scale_range, args.color_jitter)
    val_set = EvalDataset(find_samples(args.data_path, "val"), table)
    size = image_size(samples)
    class_weights = None
    if args.class_weights:
        shard = samples[accelerator.rank :: accelerator.world_size]
        pixels = accelerator.sum(torch.tensor(count_classes(shard, table, show=is_main)))
        class_weights = torch.tensor(balanced_weights(pixels.tolist()), device=device)  # (K,)

    # model and optimizer: new, or those of last.pt
    settings = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "classes": ", ".join(table.names), "train_images": len(train_set), "global_batch": global_batch,
        "device": str(accelerator), "resume": True,  # the same for a run and those that resume it
    }  # fmt: skip
    checkpoint = accelerator.broadcast(load_checkpoint(last) if is_main and last.exists() else None)
    torch.manual_seed(args.seed)
    if checkpoint:
        for note in check_resumable(checkpoint, settings, last):
            print0(f"NOTE: {note}")
        net = restore_model(checkpoint, last)
    else:
        net = build_model(args.model, len(table), head=args.head)
        if args.weights:
            print0(f"{args.weights}: {load_weights(net, args.weights)}")
    net = accelerator.convert_sync_bn(net).to(device, memory_format=accelerator.memory_format)
    # not fused: that kernel reads memory without values after an overflow, and needs momentum in the weights' layout
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    scaler = accelerator.grad_scaler()
    iteration, validated, best = 0, 0, -math.inf
    if checkpoint:
        iteration, validated, best = checkpoint["iter"], checkpoint["validated"], checkpoint["best"]
        # momentum of the checkpoint, settings of the flags
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
        if checkpoint["scaler"]:  # empty where the loss was not scaled
            scaler.load_state_dict(checkpoint["scaler"])
    print0(f"{args.data_path}: {len(train_set)} training and {len(val_set)} validation images, {len(table)} classes")
    describe(args, accelerator, net, size, iteration, global_batch)

    log_path = args.output_dir / "log.jsonl"
    if is_main:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        trim_log(log_path, iteration, validated)

    def log(entry: dict) -> None:
        if is_main:
            with open(log_path, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def save(name: str) -> None:
        if is_main:
            state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            state |= {"config": net.config, "classes": table.rows(), "size": size, "settings": settings}
            save_checkpoint(args.output_dir / name, state | {"iter": iteration, "validated": validated, "best": best})

    def due(every: int) -> bool:
        return iteration % every == 0 or iteration == args.max_iters

    forward = make_forward(net, accelerator)
    criterion = partial(ocr_loss, class_weights=class_weights)
    model = accelerator.wrap_ddp(accelerator.compile(net) if args.compile else net)

    def compute_gradients(*batch: Tensor) -> Tensor:
        """images, labels and photometric parameters of ``TrainDataset`` -> the loss and its parts, (3,)."""
        optimizer.zero_grad()
        losses = torch.zeros(3, device=device)
        for micro_step, micro_batch in enumerate(zip(*(x.split(args.batch_size) for x in batch)), 1):
            image, label = to_device(micro_batch, accelerator)  # (B, 3, H, W), (B, H, W)
            model.require_backward_grad_sync = micro_step == args.accum_steps  # DDP: average gradients once
            with accelerator.autocast():
                outputs = model(image)  # logits, region_logits, (B, K, H, W) each
            loss, parts = criterion(outputs, label)
            del outputs  # the largest tensors; the backward pass does not need them
            scaler.scale(loss / args.accum_steps).backward()
            losses += torch.cat([loss.detach()[None], parts]) / args.accum_steps
        return losses

    if accelerator.world_size == 1:
        compute_gradients = accelerator.graph(compute_gradients)

    # the loop
    sampler = InfiniteSampler(
        len(train_set), args.seed, accelerator.rank, accelerator.world_size, iteration * global_batch
    )
    workers = fitting_workers(args.workers, 4 * math.prod((args.batch_size, args.accum_steps, *args.crop_size)))
    if workers < args.workers:
        print0(f"NOTE: {workers} data loader workers, as /dev/shm is too small for --workers {args.workers}")
    batches = iter(DataLoader(
        train_set, args.batch_size * args.accum_steps, sampler=sampler, num_workers=workers,
        pin_memory=device.type != "cpu", worker_init_fn=init_worker,
    ))  # fmt: skip
    batch = next(batches) if iteration < args.max_iters else None
    signals, failure, stopped = catch_stop_signals(), None, False
    bar = tqdm(total=args.max_iters, initial=iteration, unit="it", smoothing=0.05, disable=None if is_main else True)
    losses, steps, waited, since = torch.zeros(3, device=device), 0, 0.0, time.perf_counter()
    while not stopped:
        if due(args.val_every) and iteration > validated:
            began = time.perf_counter()
            net.eval()
            try:
                confusion, loss = evaluate(forward, val_set, len(table), accelerator, args.workers, criterion)
            except (RuntimeError, OSError, EOFError):
                if signals:  # which also ended a data loader worker; last.pt is saved
                    sys.exit(128 + signals[0])
                raise
            scores = summarize(confusion, table)
            validated, miou = iteration, scores["mIoU"]
            if miou > best:
                best = miou
                save("best.pt")
            log({"split": "val", "iter": iteration, "mIoU": miou, "loss": loss, "IoU": scores["IoU"]})
            if is_main:
                from ocrnet.plots import draw_run  # only here: matplotlib is slow to import

                draw_run(args.output_dir, forward, val_set, confusion)
            save("last.pt")
            net.train()
            accuracy = scores["pixel_accuracy"]
            print0(f"iter {iteration}: mIoU {miou:.2%}, pixel accuracy {accuracy:.2%}, loss {loss:.4f}")
            since += time.perf_counter() - began
        if iteration == args.max_iters:
            break

        accelerator.manual_seed(random.Random(f"{args.seed} {iteration + 1} {accelerator.rank}").getrandbits(63))
        lr = poly_lr(args.lr, iteration, args.max_iters)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses += compute_gradients(*batch)
        scaler.step(optimizer)
        scaler.update()
        iteration, steps = iteration + 1, steps + 1
        bar.update()

        asked = time.perf_counter()  # the device is still at work
        try:
            batch = next(batches) if iteration < args.max_iters else None
        except (RuntimeError, OSError, EOFError, InputError) as error:  # a killed data loader worker, an invalid file
            failure = error
        waited += time.perf_counter() - asked
        stopped = accelerator.any(bool(signals or failure))

        if due(args.log_every) or stopped:
            loss, final, aux = accelerator.sum(losses / (steps * accelerator.world_size)).tolist()
            seconds = time.perf_counter() - since
            speed, waiting = steps * global_batch / seconds, waited / seconds
            entry = {"loss": loss, "loss_final": final, "loss_aux": aux, "lr": lr}
            log({"split": "train", "iter": iteration, **entry, "images_per_s": speed, "waiting_for_data": waiting})
            text = f"loss {loss:.4f}  lr {lr:.2e}  {speed:.1f} images/s  {waiting:.0%} waiting for data"
            bar.set_postfix_str(text)
            if bar.disable:  # no terminal
                left = timedelta(seconds=round((args.max_iters - iteration) * seconds / steps))
                print0(f"iter {iteration}/{args.max_iters}  {text}  {left} left")
            if not math.isfinite(loss):
                raise InputError(f"--lr {args.lr}: the loss is {loss}: add --resume, and a lower --lr or --no-amp")
            losses, steps, waited, since = torch.zeros(3, device=device), 0, 0.0, time.perf_counter()
        if due(args.save_every) or due(args.val_every) or stopped:
            save("last.pt")

    bar.close()
    accelerator.barrier()  # the other ranks wait until rank 0 has written everything
    if stopped:
        print0(f"stopped after iteration {iteration}: continue with --resume")
    elif is_main:
        files = ", ".join(sorted(path.name for path in args.output_dir.iterdir()))
        print0(f"best mIoU {best:.2%}; wrote {args.output_dir}/: {files}")
    accelerator.close()
    if failure and not signals:
        reason = (str(failure).strip() or repr(failure)).splitlines()[-1]
        raise InputError(f"{reason} ({last} is saved: --resume continues)")
    if stopped:
        sys.exit(128 + (signals or [signal.SIGTERM])[0])  # so a scheduler can tell a stopped run from a finished one


def to_device(batch: Sequence[Tensor], accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """A batch of ``TrainDataset`` -> normalized images (B, 3, H, W) and labels int64 (B, H, W) on the device."""
    image, label, photometric = (x.to(accelerator.device, non_blocking=x.is_pinned()) for x in batch)
    return preprocess(image, photometric).contiguous(memory_format=accelerator.memory_format), label.long()


def describe(
    args: Namespace, accelerator: Accelerator, net: nn.Module, size: Sequence[int], iteration: int, batch: int
) -> None:
    """Print what is trained, on what, and how. ``size`` is the images' (H, W), ``batch`` the global batch."""
    print0, (h, w) = accelerator.print0, args.crop_size
    print0(f"{args.model}, head {args.head}: {sum(p.numel() for p in net.parameters()):,} parameters, on {accelerator}")
    iterations = f"{args.max_iters:,} iterations" + (f" after {iteration:,}" if iteration else "")
    print0(f"{iterations} of {batch} crops of {h}x{w}, lr {args.lr}, seed {args.seed}; output in {args.output_dir}")
    if batch != 8 and args.lr == RECIPE_LR and not any(arg.startswith("--lr") for arg in sys.argv):
        print0(f"NOTE: --lr {RECIPE_LR} of the recipe is for a global batch of 8, found {batch}")
    if h > size[0] or w > size[1]:
        print0(f"NOTE: --crop-size {h} {w} exceeds the images, {size[0]}x{size[1]}: the rest of a crop is padding")
    cores = os.cpu_count() or 1
    if accelerator.device.type == "cpu" and 4 * torch.get_num_threads() * accelerator.world_size <= cores:
        print0(f"NOTE: {torch.get_num_threads()} of {cores} cores compute: set OMP_NUM_THREADS")
    if not (args.weights or args.demo or iteration):
        print0("WARNING: training from RANDOM weights; published scores start from ImageNet: --weights imagenet")


# fmt: off
def parse_args() -> Namespace:
    parser, count, rate = make_parser(__doc__), number(int, 1), number(float, 0)
    size, scale, seed = number(int, 32), number(float, 0.01), number(int, 0, 2**63 - 1)
    workers = min(4, os.cpu_count() or 1)
    group = parser.add_argument_group("model and data")
    group.add_argument("--demo", action="store_true", help="generated data and short settings, which flags override")
    group.add_argument("--data-path", type=Path, default=Path("data/cityscapes"), metavar="DIR", help="data set")
    group.add_argument("--output-dir", type=Path, metavar="DIR", help="None: runs/MODEL, or runs/MODEL-fcn")
    group.add_argument("--model", choices=BACKBONES, default="hr18", help="backbone")
    group.add_argument("--head", choices=HEADS, default="ocr", help="fcn is a plain classifier")
    group.add_argument("--weights", metavar="FILE", help="initial weights: a file, imagenet, or a name of hub.py")
    group.add_argument("--resume", action="store_true", help="continue from last.pt in --output-dir, if it exists")
    group = parser.add_argument_group("recipe")
    group.add_argument("--max-iters", type=count, default=40_000, metavar="N", help="optimizer steps")
    group.add_argument("--batch-size", type=count, default=2, metavar="N", help="images per process")
    group.add_argument("--accum-steps", type=count, default=1, metavar="N", help="batches per optimizer step")
    group.add_argument("--lr", type=rate, default=RECIPE_LR, metavar="X", help="for a global batch of 8")
    group.add_argument("--weight-decay", type=rate, default=5e-4, metavar="X", help="of SGD")
    group.add_argument("--crop-size", type=size, nargs=2, default=[512, 1024], metavar=("H", "W"), help="pixels")
    group.add_argument("--scale-range", type=scale, nargs=2, default=[0.5, 2.0], metavar=("MIN", "MAX"), help="sizes")
    group.add_argument("--color-jitter", action=BooleanOptionalAction, default=True, help="photometric distortion")
    group.add_argument("--class-weights", choices=["auto"], help="weigh classes in the loss by their share of pixels")
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of weights, order, crops and dropout")
    group = parser.add_argument_group("device")
    group.add_argument("--device", choices=DEVICES, help="None: the first that is available")
    group.add_argument("--amp", action=BooleanOptionalAction, help="mixed precision; None: not on CPUs without bf16")
    group.add_argument("--amp-dtype", choices=AMP_DTYPES, help="None: fp16; bf16 on CPUs and newer CUDA cards")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--workers", type=number(int, 0), default=workers, metavar="N", help="data loaders per process")
    group = parser.add_argument_group("intervals, in iterations")
    group.add_argument("--val-every", type=count, default=4000, metavar="N", help="validation")
    group.add_argument("--save-every", type=count, default=500, metavar="N", help="last.pt")
    group.add_argument("--log-every", type=count, default=50, metavar="N", help="a line of log.jsonl")

    if parser.parse_known_args()[0].demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args()
    if args.scale_range[0] > args.scale_range[1]:
        parser.error(f"--scale-range: expected MIN <= MAX, found {args.scale_range[0]} {args.scale_range[1]}")
    args.output_dir = args.output_dir or Path("runs") / (args.model + ("" if args.head == "ocr" else "-" + args.head))
    return args
# fmt: on


if __name__ == "__main__":
    run_script(main)
