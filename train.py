"""Train OCRNet.

    python train.py --demo                          a small model on generated data, minutes on two CPU cores
    python train.py                                 the recipe in one process
    torchrun --nproc_per_node 4 train.py            the recipe: 4 devices, 2 images each, 40,000 iterations
    torchrun --nproc_per_node 4 train.py --resume   continue a stopped run

Writes log.jsonl, last.pt and best.pt to --output-dir, and with each validation curve.png, samples.png and scores.png.
SIGTERM, Ctrl-C and other stop signals save last.pt after the current iteration and exit with 128 + their number.

``net`` is what is saved and validated, ``model`` is ``net`` compiled and wrapped in DDP.
"""

import os
import sys
import warnings
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ocrnet.batches import Batches
from ocrnet.checkpoint import restore_model
from ocrnet.data.classes import balanced_weights, read_classes
from ocrnet.data.datasets import EvalDataset, TrainDataset, check_labels, count_classes, find_samples, median_size
from ocrnet.data.synthetic import write_dataset
from ocrnet.data.transforms import preprocess
from ocrnet.device import AMP_DTYPES, DEVICES, Accelerator
from ocrnet.evaluation import evaluate, summarize
from ocrnet.inference import Forward, make_forward
from ocrnet.losses import ocr_loss, poly_lr
from ocrnet.models import BACKBONES, HEADS, build_model, load_weights
from ocrnet.run import Run
from ocrnet.script import make_parser, number, run_script

RECIPE_LR, MIN_LR = 0.01, 1e-4
DEMO = dict(
    data_path=Path("data/synthetic"), output_dir=Path("runs/demo"), model="hr18t", crop_size=[96, 192], workers=1,
    scale_range=[1.0, 1.0], color_jitter=False, batch_size=4, max_iters=1000, lr=0.2, weight_decay=2e-3, val_every=500,
    save_every=500, log_every=25, resume=True,
)  # fmt: skip


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(args.device, args.amp, args.amp_dtype)
    device, print0 = accelerator.device, accelerator.print0
    run = Run(args.output_dir, args.resume, accelerator)  # refuses a folder that holds another run

    # data
    if args.demo and accelerator.is_main:
        write_dataset(args.data_path)
    accelerator.barrier()
    table = read_classes(args.data_path)
    samples = find_samples(args.data_path, "train")
    train_set = TrainDataset(samples, table, args.crop_size, args.seed, args.scale_range, args.color_jitter)
    val_set = EvalDataset(find_samples(args.data_path, "val"), table)
    print0(f"{args.data_path}: {len(train_set)} training and {len(val_set)} validation images, {len(table)} classes")
    check_labels(train_set, val_set, print0)

    # model
    torch.manual_seed(args.seed)
    if run.checkpoint:
        net = restore_model(run.checkpoint, run.last)
    else:
        net = build_model(args.model, len(table), head=args.head)
        if args.weights:
            print0(f"{args.weights}: {load_weights(net, args.weights)}")
    net = accelerator.convert_sync_bn(net).to(device, memory_format=accelerator.memory_format)
    net.train()  # all but frozen modules, see OCRNet.train
    model = accelerator.wrap_ddp(accelerator.compile(net) if args.compile else net)

    # loss, optimizer, schedule
    class_weights = None
    if args.class_weights:
        shard = samples[accelerator.rank :: accelerator.world_size]
        pixels = accelerator.sum_over_ranks(torch.tensor(count_classes(shard, table, show=accelerator.is_main)))
        class_weights = torch.tensor(balanced_weights(pixels.tolist()), device=device)  # (K,)
    criterion = partial(ocr_loss, class_weights=class_weights)
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    # not fused: that kernel reads memory without values after an overflow, and needs momentum in the weights' layout
    optimizer = torch.optim.SGD(trainable, args.lr, momentum=0.9, weight_decay=args.weight_decay)
    floor = MIN_LR / max(args.lr, MIN_LR)
    schedule = LambdaLR(optimizer, lambda t: poly_lr(1.0, t, args.max_iters, floor))  # a factor of each group's own lr
    scaler = accelerator.grad_scaler()
    warnings.filterwarnings("ignore", ".*lr_scheduler.step")  # it skips steps of fp16 that overflow, also the first

    # a new run, or the one of last.pt
    step_batch = args.batch_size * args.accum_steps
    global_batch = step_batch * accelerator.world_size
    size = median_size(samples)
    facts = {"classes": ", ".join(table.names), "train_images": len(samples), "global_batch": global_batch}
    run.start(
        {**vars(args), **facts, "device": str(accelerator)},
        model=net, optimizer=optimizer, schedule=schedule, scaler=scaler,
        config=net.config, classes=table.rows(), size=size,
    )  # fmt: skip
    print_setup(args, accelerator, net, size, run.iteration, global_batch)

    forward = make_forward(net, accelerator)
    batches = Batches(train_set, step_batch, args.workers, accelerator, run.iteration, args.max_iters)
    losses = torch.zeros(3, device=device)  # of the iterations since the last entry: loss, final, auxiliary

    def compute_gradients(*batch: Tensor) -> Tensor:
        """Images, labels and photometric parameters of ``TrainDataset`` -> the loss and its parts, (3,)."""
        optimizer.zero_grad()
        losses = torch.zeros(3, device=device)
        for micro_step, micro_batch in enumerate(zip(*(x.split(args.batch_size) for x in batch)), 1):
            image, label = prepare_batch(micro_batch, accelerator)  # (B, 3, H, W), (B, H, W)
            model.require_backward_grad_sync = micro_step == args.accum_steps  # DDP: average gradients once
            with accelerator.autocast():
                outputs = model(image)  # logits, region_logits, (B, K, H, W) each
            loss, parts = criterion(outputs, label)
            del outputs  # the largest tensors; the backward pass does not need them
            scaler.scale(loss / args.accum_steps).backward()
            losses += torch.cat([loss.detach()[None], parts]) / args.accum_steps
        return losses

    def log_losses() -> None:
        """Log the means since the last entry. Losses are read back from the device only here."""
        loss, final, aux = accelerator.sum_over_ranks(losses / (batches.steps * accelerator.world_size)).tolist()
        losses.zero_()
        entry = {"loss": loss, "loss_final": final, "loss_aux": aux, "lr": lr, **batches.speed()}
        batches.show(**entry)
        run.log("train", **entry)

    if accelerator.world_size == 1:
        compute_gradients = accelerator.graph(compute_gradients)
    if run.due(args.val_every) and run.iteration > run.validated:  # a stop came before it
        validate(run, net, forward, val_set, accelerator, criterion, args.workers)

    # the loop
    for batch in batches:  # until max_iters, a stop signal or a file that cannot be read; all processes end together
        losses += compute_gradients(*batch)  # forward, loss, backward; one CUDA graph where there is one
        scaler.step(optimizer)
        scaler.update()
        lr = schedule.get_last_lr()[0]
        schedule.step()
        run.iteration += 1
        if run.due(args.log_every):
            log_losses()
        if run.due(args.save_every) or run.due(args.val_every):
            run.save("last.pt")
        if run.due(args.val_every) and not batches.stopping():
            with batches.clock_stopped():
                validate(run, net, forward, val_set, accelerator, criterion, args.workers)

    if batches.stopped:
        if batches.steps:
            log_losses()
        run.save("last.pt")
    run.end(batches.stopped)
    accelerator.close()
    batches.end()  # with the error of the data loader, or 128 + the signal's number


def validate(
    run: Run, net: nn.Module, forward: Forward, val_set: EvalDataset, accelerator: Accelerator, criterion: Callable,
    workers: int,
) -> None:  # fmt: skip
    """Score the validation images, log it, save best.pt and last.pt, and draw the figures."""
    net.eval()
    confusion, loss = evaluate(forward, val_set, accelerator, workers, criterion)
    scores = summarize(confusion, val_set.table)
    miou, accuracy = scores["mIoU"], scores["pixel_accuracy"]
    run.validated = run.iteration
    if miou > run.best:
        run.best = miou
        run.save("best.pt")
    run.log("val", mIoU=miou, loss=loss, IoU=scores["IoU"])
    if accelerator.is_main:
        from ocrnet.plots import draw_run  # only here: matplotlib is slow to import

        draw_run(run.folder, forward, val_set, confusion, f"iteration {run.iteration}")
    run.save("last.pt")
    net.train()
    classes = f"{sum(x is not None for x in scores['IoU'].values())} of {len(scores['IoU'])} classes"
    score = f"mIoU {miou:.2%} ({classes}), pixel accuracy {accuracy:.2%}"
    accelerator.print0(f"iter {run.iteration}: {score}, loss {loss:.4f}")


def prepare_batch(batch: Sequence[Tensor], accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """A batch of ``TrainDataset`` -> distorted, normalized images (B, 3, H, W) and int64 labels (B, H, W)."""
    image, label, photometric = (x.to(accelerator.device, non_blocking=x.is_pinned()) for x in batch)
    return preprocess(image, photometric).contiguous(memory_format=accelerator.memory_format), label.long()


def print_setup(
    args: Namespace, accelerator: Accelerator, net: nn.Module, size: Sequence[int], iteration: int, batch: int
) -> None:
    """Print what is trained, on what, and how. ``size`` is the images' (H, W), ``batch`` the global batch."""
    print0, (h, w) = accelerator.print0, args.crop_size
    print0(f"{args.model}, head {args.head}: {sum(p.numel() for p in net.parameters()):,} parameters, on {accelerator}")
    if iteration == args.max_iters:
        print0(f"all {iteration:,} iterations are done; --output-dir DIR starts another run")
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
