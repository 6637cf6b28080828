"""Score a checkpoint, or colour pictures with it.

    python evaluate.py --ckpt runs/hr18/best.pt                                     mIoU of the val split
    torchrun --nproc_per_node 4 evaluate.py --ckpt runs/hr18/best.pt                the same, shared by 4 processes
    python evaluate.py --ckpt runs/hr18/best.pt --images street.jpg photos/ --save out    no data set needed

--save writes NAME.png (Cityscapes' colours) and NAME_overlay.png (laid over the photo) for each picture.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ocrnet.checkpoint import load_model
from ocrnet.data.cityscapes import (
    CLASS_NAMES,
    WholeImages,
    check_samples,
    find_samples,
    read_label_tensor,
    read_photo,
    to_tensor,
    write_whole,
)
from ocrnet.device import KINDS, Accelerator
from ocrnet.errors import InputError, run
from ocrnet.inference import predict, score
from ocrnet.metrics import ConfusionMatrix, row_baseline
from ocrnet.visualize import colourise, overlay

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="evaluate.py --ckpt FILE [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show = dict(help="(default: %(default)s)")
    parser.add_argument("--ckpt", type=Path, required=True, metavar="FILE", help="last.pt or best.pt of a run")
    group = parser.add_argument_group("scoring")
    group.add_argument("--data", type=Path, default=Path("data/cityscapes"), metavar="DIR", **show)
    group.add_argument("--split", default="val", **show)
    group.add_argument("--json", type=Path, metavar="FILE", help="write the scores there as well")
    group.add_argument("--baseline", action="store_true", help="also score each row's most frequent class in training")
    group = parser.add_argument_group("pictures")
    group.add_argument("--images", type=Path, nargs="+", metavar="FILE_OR_DIR", help="colour these instead of scoring")
    group.add_argument("--save", type=Path, metavar="DIR", help="where the coloured pictures go")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=KINDS, help="(default: the first of these that is there)")
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, help="mixed precision (default: not on a CPU)")
    group.add_argument("--workers", type=int, default=2, help="loader processes a process (default: %(default)s)")
    args = parser.parse_args()
    if bool(args.images) != bool(args.save):
        parser.error("--images and --save go together: which pictures, and where the coloured ones go")
    return args


# ---- scoring ---------------------------------------------------------------------------------------------------------


def summarise(confusion: ConfusionMatrix) -> dict:
    """Scores as plain numbers 0 .. 1; None for a class that is neither in the labels nor predicted."""
    iou = [None if math.isnan(x) else x for x in confusion.iou().tolist()]
    present = confusion.present().tolist()
    return {
        "mIoU": confusion.mean_iou(),
        "mIoU_present": sum(x for x, there in zip(iou, present) if there) / max(sum(present), 1),
        "pixel_accuracy": confusion.pixel_accuracy(),
        "IoU": dict(zip(CLASS_NAMES, iou)),
        "pixels": dict(zip(CLASS_NAMES, confusion.counts.sum(1).tolist())),
    }


def print_scores(scores: dict) -> None:
    total = max(sum(scores["pixels"].values()), 1)
    print(f"{'class':15}{'IoU %':>8}{'% of pixels':>14}")
    for name, iou in scores["IoU"].items():
        print(f"{name:15}{'nan' if iou is None else f'{100 * iou:.2f}':>8}{100 * scores['pixels'][name] / total:14.3f}")
    counted = [name for name, iou in scores["IoU"].items() if iou is not None]
    absent = [name for name in CLASS_NAMES if not scores["pixels"][name]]
    print(f"{'mIoU':15}{100 * scores['mIoU']:8.2f}   mean of {len(counted)} of {len(CLASS_NAMES)} classes")
    if absent:
        print(f"               {len(absent)} classes do not occur in these labels: {', '.join(absent)}")
        strays = [name for name in absent if name in counted]
        if strays:
            print(f"               of these predicted somewhere, which counts as IoU 0: {', '.join(strays)}")
        print(f"{'mIoU, occurring':15}{100 * scores['mIoU_present']:8.2f}   mean of the {19 - len(absent)} that occur")
    print(f"{'pixel accuracy':15}{100 * scores['pixel_accuracy']:8.2f}")


def score_split(model, args: argparse.Namespace, accelerator: Accelerator, amp: bool) -> None:
    samples = find_samples(args.data, args.split)
    check_samples(samples[accelerator.rank :: accelerator.world_size], quiet=not accelerator.is_main)
    accelerator.barrier()
    confusion = score(model, WholeImages(samples), len(CLASS_NAMES), accelerator, amp, args.workers)
    if not accelerator.is_main:
        return
    scores = summarise(confusion)
    print(f"{args.ckpt} on {args.data}, {args.split}: {len(samples)} pictures\n")
    print_scores(scores)
    if args.baseline:
        labels = [map(read_label_tensor, found) for found in (find_samples(args.data, "train"), samples)]
        baseline = scores["row_baseline"] = summarise(row_baseline(*labels, len(CLASS_NAMES)))
        numbers = f"mIoU {100 * baseline['mIoU']:.2f}, of the classes that occur {100 * baseline['mIoU_present']:.2f}"
        print(f"\nalways the row's most frequent class in training, without looking at the photo: {numbers}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(args.json) as part:
            part.write_text(json.dumps({"images": len(samples), **scores}, indent=2) + "\n")


# ---- pictures --------------------------------------------------------------------------------------------------------


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the pictures directly in them.

    Raises:
        InputError: nothing there, no picture in a folder, or two pictures whose results would have one name.
    """
    pictures = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
            if not inside:
                raise InputError(f"--images {path}: no picture in this folder: expected {', '.join(sorted(PICTURES))}")
            pictures += inside
        elif path.exists():
            pictures.append(path)
        else:
            raise InputError(f"--images {path}: no such file or folder")
    names = {}
    for path in pictures:
        if path.stem in names:
            raise InputError(f"--images: {names[path.stem]} and {path} would both be saved as {path.stem}.png")
        names[path.stem] = path
    return pictures


def colour_pictures(model, args: argparse.Namespace, accelerator: Accelerator, amp: bool) -> None:
    pictures = find_pictures(args.images)
    args.save.mkdir(parents=True, exist_ok=True)
    shard = pictures[accelerator.rank :: accelerator.world_size]
    for path in tqdm(shard, desc="colouring", disable=None if accelerator.is_main else True):
        photo = read_photo(path)
        classes = predict(model, to_tensor(photo)[None], accelerator, amp).argmax(1)[0].byte().cpu().numpy()
        results = {".png": colourise(classes), "_overlay.png": overlay(np.asarray(photo), classes)}
        for suffix, picture in results.items():
            with write_whole(args.save / f"{path.stem}{suffix}") as part:
                Image.fromarray(picture).save(part, format="PNG")
    if accelerator.is_main:
        print(f"{len(pictures)} pictures: NAME.png and NAME_overlay.png in {args.save}")


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(args.device)
    amp = accelerator.kind.amp if args.amp is None else args.amp
    model = load_model(args.ckpt).to(accelerator.device, memory_format=torch.channels_last)
    (colour_pictures if args.images else score_split)(model, args, accelerator, amp)
    accelerator.close()


if __name__ == "__main__":
    run(main)
