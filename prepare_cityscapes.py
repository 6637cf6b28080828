"""Make Cityscapes ready for training: unpack the zips, write the train ids, say what is there.

    python prepare_cityscapes.py                        data/cityscapes holds the zips, or leftImg8bit and gtFine
    python prepare_cityscapes.py --zips ~/Downloads     the zips are elsewhere
    python prepare_cityscapes.py --pack                 also keep copies of train that training reads faster
    python prepare_cityscapes.py --synthetic            write the generated data set instead

Only what is missing is done, so it can be interrupted and run again.
"""

import argparse
import os
import shutil
import zipfile
import zlib
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ocrnet.data.cityscapes import (
    check_samples,
    find_samples,
    pack_samples,
    packed_path,
    remove_unfinished,
    write_missing_train_ids,
    write_whole,
)
from ocrnet.data.classes import read_classes
from ocrnet.data.synthetic import write_dataset
from ocrnet.errors import InputError, run_script


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=27, width=100),
    )
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="the data set's folder (default: data/cityscapes or data/synthetic)"
    )
    parser.add_argument("--zips", type=Path, metavar="DIR", help="folder with the downloaded *.zip (default: the root)")
    parser.add_argument("--synthetic", action="store_true", help="write the generated data set")
    parser.add_argument("--pack", action="store_true", help="copy train uncompressed beside it: 8.4 MB a picture")
    parser.add_argument(
        "--workers", type=int, metavar="N", default=os.cpu_count(), help="processes (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.root is None:
        args.root = Path("data/synthetic" if args.synthetic else "data/cityscapes")
    return args


MOST_SHRUNK = 200  # times that a zip makes anything here smaller: photos by 1, polygons by about 10


def is_unpacked(entry: zipfile.ZipInfo, root: Path) -> bool:
    target = root / entry.filename
    return target.exists() and target.stat().st_size == entry.file_size


def unpack(archive_path: Path, root: Path) -> None:
    """Extract what is not there yet, each file whole or not at all.

    Raises:
        InputError: it is no zip, is damaged, or (and nothing is written then) an entry would land outside the root,
            or it would unpack to more than the disk has room for or than honest files shrink to.
    """
    try:
        with zipfile.ZipFile(archive_path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            for entry in entries:
                if not (root / entry.filename).resolve().is_relative_to(root.resolve()):
                    raise InputError(
                        f"{archive_path}: entry {entry.filename!r} would land outside {root}: nothing was unpacked"
                    )
            root.mkdir(parents=True, exist_ok=True)
            unpacked, packed = sum(entry.file_size for entry in entries), archive_path.stat().st_size
            if unpacked > MOST_SHRUNK * packed + 2**20:
                raise InputError(
                    f"{archive_path}: {unpacked:,} bytes in a file of {packed:,}: this is a zip bomb, not the data set"
                )
            missing = [entry for entry in entries if not is_unpacked(entry, root)]
            needed, free = sum(entry.file_size for entry in missing), shutil.disk_usage(root).free
            if needed > free:
                raise InputError(
                    f"{archive_path}: needs {needed:,} bytes in {root}, where {free:,} are free: make room"
                )
            for entry in tqdm(missing, desc=archive_path.name, disable=None):
                target = root / entry.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with write_whole(target) as part, archive.open(entry) as source, open(part, "wb") as file:
                    shutil.copyfileobj(source, file)
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:  # RuntimeError: a password
        raise InputError(f"{archive_path}: not a zip, or a damaged one ({error}): download it again") from None


def print_summary(root: Path) -> None:
    """Pictures a split, and each class's share of the labelled pixels."""
    table, shares = read_classes(root), {}
    for split in sorted(path.name for path in (root / "leftImg8bit").iterdir() if path.is_dir()):
        if split == "test":  # its labels are dummies
            photos = len(list((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png")))
            print(f"{split}: {photos} pictures, whose labels are not public")
            continue
        samples = find_samples(root, split)
        counts = check_samples(samples, len(table)).sum(0)
        print(f"{split}: {len(samples)} pictures, {counts[:-1].sum() / counts.sum():.1%} of their pixels labelled")
        shares[split] = counts[:-1] / max(counts[:-1].sum(), 1)
    width = max(map(len, ("class", *table.names))) + 2
    print(f"\n{'class':{width}}" + "".join(f"{split:>9}" for split in shares))
    for k, name in enumerate(table.names):
        print(f"{name:{width}}" + "".join(f"{share[k]:9.3%}" for share in shares.values()))


def main() -> None:
    args = parse_args()
    if args.synthetic:
        write_dataset(args.root, workers=args.workers)
    zips = args.zips or args.root
    if args.zips and not args.zips.is_dir():
        raise InputError(f"--zips {zips}: no such folder: expected the one that the *.zip were downloaded to")
    archives = sorted(zips.glob("*.zip"))
    if args.zips and not archives:
        raise InputError(f"--zips {zips}: no *.zip there: expected leftImg8bit_trainvaltest.zip and its gtFine")
    for archive in archives:
        unpack(archive, args.root)
    if not (args.root / "leftImg8bit").is_dir():
        raise InputError(
            f"{args.root}: no folder leftImg8bit and no *.zip: expected Cityscapes' leftImg8bit_trainvaltest.zip and "
            f"gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com, or use --synthetic"
        )
    remove_unfinished(path for folder in ("leftImg8bit", "gtFine") for path in (args.root / folder).rglob("*.part*"))
    write_missing_train_ids(args.root, args.workers)
    print_summary(args.root)
    if args.pack:
        samples = find_samples(args.root, "train")
        pack_samples(samples, args.workers)
        size = sum(packed_path(path).stat().st_size for sample in samples for path in sample)
        print(f"\npacked: {len(samples)} training pictures and labels, {size / 1e9:.1f} GB of .npy beside them")


if __name__ == "__main__":
    run_script(main)
