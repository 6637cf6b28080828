"""Score a checkpoint, or colour pictures with it.

    python evaluate.py --ckpt runs/hr18/best.pt                                     mIoU of the val split
    torchrun --nproc_per_node 4 evaluate.py --ckpt runs/hr18/best.pt                the same, shared by 4 processes
    python evaluate.py --ckpt runs/hr18/best.pt --images street.jpg photos/ --save out    no data set needed
    python evaluate.py --ckpt runs/hr18/best.pt --images street.jpg --explain out       each step of the method
    python evaluate.py --ckpt runs/hr18/best.pt --split test --export out           PNGs for the test server

--ckpt takes runs of train.py, and checkpoints of mmsegmentation's OCRNet and of the authors' HRNet-OCR as they are.
--save writes NAME.png (the data set's colours) and NAME_overlay.png (laid over the photo) for each picture.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ocrnet.checkpoint import load_model
from ocrnet.data.cityscapes import (
    Sample,
    WholeImages,
    check_samples,
    class_counts,
    find_photos,
    find_samples,
    instance_path,
    label_path,
    read_label_tensor,
    read_photo,
    to_tensor,
    write_whole,
)
from ocrnet.data.classes import AVERAGE_INSTANCE, CITYSCAPES, ClassTable, read_classes
from ocrnet.device import KINDS, Accelerator
from ocrnet.errors import InputError, run_script
from ocrnet.inference import explain, predict, score
from ocrnet.metrics import ConfusionMatrix, InstanceScore, row_baseline
from ocrnet.models import OCRNet
from ocrnet.visualize import overlay, save_explanation

Look = Callable[[OCRNet, Tensor, Accelerator], Tensor]  # predict, at the scales and so on of the flags
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="evaluate.py --ckpt FILE [options]",
        description=__doc__,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=27, width=100),
    )
    parser.add_argument(
        "--ckpt", type=Path, required=True, metavar="FILE", help="of a run, of mmsegmentation or of the authors"
    )
    group = parser.add_argument_group("scoring")
    group.add_argument(
        "--data", type=Path, default=Path("data/cityscapes"), metavar="DIR", help="the data set (default: %(default)s)"
    )
    group.add_argument("--split", metavar="NAME", default="val", help="train, val or test (default: %(default)s)")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the scores there as well")
    group.add_argument("--export", type=Path, metavar="DIR", help="write label-id PNGs there instead of scoring")
    group.add_argument("--baseline", action="store_true", help="also score each row's most frequent class in training")
    group = parser.add_argument_group("pictures")
    group.add_argument("--images", type=Path, nargs="+", metavar="FILE_OR_DIR", help="look at these instead of scoring")
    group.add_argument("--save", type=Path, metavar="DIR", help="where they go, coloured by class")
    group.add_argument(
        "--explain", type=Path, metavar="DIR", help="draw each step of the method for them there, at scale 1"
    )
    group.add_argument(
        "--pixel",
        type=int,
        nargs=2,
        action="append",
        metavar=("X", "Y"),
        help="pixel whose relation --explain draws; repeatable",
    )
    group = parser.add_argument_group("how to look at a photo")
    group.add_argument(
        "--scales", metavar="X", type=float, nargs="+", default=[1.0], help="sizes to see it at (default: 1)"
    )
    group.add_argument("--flip", action="store_true", help="and mirrored as well; the mean of the softmaxes counts")
    group.add_argument("--slide", type=int, nargs=2, metavar=("H", "W"), help="through a window, where memory is short")
    group.add_argument("--stride", type=int, nargs=2, metavar=("H", "W"), help="(default: 2/3 of the window)")
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device", metavar="NAME", choices=KINDS, help="sdaa, cuda or cpu (default: the first that is there)"
    )
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, help="mixed precision (default: not on a CPU)")
    group.add_argument("--workers", metavar="N", type=int, default=2, help="loaders per process (default: %(default)s)")
    args = parser.parse_args()
    if bool(args.images) != bool(args.save or args.explain):
        parser.error("--images goes with --save or --explain: which pictures, and where what is drawn of them goes")
    if args.explain and (args.scales != [1.0] or args.flip or args.slide):
        parser.error(
            "--explain: shows one look at the photo, whole and at scale 1: leave out --scales, --flip, --slide"
        )
    if args.pixel and not args.explain:
        parser.error("--pixel: is for --explain DIR")
    if args.split == "test" and not (args.export or args.images):
        parser.error("--split test: its labels are not public: write PNGs for the test server with --export DIR")
    if min(args.scales) <= 0 or min(args.slide or [1]) < 1 or min(args.stride or [1]) < 1:
        parser.error("--scales, --slide, --stride: expected numbers above 0")
    if args.stride and not (args.slide and args.stride[0] <= args.slide[0] and args.stride[1] <= args.slide[1]):
        parser.error("--stride: is for --slide, and no larger, or pixels between the windows would not be seen")
    return args


# ---- scoring ---------------------------------------------------------------------------------------------------------


def plain(values: Tensor) -> list[float | None]:
    """Numbers for JSON: None for nan."""
    return [None if math.isnan(x) else x for x in values.tolist()]


def summarise(confusion: ConfusionMatrix, table: ClassTable, instances: InstanceScore | None = None) -> dict:
    """Scores as plain numbers 0 .. 1; None for a class that is neither in the labels nor predicted."""
    groups = confusion.merged(table.category_of).iou()
    present = confusion.present().cpu()
    scores = {
        "mIoU": confusion.mean_iou(),
        "mIoU_present": float(confusion.iou()[present].mean()),
        "mIoU_categories": float(groups.nanmean()),
        "pixel_accuracy": confusion.pixel_accuracy(),
        "IoU": dict(zip(table.names, plain(confusion.iou()))),
        "IoU_categories": dict(zip(table.categories, plain(groups))),
        "pixels": dict(zip(table.names, confusion.counts.sum(1).tolist())),
    }
    if instances:
        classes, categories = instances.iou(confusion)
        scores["iIoU"] = dict(zip(table.names, plain(classes)))
        scores["iIoU_categories"] = dict(zip(table.categories, plain(categories)))
    return scores


def percent(score: float | None) -> str:
    return f"{'nan' if score is None or math.isnan(score) else f'{100 * score:.2f}':>9}"


def print_table(title: str, scores: dict, suffix: str = "") -> None:
    """A row a class or category: IoU, iIoU where there are instances, and the share of its pixels."""
    total = max(sum(scores["pixels"].values()), 1)
    columns = [name for name in ("IoU", "iIoU") if name in scores]
    width = max(15, *(len(name) + 2 for name in scores["IoU" + suffix]))
    print(
        f"{title:{width}}"
        + "".join(f"{name + ' %':>9}" for name in columns)
        + ("" if suffix else f"{'% of pixels':>14}")
    )
    for name in scores["IoU" + suffix]:
        share = "" if suffix else f"{100 * scores['pixels'][name] / total:14.3f}"
        print(f"{name:{width}}" + "".join(percent(scores[column + suffix][name]) for column in columns) + share)


def print_scores(scores: dict) -> None:
    print_table("class", scores)
    counted = [name for name, iou in scores["IoU"].items() if iou is not None]
    absent = [name for name, pixels in scores["pixels"].items() if not pixels]
    print(f"{'mIoU':15}{percent(scores['mIoU'])}   mean of {len(counted)} of {len(scores['IoU'])} classes")
    if absent:
        present = len(scores["IoU"]) - len(absent)
        print(f"{'mIoU, occurring':15}{percent(scores['mIoU_present'])}   mean of the {present} that occur")
        print(f"{'':15}{len(absent)} classes do not occur in these labels: {', '.join(absent)}")
        strays = [name for name in absent if name in counted]
        if strays:
            print(f"{'':15}of these predicted somewhere, which counts as IoU 0: {', '.join(strays)}")
    print()
    if len(scores["IoU_categories"]) < len(scores["IoU"]):  # there are groups
        print_table("category", scores, "_categories")
        print(f"{'mIoU':15}{percent(scores['mIoU_categories'])}\n")
    print(f"{'pixel accuracy':15}{percent(scores['pixel_accuracy'])}")


def score_split(
    model: OCRNet, table: ClassTable, args: argparse.Namespace, accelerator: Accelerator, look: Look
) -> None:
    own = read_classes(args.data)
    if own.names != table.names:
        raise InputError(
            f"--data {args.data}: its classes are {', '.join(own.names)}; {args.ckpt} was trained on "
            f"{', '.join(table.names)}: score it on the data it is of, or mend classes.json"
        )
    samples = find_samples(args.data, args.split)
    train = find_samples(args.data, "train") if args.baseline else []
    check_samples(samples[accelerator.rank :: accelerator.world_size], len(table), quiet=not accelerator.is_main)
    accelerator.barrier()
    instances = None
    if table.names == CITYSCAPES.names and all(instance_path(sample).exists() for sample in samples):
        sizes = torch.tensor([AVERAGE_INSTANCE.get(name, math.nan) for name in table.names], dtype=torch.float64)
        instances = InstanceScore(sizes, table.category_of, accelerator.device)
    dataset = WholeImages(samples, instances=instances is not None)
    confusion = score(model, dataset, len(table), accelerator, args.workers, instances, look)
    if not accelerator.is_main:
        return
    scores = summarise(confusion, table, instances)
    print(f"{args.ckpt} on {args.data}, {args.split}: {len(samples)} pictures\n")
    print_scores(scores)
    if args.baseline:
        bars = [tqdm(part, desc="baseline", disable=None, leave=False) for part in (train, samples)]
        labels = [map(read_label_tensor, bar) for bar in bars]
        baseline = scores["row_baseline"] = summarise(row_baseline(*labels, len(table)), table)
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
            raise InputError(
                f"--images: {names[path.stem]} and {path} would both be saved as {path.stem}.png: rename one"
            )
        names[path.stem] = path
    return pictures


def predict_classes(model: OCRNet, photo: Image.Image, accelerator: Accelerator, look: Look) -> np.ndarray:
    """Photo -> train ids, uint8 (H, W)."""
    return look(model, to_tensor(photo)[None], accelerator).argmax(1)[0].byte().cpu().numpy()


def my_share(pictures: Sequence[Path], accelerator: Accelerator, verb: str) -> Iterable[Path]:
    """The pictures that this process takes, with a bar on the first one."""
    share = pictures[accelerator.rank :: accelerator.world_size]
    return tqdm(share, desc=verb, disable=None if accelerator.is_main else True)


def save_png(picture: np.ndarray, path: Path) -> None:
    with write_whole(path) as part:
        Image.fromarray(picture).save(part, format="PNG")


def colour_pictures(
    model: OCRNet, table: ClassTable, args: argparse.Namespace, accelerator: Accelerator, look: Look
) -> None:
    pictures = find_pictures(args.images)
    args.save.mkdir(parents=True, exist_ok=True)
    targets = [args.save / f"{path.stem}{ending}.png" for path in pictures for ending in ("", "_overlay")]
    for target in targets:
        if target.resolve() in [path.resolve() for path in pictures] or targets.count(target) > 1:
            raise InputError(f"--save {args.save}: would write over {target}: choose another folder")
    for path in my_share(pictures, accelerator, "colouring"):
        photo = read_photo(path)
        colours = table.palette[predict_classes(model, photo, accelerator, look)]
        save_png(colours, args.save / f"{path.stem}.png")
        save_png(overlay(np.asarray(photo), colours), args.save / f"{path.stem}_overlay.png")
    if accelerator.is_main:
        print(f"{len(pictures)} pictures: NAME.png and NAME_overlay.png in {args.save}")


def label_of(picture: Path, table: ClassTable) -> np.ndarray | None:
    """The train ids (H, W) of a data set's photo, checked against it; None where there are none of these classes."""
    photo = picture.resolve()
    if not photo.name.endswith("_leftImg8bit.png") or len(photo.parents) < 4 or not label_path(photo).exists():
        return None
    if read_classes(photo.parents[3]).names != table.names:
        return None
    sample = Sample(photo, label_path(photo))
    class_counts(sample, len(table))
    return read_label_tensor(sample).numpy()


def explain_pictures(
    model: OCRNet, table: ClassTable, args: argparse.Namespace, accelerator: Accelerator, look: Look
) -> None:
    """A figure a step of the method, each photo seen once at its own size."""
    if model.config["head"] != "ocr":
        raise InputError(f"--explain: {args.ckpt} has head {model.config['head']}, which has no regions: use --save")
    pictures = find_pictures(args.images)
    args.explain.mkdir(parents=True, exist_ok=True)
    for path in my_share(pictures, accelerator, "explaining"):
        photo = read_photo(path)
        for x, y in args.pixel or ():
            if not (0 <= x < photo.width and 0 <= y < photo.height):
                size = f"{photo.width}x{photo.height}"
                raise InputError(f"--pixel {x} {y}: {path} is {size}: expected X and Y inside, counted from 0")
        explanation = explain(model, to_tensor(photo), accelerator, look.keywords["amp"])
        prefix, pixels = str(args.explain / path.stem), args.pixel or ()
        written = save_explanation(prefix, np.asarray(photo), explanation, table, pixels, label_of(path, table))
    if accelerator.is_main:
        print(f"{len(pictures)} pictures explained, {len(written)} figures each, as {written[0]} and so on")


def export_split(
    model: OCRNet, table: ClassTable, args: argparse.Namespace, accelerator: Accelerator, look: Look
) -> None:
    """Label ids, one PNG a photo, of its size and under its name: what the test server takes."""
    photos = find_photos(args.data, args.split)
    label_ids = np.array(table.ids, np.uint8)  # train id -> label id
    args.export.mkdir(parents=True, exist_ok=True)
    for path in my_share(photos, accelerator, "exporting"):
        classes = predict_classes(model, read_photo(path), accelerator, look)
        save_png(label_ids[classes], args.export / path.name)
    if accelerator.is_main:
        print(f"{len(photos)} pictures of label ids in {args.export}")


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(args.device)
    look = partial(
        predict,
        amp=accelerator.kind.amp if args.amp is None else args.amp,
        scales=args.scales,
        flip=args.flip,
        slide=args.slide,
        stride=args.stride,
    )
    model, table = load_model(args.ckpt)
    table = table or read_classes(args.data)
    if model.config["num_classes"] != len(table):
        raise InputError(
            f"--ckpt {args.ckpt}: a model of {model.config['num_classes']} classes whose names are not in the file: "
            f"expected {len(table)}, or --data DIR with a classes.json of as many"
        )
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    tasks = [task for task, asked in ((colour_pictures, args.save), (explain_pictures, args.explain)) if asked]
    for task in tasks or [export_split if args.export else score_split]:
        task(model, table, args, accelerator, look)
    accelerator.close()


if __name__ == "__main__":
    run_script(main)
