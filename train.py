"""Train OCRNet: a plain loop, straight down the page.

    python train.py --demo                          a few minutes on two CPU cores, on generated streets
    python train.py                                 the recipe in one process
    torchrun --nproc_per_node 4 train.py            the recipe: 4 cards of 2 pictures, 40,000 iterations
    torchrun --nproc_per_node 4 train.py --resume   go on after a stop

Writes log.jsonl, last.pt, best.pt, curve.png, samples.png and scores.png to --out. SIGTERM and Ctrl-C save and leave.
"""

import argparse
import math
import random
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ocrnet.checkpoint import RunFolder, load_checkpoint, restore_model
from ocrnet.data.cityscapes import (
    EndlessSampler,
    RandomCrops,
    WholeImages,
    check_samples,
    find_samples,
    leave_signals_to_parent,
    read_label_tensor,
    write_missing_train_ids,
)
from ocrnet.data.classes import CITYSCAPES, CLASS_WEIGHTS, ClassTable, read_classes
from ocrnet.data.synthetic import write_dataset
from ocrnet.data.transforms import to_input
from ocrnet.device import KINDS, Accelerator
from ocrnet.errors import InputError, run_script
from ocrnet.inference import predict, score, segment
from ocrnet.losses import ocr_loss, poly_lr
from ocrnet.metrics import ConfusionMatrix, row_baseline
from ocrnet.models import HEADS, VARIANTS, OCRNet, build_model, load_weights
from ocrnet.visualize import plot_curves, read_log, save_samples, save_scores

DEMO = dict(
    data=Path("data/synthetic"), out=Path("runs/demo"), model="hr18s", crop=[96, 192], scales=[0.75, 1.5],
    batch_size=4, iters=600, lr=0.05, val_every=200, save_every=200, log_every=10, workers=1,
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=27, width=100),
        usage="train.py [options]",
    )
    group = parser.add_argument_group("what to train, on what")
    group.add_argument("--demo", action="store_true", help="generated data and short settings; flags still override")
    group.add_argument(
        "--data", type=Path, default=Path("data/cityscapes"), metavar="DIR", help="the data set (default: %(default)s)"
    )
    group.add_argument(
        "--model",
        metavar="NAME",
        choices=VARIANTS,
        default="hr18",
        help="of " + ", ".join(VARIANTS) + " (default: %(default)s)",
    )
    group.add_argument("--head", metavar="NAME", choices=HEADS, default="ocr", help="ocr, or fcn: the backbone alone")
    group.add_argument("--weights", type=Path, metavar="FILE", help="start from these, such as an ImageNet HRNet's")
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the run (default: runs/MODEL, with --head fcn runs/MODEL-fcn)",
    )
    group.add_argument("--resume", action="store_true", help="go on from last.pt in --out, if it is there")
    group.add_argument("--dry-run", action="store_true", help="say what would be trained, on what, and stop")
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--crop",
        type=int,
        nargs=2,
        default=[512, 1024],
        metavar=("H", "W"),
        help="pixels that the network sees (default: 512 1024)",
    )
    group.add_argument(
        "--scales",
        type=float,
        nargs=2,
        default=[0.5, 2.0],
        metavar=("MIN", "MAX"),
        help="range of the random resizing (default: 0.5 2.0)",
    )
    group.add_argument(
        "--batch-size", metavar="N", type=int, default=2, help="pictures per process (default: %(default)s)"
    )
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches per step (default: 1)")
    group.add_argument(
        "--iters", metavar="N", type=int, default=40_000, help="steps of the optimizer (default: %(default)s)"
    )
    group.add_argument(
        "--lr", metavar="X", type=float, default=0.01, help="for a global batch of 8 (default: %(default)s)"
    )
    group.add_argument("--min-lr", metavar="X", type=float, default=1e-4, help="where lr ends (default: %(default)s)")
    group.add_argument(
        "--colour", action=argparse.BooleanOptionalAction, default=True, help="colour change (default: on)"
    )
    group.add_argument("--class-weights", action="store_true", help="weigh classes as the authors do")
    group.add_argument("--ohem", type=float, metavar="P", help="final loss of pixels below probability P (0.7, 0.9)")
    group.add_argument("--align-corners", action="store_true", help="resize maps as the authors do")
    group.add_argument(
        "--dropout", metavar="P", type=float, help="before the classifier (default: 0, ResNet 0.1, authors 0.05)"
    )
    group.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of weights, order, crops, dropout (default: %(default)s)"
    )
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device", metavar="NAME", choices=KINDS, help="sdaa, cuda or cpu (default: the first that is there)"
    )
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, help="mixed precision (default: not on a CPU)")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--workers", metavar="N", type=int, default=4, help="loaders per process (default: %(default)s)")
    group.add_argument(
        "--timeout", metavar="S", type=float, default=600, help="seconds to wait for a process (default: 600)"
    )
    group = parser.add_argument_group("rhythm, in iterations")
    group.add_argument(
        "--val-every", metavar="N", type=int, default=4000, help="score the val split (default: %(default)s)"
    )
    group.add_argument("--save-every", metavar="N", type=int, default=4000, help="write last.pt (default: %(default)s)")
    group.add_argument(
        "--log-every", metavar="N", type=int, default=50, help="write a line of the log (default: %(default)s)"
    )
    if parser.parse_known_args()[0].demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args()
    args.out = args.out or Path("runs") / (args.model if args.head == "ocr" else f"{args.model}-{args.head}")
    for name in ("batch_size", "accumulate", "iters", "val_every", "save_every", "log_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 1 or more")
    if not 0 < args.scales[0] <= args.scales[1]:
        parser.error(f"--scales {args.scales[0]} {args.scales[1]}: expected two factors above 0, the smaller first")
    if min(args.crop) < 32:
        parser.error(f"--crop {args.crop[0]} {args.crop[1]}: expected 32 or more on each side")
    return args


class Stop:
    """SIGTERM (of schedulers) and Ctrl-C ask for a stop after the current iteration; a later Ctrl-C stops at once."""

    def __init__(self):
        self.signal = None
        signal.signal(signal.SIGTERM, self.ask)
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.signal and time.monotonic() > self.since + 1:  # not one that came twice
            raise KeyboardInterrupt
        self.signal, self.since = signal.Signals(number), time.monotonic()


def check_resumable(state: dict, args: argparse.Namespace, conditions: dict, last: Path) -> list[str]:
    """Compare a checkpoint's run with the one that is to go on: -> what may differ and does, a sentence each.

    Raises:
        InputError: something differs with which the run would be neither the one nor the other.
    """
    if not {"optimizer", "args", "conditions"} <= state.keys():
        raise InputError(f"{last}: holds a model but no run to go on with: start from it with --weights")
    before, conditions_before = state["args"], state["conditions"]
    for name in ("model", "head", "align_corners", "dropout", "iters", "seed"):
        now = getattr(args, name)
        if now != before[name]:
            raise InputError(
                f"--{name.replace('_', '-')} {now}: the run of {last} has {before[name]}: give that, or another --out"
            )
    for name in ("classes", "global batch", "training pictures"):
        now, then = conditions[name], conditions_before[name]
        if now != then:
            raise InputError(f"{name} {now}: the run of {last} has {then}: give that, or another --out")
    changed = [
        f"--{name.replace('_', '-')} is {getattr(args, name)}, it was {before[name]}"
        for name in ("lr", "min_lr", "crop", "scales", "colour", "class_weights", "ohem", "accumulate")
        if getattr(args, name) != before[name]
    ]
    for name in ("processes", "mixed precision", "device"):
        now, then = conditions[name], conditions_before[name]
        if now != then:
            changed.append(f"{name}: {now}, before {then}")
    return changed


def memory_estimate(model: OCRNet, batch_size: int, crop: tuple[int, int], amp: bool) -> float:
    """GiB per process: weights, gradients and momentum, and what autograd keeps of a batch for the backward pass.

    The latter grows with the area: it is measured on two small images on the CPU, and drawn on as a straight line.
    What comes and goes beside it is left out: expect a tenth to a fifth more, and the device's own libraries.
    """
    model.train()
    kept = []
    for width in (64, 128):
        storages = {}

        def keep(x: Tensor, storages: dict = storages) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                outputs = model(torch.zeros(2, 3, 64, width).contiguous(memory_format=torch.channels_last))
            loss, _ = ocr_loss(outputs, torch.zeros(2, 64, width, dtype=torch.long))
        kept.append(sum(storages.values()))
        del loss, outputs
    a_pixel = (kept[1] - kept[0]) / (2 * 64 * 64)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return (3 * weights + a_pixel * batch_size * crop[0] * crop[1]) / 2**30


def draw_results(
    out: Path,
    model: OCRNet,
    val_set: WholeImages,
    confusion: ConfusionMatrix | None,
    table: ClassTable,
    accelerator: Accelerator,
    amp: bool,
) -> None:
    """curve.png, scores.png of the last validation (None: there was none since the start) and samples.png."""
    plot_curves([read_log(out)], out / "curve.png")
    if confusion:
        save_scores(out / "scores.png", confusion, table)
    model.eval()
    shown = [val_set[i] for i in range(0, len(val_set), max(len(val_set) // 4, 1))][:4]
    outputs = [segment(model, photo, accelerator, amp) for photo, _ in shown]
    photos, labels = [photo.permute(1, 2, 0).numpy() for photo, _ in shown], [label.numpy() for _, label in shown]
    save_samples(out / "samples.png", photos, labels, outputs, table)


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(args.device, args.timeout)
    device, rank, world_size = accelerator.device, accelerator.rank, accelerator.world_size
    is_main = accelerator.is_main
    amp = accelerator.kind.amp if args.amp is None else args.amp
    global_batch = args.batch_size * args.accumulate * world_size
    say = tqdm.write if is_main else lambda text: None

    # ---- data ----
    if args.demo and is_main:
        write_dataset(args.data)
        write_missing_train_ids(args.data)
    accelerator.barrier()
    table = read_classes(args.data)
    if args.class_weights and table.names != CITYSCAPES.names:
        raise InputError(f"--class-weights: are of Cityscapes' classes, not of those in {args.data}/classes.json")
    train_samples, val_samples = find_samples(args.data, "train"), find_samples(args.data, "val")
    check_samples((train_samples + val_samples)[rank::world_size], len(table), quiet=not is_main)
    accelerator.barrier()
    train_set = RandomCrops(train_samples, args.crop, args.seed, args.scales, args.colour)
    val_set = WholeImages(val_samples)

    # ---- model, optimizer, and where a stopped run stood ----
    torch.manual_seed(args.seed)
    model = build_model(args.model, len(table), args.align_corners, args.dropout, head=args.head)
    model = model.to(memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in model.parameters())
    network = f"OCRNet {args.model}" if args.head == "ocr" else f"{args.model} with head {args.head}"
    say(f"{network}: {parameters:,} parameters, on {accelerator}, " + ("mixed precision" if amp else "fp32"))
    found = f"{len(train_samples)} training and {len(val_samples)} validation pictures"
    say(f"{args.data}: {found}, {len(table)} classes")
    settings = f"{args.iters:,} iterations of {global_batch} crops of {args.crop[0]}x{args.crop[1]}, lr {args.lr}"
    say(f"{settings}, seed {args.seed}; writing to {args.out}")
    if global_batch != 8 and not args.demo:
        say(f"NOTE: the recipe's lr 0.01 is for a global batch of 8; here it is {global_batch}.")
    last = args.out / "last.pt"
    conditions = {
        "classes": ", ".join(table.names),
        "global batch": global_batch,
        "training pictures": len(train_set),
        "processes": world_size,
        "mixed precision": amp,
        "device": device.type,
    }
    state = load_checkpoint(last) if is_main and args.resume and last.exists() else None
    state = accelerator.broadcast(state)  # also to hosts that do not see the file
    if is_main and not args.resume and last.exists():
        raise InputError(f"{args.out} holds a run: go on with --resume, or choose another folder with --out")
    if state:
        for change in check_resumable(state, args, conditions, last):
            say(f"NOTE: {change}")
        model = restore_model(state, last)
        say(f"resuming {last} after iteration {state['iter']}")
    elif args.weights:
        report = load_weights(model, args.weights)
        say(f"{args.weights}: {report}")
    elif not args.demo:
        say("WARNING: training from RANDOM weights. The published scores start from an ImageNet HRNet: --weights FILE.")
    if args.dry_run:
        if is_main:
            say(f"memory: at least {memory_estimate(model, args.batch_size, args.crop, amp):.1f} GiB per process")
        say(f"every {args.val_every} iterations validation, every {args.save_every} a checkpoint; nothing was started")
        accelerator.close()
        return
    model = accelerator.sync_bn(model).to(device)
    ddp_model = accelerator.wrap(torch.compile(model) if args.compile else model)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    scaler = accelerator.grad_scaler(amp)
    start, validated, logged, best = 0, 0, 0, -math.inf  # iterations trained, validated, logged; the highest mIoU
    confusion = None  # of the last validation
    losses = torch.zeros(3, device=device)  # sums since the last entry of the log: loss, its two parts
    if state:
        start, validated, logged, best = (state[name] for name in ("iter", "validated", "logged", "best"))
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # a run without mixed precision has none
            scaler.load_state_dict(state["scaler"])
        rows = state["losses"]  # (R, 3)
        losses += (rows[rank] if len(rows) == world_size else rows.mean(0)).to(device)
    folder = RunFolder(args.out, start, validated) if is_main else None
    log = folder.log if is_main else lambda entry: None

    def save(name: str, iteration: int) -> None:
        rows = accelerator.gather(losses)
        if is_main:
            state = {
                "model": model.state_dict(),
                "config": model.config,
                "classes": table.rows(),
                "iter": iteration,
                "validated": validated,
                "logged": logged,
                "losses": rows,
                "best": best,
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "args": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
                "conditions": conditions,
            }
            folder.save(name, state)

    def validate(iteration: int) -> None:
        nonlocal validated, best, confusion
        confusion = score(model, val_set, len(table), accelerator, args.workers, predict=partial(predict, amp=amp))
        miou, iou = confusion.mean_iou(), confusion.iou().tolist()
        validated = iteration
        if miou > best:
            best = miou
            save("best.pt", iteration)
        named = {name: None if math.isnan(x) else x for name, x in zip(table.names, iou)}
        log({"split": "val", "iter": iteration, "mIoU": None if math.isnan(miou) else miou, "IoU": named})
        say(f"iter {iteration}: mIoU {miou:.2%}, pixel accuracy {confusion.pixel_accuracy():.2%}")

    def must_validate(iteration: int) -> bool:
        return iteration == args.iters or iteration % args.val_every == 0

    if 0 < start != validated and must_validate(start):  # stopped while it was validating
        validate(start)
        save("last.pt", start)

    # ---- the loop ----
    class_weights = torch.tensor(CLASS_WEIGHTS, device=device) if args.class_weights else None
    sampler = EndlessSampler(len(train_set), args.seed, rank, world_size, start * global_batch)
    loader = DataLoader(
        train_set,
        args.batch_size,
        sampler=sampler,
        num_workers=args.workers,
        pin_memory=accelerator.has_own_memory,
        worker_init_fn=leave_signals_to_parent,
    )
    batches = iter(loader)
    bar = tqdm(total=args.iters, initial=start, unit="it", disable=None if is_main else True, smoothing=0.05)
    timed, since, waited = start, time.perf_counter(), 0.0
    stop, stopping = Stop(), False
    model.train()
    for iteration in range(start + 1, args.iters + 1):
        asked = accelerator.any(stop.signal or accelerator.is_orphan())
        # dropout draws from seed, iteration and rank alone, so that no generator's state need be kept
        torch.manual_seed(random.Random(f"{args.seed} {iteration} {rank}").getrandbits(63))
        lr = poly_lr(args.lr, iteration - 1, args.iters, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for batch_of_step in range(args.accumulate):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            photo, label, colour = (x.to(device, non_blocking=True) for x in batch)
            image = to_input(photo, colour).contiguous(memory_format=torch.channels_last)  # (B, 3, H, W)
            ddp_model.require_backward_grad_sync = (
                batch_of_step == args.accumulate - 1
            )  # DDP: processes meet once a step
            with accelerator.autocast(amp):
                outputs = ddp_model(image)  # logits and region logits, (B, K, H, W) each
            loss, parts = ocr_loss(outputs, label.long(), class_weights, args.ohem)
            del outputs  # the largest maps there are; the backward pass needs them no more
            scaler.scale(loss / args.accumulate).backward()
            losses += torch.cat([loss.detach()[None], parts]) / args.accumulate
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        bar.update()

        stopping = asked.item() > 0
        validating = must_validate(iteration)
        logging = iteration == args.iters or iteration % args.log_every == 0
        saving = validating or stopping or iteration % args.save_every == 0
        if logging or saving:
            mean = (accelerator.gather(losses).mean(0) / (iteration - logged)).tolist()
            if not math.isfinite(mean[0]):
                raise InputError(
                    f"the loss became {mean[0]} in iterations {logged + 1} to {iteration}; nothing was saved since: "
                    f"try a lower --lr (it is {args.lr})" + (", or --no-amp" if amp else "")
                )
        if logging:
            seconds = time.perf_counter() - since
            speed, waiting = (iteration - timed) * global_batch / seconds, waited / seconds
            entry = {"split": "train", "iter": iteration, "loss": mean[0], "loss_final": mean[1]}
            log({**entry, "loss_regions": mean[2], "lr": lr, "images_per_s": speed, "waiting_for_data": waiting})
            bar.set_postfix_str(f"loss {mean[0]:.4f}, lr {lr:.2e}, {speed:.1f} images/s, {waiting:.0%} waiting")
            if bar.disable:
                left = timedelta(seconds=round((args.iters - iteration) * global_batch / speed))
                numbers = f"loss {mean[0]:.4f}  lr {lr:.2e}  {speed:.1f} images/s  {waiting:.0%} waiting for data"
                say(f"iter {iteration}/{args.iters}  {numbers}  {left} left")
            losses.zero_()
            logged = timed = iteration
            since, waited = time.perf_counter(), 0.0
        if saving:
            before = time.perf_counter()
            save("last.pt", iteration)
            if validating and not stopping:
                validate(iteration)
                save("last.pt", iteration)
            since += time.perf_counter() - before  # the speed is training's
        if stopping:
            break
    bar.close()

    # ---- what came of it ----
    accelerator.barrier()  # the others wait until all is written
    if stopping:
        name = stop.signal.name if stop.signal else "a signal to another process"
        say(f"stopped by {name} after iteration {iteration}, which {last} holds: go on with --resume")
    elif is_main:
        draw_results(args.out, model, val_set, confusion, table, accelerator, amp)
        if args.demo:
            labels = [map(read_label_tensor, samples) for samples in (train_samples, val_samples)]
            baseline = row_baseline(*labels, len(table)).mean_iou()
            miou = read_log(args.out).val[-1]["mIoU"]
            say(f"mIoU {miou:.2%}; always the row's most frequent class, without looking at the photo: {baseline:.2%}")
        highest = f" (mIoU {best:.2%} in best.pt)" if best > -math.inf else ""
        say(f"wrote {args.out}/: {', '.join(sorted(path.name for path in args.out.iterdir()))}{highest}")
    accelerator.close()
    if stopping:
        sys.exit(128 + (stop.signal or signal.SIGTERM))  # as a shell says it: not done


if __name__ == "__main__":
    run_script(main)
