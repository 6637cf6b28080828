"""Prepare Cityscapes, or check your own data: unpack the zips, write the train ids, read every file, print counts.

    python prepare_cityscapes.py --zips ~/Downloads     unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip
    python prepare_cityscapes.py                        leftImg8bit and gtFine are in data/cityscapes already
    python prepare_cityscapes.py --data-path data/own   images, labels and classes.json are in data/own: a check
    python prepare_cityscapes.py --synthetic            write the generated data set

Only files that are missing or cut off are written, so the script can be interrupted and run again. Training needs the
images and _labelIds.png only; _labelTrainIds.png are for other programs.
"""

import json
import zipfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.concurrent import process_map

from ocrnet import InputError
from ocrnet.data.classes import CITYSCAPES, IGNORE_INDEX, ClassTable, read_classes
from ocrnet.data.datasets import Sample, count_values, find_samples, image_folder, read_sample, split_folder
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
    splits = sorted(path.name for path in image_folder(root).glob("[!.]*") if path.is_dir()) or ["train"]
    if split_folder(root, "train").name == "images":
        splits = ["train", "val"]  # drawn by name
    if image_folder(root).name == "images" and not (root / "classes.json").exists():
        print_starter(find_samples(root, "train"))
    table, shares = read_classes(root), {}
    for split in splits:
        try:
            samples = find_samples(root, split)
        except InputError as error:
            if split in ("train", "val"):
                raise
            print(f"{split}: left out ({error})")
            continue
        check_one = partial(check_sample, table=table, convert=table is CITYSCAPES)
        counts = sum(process_map(check_one, samples, chunksize=8, desc=split, disable=None))
        labeled = counts[:IGNORE_INDEX].sum()
        shares[split] = counts / max(labeled, 1)
        print(f"{split}: {len(samples)} images, {labeled / counts.sum():.1%} of their pixels labeled")
    width = max(map(len, ("class", *table.names))) + 2
    print(f"\n{'class':{width}}" + "".join(f"{split:>9}" for split in shares))
    for k, name in enumerate(table.names):
        print(f"{name:{width}}" + "".join(f"{share[k]:9.3%}" for share in shares.values()))
        if "train" in shares and not shares["train"][k]:
            print(f"NOTE: no training pixel is {name}: are ids and colors those of the labels?")


def unpack(path: Path, ending: str, root: Path) -> None:
    """Extract the files whose name ends with ``ending`` that are missing or cut off. Others, as corrected labels, stay.

    Raise InputError if ``path`` is not a zip, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(ending)]
            for entry in tqdm(entries, desc=path.name, disable=None):
                target = root.joinpath(*(x for x in Path(entry.filename).parts if x.strip("/") not in ("", "..")))
                old = target.stat().st_size if target.exists() else 0
                content = archive.read(entry) if old < entry.file_size else b""
                if content and (not old or content.startswith(target.read_bytes())):
                    with atomic_write(target) as part:
                        part.write_bytes(content)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: a password
        raise InputError(f"{path}: expected a zip, found another or a damaged file ({error})") from None


def print_starter(samples: Sequence[Sample]) -> None:
    """Print the values or colors of labels, with their shares, and a classes.json that has them."""
    counts, rows = count_values(samples), []
    common = counts.most_common(254)
    for value, count in common:
        print(f"{count / counts.total():8.3%} of the pixels are {value}")
    for k, value in enumerate(sorted((value for value, _ in common), key=lambda x: (isinstance(x, tuple), x))):
        key, color = (-1, value) if isinstance(value, tuple) else (value, CITYSCAPES.palette[k % 19].tolist())
        rows.append({"name": f"class {k}", "id": key, "train_id": k, "color": color})
    print("[\n    " + ",\n    ".join(map(json.dumps, rows)) + "\n]")


def check_sample(sample: Sample, table: ClassTable, convert: bool) -> np.ndarray:
    """Return the pixels of each train id, int64 (256,). With ``convert`` write the missing ``_labelTrainIds.png``."""
    _, label = read_sample(sample, table)
    target = sample.label.with_name(sample.label.name.replace("_labelIds", "_labelTrainIds"))
    if convert and not target.exists():
        with atomic_write(target) as part:
            Image.fromarray(label).save(part, format="PNG")
    return np.bincount(label.ravel(), minlength=IGNORE_INDEX + 1)


if __name__ == "__main__":
    run_script(main)
