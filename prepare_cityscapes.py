"""Prepare Cityscapes, or check your own data: unpack the zips, write the train ids, read every file, print counts.

    python prepare_cityscapes.py --zips ~/Downloads     unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip
    python prepare_cityscapes.py                        leftImg8bit and gtFine are in data/cityscapes already
    python prepare_cityscapes.py --data-path data/own   images, labels and classes.json are in data/own: a check
    python prepare_cityscapes.py --synthetic            write the generated data set

Only missing files are written, and those that were cut off while they were unpacked, so the script can be interrupted
and run again. Training needs the images and
_labelIds.png only; _labelTrainIds.png are for other programs.
"""

import json
import zipfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.concurrent import process_map

from ocrnet import InputError
from ocrnet.data.classes import CITYSCAPES, ClassTable, read_classes
from ocrnet.data.datasets import (
    Sample,
    count_pixels,
    find_images,
    find_samples,
    image_folder,
    label_paths,
    open_image,
    read_sample,
    split_folder,
)
from ocrnet.data.synthetic import write_dataset
from ocrnet.files import atomic_write
from ocrnet.script import make_parser, run_script

ZIPS = {"leftImg8bit_trainvaltest.zip": "_leftImg8bit.png", "gtFine_trainvaltest.zip": "_gtFine_labelIds.png"}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data-path", type=Path, metavar="DIR", help="None: data/cityscapes or data/synthetic")
    parser.add_argument("--zips", type=Path, metavar="DIR", help="folder of the two downloaded zips")
    parser.add_argument("--synthetic", action="store_true", help="write the generated data set")
    args = parser.parse_args()
    if args.synthetic and args.zips:
        parser.error("--synthetic: needs no zips: leave out --zips")
    root = args.data_path or Path("data/synthetic" if args.synthetic else "data/cityscapes")
    if args.synthetic:
        write_dataset(root)
    for name, ending in ZIPS.items() if args.zips else ():
        unpack(args.zips / name, ending, root)
    splits = sorted(path.name for path in image_folder(root).glob("[!.]*") if path.is_dir())
    if split_folder(root, "train").name == "images":
        splits = ["train", "val"]  # drawn by name
    if not splits:
        raise InputError(
            f"--data-path {root}: expected a folder leftImg8bit or images with folders train and val; Cityscapes' zips "
            f"are at https://www.cityscapes-dataset.com, and --synthetic needs none"
        )
    if image_folder(root).name == "images" and not (root / "classes.json").exists():
        print_starter(root)
        raise InputError(f"{root / 'classes.json'}: expected the classes: name those above, and save them there")
    table, shares = read_classes(root), {}
    for split in splits:
        try:
            samples = find_samples(root, split)
        except InputError:
            if split in ("train", "val"):
                raise
            print(f"{split}: {len(find_images(root, split))} images without labels")
            continue
        check_one = partial(check_sample, table=table, convert=table is CITYSCAPES)
        counts = sum(process_map(check_one, samples, chunksize=8, desc=split, disable=None))
        shares[split] = counts[:-1] / max(counts[:-1].sum(), 1)
        print(f"{split}: {len(samples)} images, {counts[:-1].sum() / counts.sum():.1%} of their pixels labeled")
    width = max(map(len, ("class", *table.names))) + 2
    print(f"\n{'class':{width}}" + "".join(f"{split:>9}" for split in shares))
    for k, name in enumerate(table.names):
        print(f"{name:{width}}" + "".join(f"{share[k]:9.3%}" for share in shares.values()))
        if "train" in shares and not shares["train"][k]:
            print(f"NOTE: no training pixel is {name}: are ids and colors those of the labels?")


def unpack(path: Path, ending: str, root: Path) -> None:
    """Extract the files whose name ends with ``ending``, unless they are there. Those that were cut off are completed.

    Raises:
        InputError: the file is missing, is not a zip, or is damaged.
    """
    changed = []
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(ending)]
            for entry in tqdm(entries, desc=path.name, disable=None):
                target = root.joinpath(
                    *(part for part in Path(entry.filename).parts if part.strip("/") not in ("", ".."))
                )
                if not target.exists() or target.stat().st_size != entry.file_size:
                    content = archive.read(entry)
                    if target.exists() and not content.startswith(target.read_bytes()):
                        changed.append(target)  # by the user
                    else:
                        with atomic_write(target) as part:
                            part.write_bytes(content)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: a password
        raise InputError(f"{path}: expected a zip, found another or a damaged file ({error})") from None
    if changed:
        print(f"NOTE: {len(changed)} files differ from those in {path}, and stay: {changed[0]} and so on")


def print_starter(root: Path) -> None:
    """Print the values or colors of the training labels, with their shares, and a classes.json that has them."""
    counts: Counter = Counter()
    for image in tqdm(find_images(root, "train"), desc="values", disable=None):
        path = label_paths(image, root)[0]
        label = open_image(path)
        label = label.convert("RGB") if label.mode == "RGBA" else label
        if label.mode not in ("L", "P", "RGB"):
            raise InputError(f"{path}: expected a label of one 8-bit channel, or RGB, found mode {label.mode}")
        counts.update({value: count for count, value in label.getcolors(label.width * label.height)})
    common = dict(counts.most_common(254))
    for value, count in common.items():
        print(f"{count / counts.total():8.3%} of the pixels are {value}")
    rows = []
    for k, value in enumerate(sorted(common, key=lambda x: (isinstance(x, tuple), x))):
        is_color = isinstance(value, tuple)
        color = value if is_color else CITYSCAPES.palette[k % len(CITYSCAPES)].tolist()
        rows.append({"name": f"class {k}", "id": -1 if is_color else value, "train_id": k, "color": color})
    print("[\n    " + ",\n    ".join(map(json.dumps, rows)) + "\n]")


def check_sample(sample: Sample, table: ClassTable, convert: bool) -> np.ndarray:
    """Read image and label. Return the pixels of each class, the ignored ones last, int64 (K + 1,).

    With ``convert`` also write the missing ``_labelTrainIds.png``, as cityscapesScripts' createTrainIdLabelImgs does.
    """
    _, label = read_sample(sample, table)
    target = sample.label.with_name(sample.label.name.replace("_labelIds", "_labelTrainIds"))
    if convert and not target.exists():
        with atomic_write(target) as part:
            Image.fromarray(label).save(part, format="PNG")
    return count_pixels(label, len(table))


if __name__ == "__main__":
    run_script(main)
