"""Evaluate a checkpoint, or color images with it.

    python evaluate.py --ckpt runs/hr18/best.pt                                       mIoU of the val split
    torchrun --nproc_per_node 4 evaluate.py --ckpt runs/hr18/best.pt                  the same, by 4 processes
    python evaluate.py --ckpt runs/hr18/best.pt --images street.jpg images/ --save out      your own images
    python evaluate.py --ckpt runs/hr18/best.pt --images street.jpg --explain out           each step of the method
    python evaluate.py --ckpt runs/hr18/best.pt --split test --export out             PNGs for the test server

--ckpt accepts checkpoints of train.py, of mmsegmentation's OCRNet and of the authors' HRNet-OCR. --images needs no
data set.
"""

import json
from argparse import BooleanOptionalAction, Namespace
from pathlib import Path

import torch

from ocrnet import InputError
from ocrnet.checkpoint import load_model
from ocrnet.data.classes import read_classes
from ocrnet.data.datasets import EvalDataset, find_images, find_samples, split_folder
from ocrnet.device import DEVICES, Accelerator
from ocrnet.evaluation import evaluate, print_scores, summarize
from ocrnet.files import atomic_write, check_output
from ocrnet.inference import list_images, make_forward, write_predictions
from ocrnet.script import make_parser, number, run_script


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(args.device, args.amp)
    if args.json and accelerator.is_main:
        check_output(args.json, "score file")  # before the work
    model, table = load_model(args.ckpt)
    if model.about and not args.images:
        accelerator.print0(f"{args.ckpt}: {model.about}")
    if model.entry not in ("", "model", "state_dict"):
        accelerator.print0(f"{args.ckpt}: weights of {model.entry!r}")
    root, split = args.data_path or Path("data/cityscapes"), args.split or "val"
    if not args.images and not root.is_dir():
        raise InputError(f"--data-path {root}: expected the folder of a data set, found none")
    if args.images and table and args.data_path:
        raise InputError(f"--data-path {root}: is not read with --images, as {args.ckpt} has its classes: leave it out")
    if not args.images or not table:
        own = read_classes(root)
        if table and own.names != table.names:
            raise InputError(
                f"--data-path {root}: expected the classes of the checkpoint, {', '.join(table.names)}, "
                f"found {', '.join(own.names)}"
            )
        table = own
    if len(table) != model.config["num_classes"]:
        raise InputError(
            f"--ckpt {args.ckpt}: has {model.config['num_classes']} classes without names: expected {len(table)}, or "
            f"--data-path DIR with a classes.json of as many"
        )
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    long_side = 0  # a data set is scored at its own size
    if args.images:
        long_side = model.long_side if args.long_side is None else args.long_side
        size = f"resized to {long_side} pixels on the longer side" if long_side else "at their own size"
        accelerator.print0(f"images {size} (--long-side)")
    compiled = accelerator.compile(model, frozen=True) if args.compile else model
    forward = make_forward(compiled, accelerator, args.scales, args.flip, args.slide, long_side)

    if args.save or args.export or args.explain:
        if args.images:
            images = list_images(args.images)
        else:  # the folders below the split stay
            folder = split_folder(root, split)
            images = {path: path.relative_to(folder).with_suffix("") for path in find_images(root, split)}
        if args.save or args.export:
            write_predictions(forward, images, table, accelerator, args.save, args.export)
        if args.explain:
            from ocrnet.explain import explain_images  # only here: matplotlib is slow to import

            explain_images(model, images, args.explain, table, accelerator, long_side)
    else:
        samples = find_samples(root, split)
        confusion, _ = evaluate(forward, EvalDataset(samples, table), accelerator, workers=2)
        if accelerator.is_main:
            scores = {"images": len(samples), **summarize(confusion, table)}
            try:
                if args.json:
                    with atomic_write(args.json) as part:
                        part.write_text(json.dumps(scores, indent=2) + "\n")
            finally:  # the file may be refused by a full disk, the text by a closed pipe
                print(f"{args.ckpt} on {root}, {split}: {len(samples)} images\n")
                print_scores(scores)
    accelerator.close()


# fmt: off
def parse_args() -> Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint: a file, or a name of hub.py")
    group = parser.add_argument_group("what it sees")
    group.add_argument("--data-path", type=Path, metavar="DIR", help="data set; None: data/cityscapes")
    group.add_argument("--split", metavar="NAME", help="train, val or test; None: val")
    group.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="instead: image files and folders")
    group.add_argument("--long-side", type=number(int, 0), metavar="N", help="pixels; 0: as it is; None: as trained")
    group = parser.add_argument_group("what it writes, by default the scores to the screen")
    group.add_argument("--save", type=Path, metavar="DIR", help="images colored by class")
    group.add_argument("--explain", type=Path, metavar="DIR", help="a figure per step of the method")
    group.add_argument("--export", type=Path, metavar="DIR", help="PNGs of label ids")
    group.add_argument("--json", type=Path, metavar="FILE", help="the scores")
    group = parser.add_argument_group("inference")
    group.add_argument("--scales", type=number(float, 0.01), nargs="+", default=[1.0], metavar="X", help="multi-scale")
    group.add_argument("--flip", action="store_true", help="mean over flipped images too")
    group.add_argument("--slide", type=number(int, 1), nargs=2, metavar=("H", "W"), help="window, saves memory")
    group.add_argument("--device", choices=DEVICES, help="None: the first that is available")
    group.add_argument("--amp", action=BooleanOptionalAction, help="mixed precision; None: not on CPUs without bf16")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    args = parser.parse_args()
    if args.images and not (args.save or args.explain or args.export):
        parser.error("--images: expected together with --save, --explain or --export")
    if args.images and args.split:
        parser.error("--images, --split: expected one of them")
    if args.save and args.export and args.save.resolve() == args.export.resolve():
        parser.error(f"--save, --export: expected two folders, found {args.save} and {args.export}")
    if args.json and (args.save or args.export or args.explain):
        parser.error("--json: scores a data set: leave out --save, --export, --explain")
    if args.long_side is not None and not args.images:
        parser.error("--long-side: expected together with --images")
    if args.explain and (args.scales != [1.0] or args.flip or args.slide or args.compile):
        parser.error("--explain: shows one forward pass at scale 1: leave out --scales, --flip, --slide, --compile")
    return args
# fmt: on


if __name__ == "__main__":
    run_script(main)
