"""Prepare Cityscapes or your own data: unpack the zips, write the train ids, print counts.

    python prepare_cityscapes.py                        zips, or leftImg8bit and gtFine, are in data/cityscapes
    python prepare_cityscapes.py --data-path data/own   images, labels and classes.json are in data/own
    python prepare_cityscapes.py --zips ~/Downloads     the zips are elsewhere
    python prepare_cityscapes.py --pack                 also write packed copies of train, which load faster
    python prepare_cityscapes.py --synthetic            write the generated data set instead

Only missing or outdated files are written, so the script can be interrupted and run again.
"""

import argparse
import os
import shutil
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from ocrnet.data.classes import read_classes
from ocrnet.data.layout import PLAIN_LAYOUT, find_layout, find_samples, find_splits, has_labels, list_images
from ocrnet.data.packed import pack_samples, packed_path
from ocrnet.data.synthetic import write_dataset
from ocrnet.data.train_ids import check_samples, write_missing_train_ids
from ocrnet.errors import InputError
from ocrnet.files import atomic_write, remove_partial_files
from ocrnet.script import make_parser, run_script

MAX_COMPRESSION = 200  # files of Cityscapes compress by at most about 10


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--data-path", type=Path, metavar="DIR", help="default: data/cityscapes or data/synthetic")
    parser.add_argument("--zips", type=Path, metavar="DIR", help="folder of the downloaded *.zip; default: --data-path")
    parser.add_argument("--synthetic", action="store_true", help="write the generated data set")
    parser.add_argument("--pack", action="store_true", help="write packed copies of train: 8.4 MB per image")
    parser.add_argument("--workers", type=int, metavar="N", default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    args.data_path = args.data_path or Path("data/synthetic" if args.synthetic else "data/cityscapes")
    return args


def is_unpacked(entry: zipfile.ZipInfo, root: Path) -> bool:
    target = root / entry.filename
    return target.exists() and target.stat().st_size == entry.file_size


def unpack(archive_path: Path, root: Path) -> None:
    """Extract the missing files, each atomically.

    Raises:
        InputError: the file is not a zip or is damaged, or, before anything is written, an entry lies outside the root,
            the disk has too little space, or the compression is implausible.
    """
    try:
        with zipfile.ZipFile(archive_path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            for entry in entries:
                if not (root / entry.filename).resolve().is_relative_to(root.resolve()):
                    raise InputError(f"{archive_path}: expected entries inside {root}, found {entry.filename!r}")
            root.mkdir(parents=True, exist_ok=True)
            unpacked, packed = sum(entry.file_size for entry in entries), archive_path.stat().st_size
            if unpacked > MAX_COMPRESSION * packed + 2**20:
                raise InputError(f"{archive_path}: found {unpacked:,} bytes in a zip of {packed:,}: this is a zip bomb")
            missing = [entry for entry in entries if not is_unpacked(entry, root)]
            needed, free = sum(entry.file_size for entry in missing), shutil.disk_usage(root).free
            if needed > free:
                raise InputError(f"{archive_path}: needs {needed:,} bytes in {root}, found {free:,} free: make room")
            for entry in tqdm(missing, desc=archive_path.name, disable=None):
                target = root / entry.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(target) as part, archive.open(entry) as source, open(part, "wb") as file:
                    shutil.copyfileobj(source, file)
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:  # RuntimeError: a password
        raise InputError(f"{archive_path}: expected a zip, found another or a damaged file ({error})") from None


def print_summary(root: Path) -> None:
    """Images per split, and each class's share of the labeled pixels."""
    table, shares = read_classes(root), {}
    for split in find_splits(root):
        if not has_labels(root, split, table):
            print(f"{split}: {len(list_images(root, split))} images without public labels")
            continue
        samples = find_samples(root, split)
        counts = check_samples(samples, len(table)).sum(0)
        print(f"{split}: {len(samples)} images, {counts[:-1].sum() / counts.sum():.1%} of their pixels labeled")
        shares[split] = counts[:-1] / max(counts[:-1].sum(), 1)
    width = max(map(len, ("class", *table.names))) + 2
    print(f"\n{'class':{width}}" + "".join(f"{split:>9}" for split in shares))
    for k, name in enumerate(table.names):
        print(f"{name:{width}}" + "".join(f"{share[k]:9.3%}" for share in shares.values()))
    absent = [name for k, name in enumerate(table.names) if "train" in shares and not shares["train"][k]]
    if absent:
        print(f"\nNOTE: no training pixel is {', '.join(absent)}. Are ids and colors those of the labels?")


def main() -> None:
    args = parse_args()
    root, zips = args.data_path, args.zips or args.data_path
    if args.synthetic:
        write_dataset(root, workers=args.workers)
    archives = sorted(zips.glob("*.zip")) if args.zips or find_layout(root) is not PLAIN_LAYOUT else []
    if args.zips and not archives:
        raise InputError(
            f"--zips {zips}: expected leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, found no zip"
        )
    for archive in archives:
        unpack(archive, root)
    layout = find_layout(root)
    if not (root / layout.images).is_dir():
        raise InputError(
            f"--data-path {root}: expected a folder leftImg8bit or images, or leftImg8bit_trainvaltest.zip and "
            f"gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com; or use --synthetic"
        )
    remove_partial_files((root / layout.label[0]).rglob("*.part*"))
    pattern = "*.npy.part*" if layout is PLAIN_LAYOUT else "*.part*"  # images may be the user's own files
    remove_partial_files((root / layout.images).rglob(pattern))
    write_missing_train_ids(root, args.workers)
    print_summary(root)
    if args.pack:
        samples = find_samples(root, "train")
        pack_samples(samples, args.workers)
        size = sum(packed_path(path).stat().st_size for sample in samples for path in sample)
        print(f"\npacked: {len(samples)} training images and labels, {size / 1e9:.1f} GB of .npy")


if __name__ == "__main__":
    run_script(main)
