"""Evaluate a checkpoint, or color images with it.

    python evaluate.py --ckpt runs/hr18/best.pt                                       mIoU of the val split
    torchrun --nproc_per_node 4 evaluate.py --ckpt runs/hr18/best.pt                  the same, by 4 processes
    python evaluate.py --ckpt runs/hr18/best.pt --images street.jpg images/ --save out      your own images
    python evaluate.py --ckpt runs/hr18/best.pt --images street.jpg --explain out           each step of the method
    python evaluate.py --ckpt runs/hr18/best.pt --split test --export out             PNGs for the test server

--ckpt accepts checkpoints of train.py, of mmsegmentation's OCRNet and of the authors' HRNet-OCR. --images needs no
data set.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from ocrnet.checkpoint import load_model
from ocrnet.data.classes import read_classes
from ocrnet.device import AMP_DTYPES, DEVICES, Accelerator
from ocrnet.errors import InputError
from ocrnet.evaluation import evaluate_split, export_split, format_shares, print_scores
from ocrnet.files import atomic_write
from ocrnet.hub import find_weights
from ocrnet.inference import color_images, segment
from ocrnet.script import make_parser, run_script


# fmt: off
def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, usage="evaluate.py --ckpt FILE [options]")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint: a file, or a name of hub.py")

    group = parser.add_argument_group("data set")
    group.add_argument("--data-path", type=Path, default=Path("data/cityscapes"), metavar="DIR", help="data set")
    group.add_argument("--split", default="val", metavar="NAME", help="train, val or test")
    group.add_argument("--json", type=Path, metavar="FILE", help="also write the scores to FILE")
    group.add_argument("--baseline", action="store_true", help="also score the most frequent class per row")
    group.add_argument("--export", type=Path, metavar="DIR", help="write label-id PNGs to DIR instead of scoring")

    group = parser.add_argument_group("images")
    group.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="image files and folders")
    group.add_argument("--save", type=Path, metavar="DIR", help="write them colored by class to DIR")
    group.add_argument("--legend", action="store_true", help="also NAME_legend.png, with the names of the classes")
    group.add_argument("--explain", type=Path, metavar="DIR", help="write a figure per step of the method to DIR")
    group.add_argument("--pixel", type=int, nargs=2, action="append", metavar=("X", "Y"), help="for --explain")

    group = parser.add_argument_group("inference")
    group.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="X", help="multi-scale: sizes")
    group.add_argument("--flip", action="store_true", help="mean over flipped images too")
    group.add_argument("--slide", type=int, nargs=2, metavar=("H", "W"), help="sliding window, saves memory")
    group.add_argument("--stride", type=int, nargs=2, metavar=("H", "W"), help="of the window; default: 2/3 of it")

    group = parser.add_argument_group("device")
    group.add_argument("--device", choices=DEVICES, help="default: the first that is available")
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, help="default: not on CPUs without bf16")
    group.add_argument("--amp-dtype", choices=AMP_DTYPES, help="default: fp16; bf16 on CPUs and newer CUDA cards")
    group.add_argument("--workers", type=int, default=2, metavar="N", help="data loader workers per process")

    args = parser.parse_args()
    if bool(args.images) != bool(args.save or args.explain):
        parser.error("--images: expected together with --save or --explain")
    if args.explain and (args.scales != [1.0] or args.flip or args.slide):
        parser.error("--explain: shows one forward pass at scale 1: leave out --scales, --flip, --slide")
    if args.legend and not args.save:
        parser.error("--legend: expected together with --save")
    if args.pixel and not args.explain:
        parser.error("--pixel: expected together with --explain")
    if min(args.scales) <= 0 or min(args.slide or [1]) < 1 or min(args.stride or [1]) < 1:
        parser.error("--scales, --slide, --stride: expected numbers above 0")
    if args.stride and not (args.slide and args.stride[0] <= args.slide[0] and args.stride[1] <= args.slide[1]):
        parser.error("--stride: expected --slide, and no larger numbers, or pixels would be left out")
    return args
# fmt: on


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(args.device, args.amp, args.amp_dtype)
    model, table = load_model(find_weights(args.ckpt, accelerator))
    table = table or read_classes(args.data_path)
    if model.config["num_classes"] != len(table):
        raise InputError(
            f"--ckpt {args.ckpt}: has {model.config['num_classes']} classes without names: "
            f"expected {len(table)}, or --data-path DIR with a classes.json of as many"
        )
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    options = dict(scales=args.scales, flip=args.flip, slide=args.slide, stride=args.stride)
    segment_image = partial(segment, accelerator=accelerator, **options)

    if args.save:
        pixels = color_images(model, args.images, args.save, table, accelerator, segment_image, args.legend)
        accelerator.print0(format_shares(pixels, table))
    if args.explain:
        from ocrnet.explain import explain_images  # only here: matplotlib is slow to import

        explain_images(model, args.images, args.explain, table, accelerator, args.pixel or ())
    elif args.export:
        export_split(model, args.data_path, args.split, args.export, table, accelerator, segment_image)
    elif not args.save:
        scores = evaluate_split(
            model, table, args.data_path, args.split, accelerator, segment_image, args.workers, args.baseline
        )
        if accelerator.is_main:
            print(f"{args.ckpt} on {args.data_path}, {args.split}: {scores['images']} images\n")
            print_scores(scores)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(args.json) as part:
                    part.write_text(json.dumps(scores, indent=2) + "\n")
    accelerator.close()


if __name__ == "__main__":
    run_script(main)
