"""The plain layout: images, labels and classes.json, without renaming."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import ExifTags, Image

from ocrnet.data.classes import CITYSCAPES
from ocrnet.data.layout import find_images, find_sample, find_samples, has_labels
from ocrnet.data.packed import packed_path
from ocrnet.data.train_ids import check_samples, train_ids_from_colors, write_missing_train_ids
from ocrnet.errors import InputError

ROWS = [
    {"name": "ground", "id": 0, "train_id": 0, "color": [10, 20, 30]},
    {"name": "crack", "id": 255, "train_id": 1, "color": [255, 255, 255]},
    {"name": "tape", "id": 1, "train_id": 1, "color": [200, 0, 0]},
    {"name": "edge", "id": 7, "train_id": 255, "color": [10, 20, 30]},
]
LABEL = [[0, 1, 1, 0], [1, 1, 0, 0]]  # train ids


def save(path, pixels, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def write_classes(root, rows=ROWS):
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.json").write_text(json.dumps(rows))


@pytest.fixture
def root(tmp_path):
    """A training image per kind of label, and a validation image."""
    write_classes(tmp_path)
    label, image = np.array(LABEL), np.zeros((2, 4, 3))
    colors = np.array([row["color"] for row in ROWS])
    save(tmp_path / "images/train/a.jpg", image)
    save(tmp_path / "labels/train/a.png", 255 * label)
    save(tmp_path / "images/train/day/1/a.PNG", image)
    save(tmp_path / "labels/train/day/1/a.png", 255 * label, "1")  # read as 0 and 1, as its bits
    save(tmp_path / "images/train/day/b.c.JPEG", image)
    save(tmp_path / "labels/train/day/b.c.png", colors[label])
    save(tmp_path / "images/train/day/d.png", image)
    save(tmp_path / "labels/train/day/d.png", colors[2 * label], "RGBA")
    save(tmp_path / "images/val/a.jpg", image)
    save(tmp_path / "labels/val/a.png", label)
    (tmp_path / "images/train/._a.jpg").write_bytes(b"what macOS leaves beside a file")
    return tmp_path


def test_ids_bits_and_colors_become_train_ids(root):
    write_missing_train_ids(root, workers=1)
    samples = find_samples(root, "train")
    assert [str(image.relative_to(root / "images/train")) for image, _ in samples] == [
        "a.jpg", "day/1/a.PNG", "day/b.c.JPEG", "day/d.png",
    ]  # fmt: skip
    for image, label in [*samples, *find_samples(root, "val")]:
        assert np.asarray(Image.open(label)).tolist() == LABEL
        assert find_sample(image) == ((image, label), root)
    assert check_samples(samples, 2, quiet=True).tolist() == [[4, 4, 0]] * 4
    label.unlink()
    assert find_sample(image) is None


def test_prepare_counts_the_plain_layout_and_writes_only_what_is_missing(main, root, capsys):
    save(root / "images/test/a.jpg", np.zeros((2, 4, 3)))
    (root / "train_ids/train").mkdir(parents=True)
    (root / "train_ids/train/a.png.part12").write_bytes(b"left by a killed process")
    main("prepare_cityscapes.py", "--data-path", root, "--pack", "--workers", 1)
    printed = capsys.readouterr().out
    assert re.findall(r"^(\w+): (\d+) images", printed, re.MULTILINE) == [("test", "1"), ("train", "4"), ("val", "1")]
    assert re.search(r"^crack +50\.000% +50\.000%$", printed, re.MULTILINE)
    assert len(list(root.rglob("*.npy"))) == 8 and not list(root.rglob("*.part*"))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    main("prepare_cityscapes.py", "--data-path", root, "--pack", "--workers", 1)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_class_without_training_pixels_is_noted(main, root, capsys):
    write_classes(root, [{**row, "id": 2} if row["id"] == 255 else row for row in ROWS])
    (root / "labels/train/day/d.png").unlink()
    (root / "images/train/day/d.png").unlink()
    for name in ("day/1/a.png", "day/b.c.png"):
        save(root / "labels/train" / name, np.zeros((2, 4)))
    main("prepare_cityscapes.py", "--data-path", root, "--workers", 1)
    assert re.search("^NOTE: .*crack", capsys.readouterr().out, re.MULTILINE)


def test_a_model_of_the_plain_layout_is_trained_scored_exported_and_explained(main, root, tmp_path, capsys):
    write_missing_train_ids(root, workers=1)
    flags = ["--data-path", root, "--device", "cpu", "--workers", 0]
    run = tmp_path / "run"
    train = ["--crop-size", 32, 32, "--max-iters", 1, "--batch-size", 2, "--output-dir", run]
    main("train.py", *flags, "--model", "tiny", *train)
    evaluate = ["--ckpt", run / "last.pt", *flags]
    main("evaluate.py", *evaluate, "--split", "train", "--export", tmp_path / "ids")
    assert sorted(str(path.relative_to(tmp_path / "ids")) for path in (tmp_path / "ids").rglob("*.png")) == [
        "a.png", "day/1/a.png", "day/b.c.png", "day/d.png",
    ]  # fmt: skip
    assert set(np.unique(Image.open(tmp_path / "ids/day/d.png"))) <= {0, 255}  # the ids of the classes
    capsys.readouterr()
    main("evaluate.py", *evaluate)
    assert re.search(r"^mIoU .* of 2 classes$", capsys.readouterr().out, re.MULTILINE)
    main("evaluate.py", *evaluate[:2], "--images", root / "images/val", "--explain", tmp_path / "steps")
    assert any("error" in path.name for path in (tmp_path / "steps").iterdir())  # needs the label
    with pytest.raises(InputError, match="^--split test: "):
        main("evaluate.py", *evaluate, "--split", "test")


def test_a_rotated_image_is_compared_upright(root):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter turn
    save(root / "images/train/a.jpg", np.zeros((4, 2, 3)), exif=exif)
    write_missing_train_ids(root, workers=1)
    assert check_samples(find_samples(root, "train")[:1], 2, quiet=True).tolist() == [[4, 4, 0]]


def test_a_changed_label_is_converted_again(root):
    write_missing_train_ids(root, workers=1)
    annotation = save(root / "labels/train/a.png", np.zeros((2, 4)))
    later = time.time() + 10
    os.utime(annotation, (later, later))
    write_missing_train_ids(root, workers=1)
    assert np.asarray(Image.open(root / "train_ids/train/a.png")).tolist() == [[0] * 4] * 2


def test_preparing_leaves_the_users_files(main, root):
    archive, photos = root / "labels.zip", root / "images/photos.zip.part1"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("labels/train/a.png", b"an older label")
    photos.write_bytes(b"part of the user's archive")
    before = (root / "labels/train/a.png").read_bytes()
    main("prepare_cityscapes.py", "--data-path", root, "--workers", 1)
    assert (root / "labels/train/a.png").read_bytes() == before and photos.exists()


def test_hidden_files_and_folders_are_no_images_and_a_test_split_may_be_empty(main, root, capsys):
    for name in (".thumbnails/x.jpg", "train/.ipynb_checkpoints/a-checkpoint.jpg", "test/.keep"):
        save(root / "images" / f"{name}.png", np.zeros((2, 4, 3)))
    main("prepare_cityscapes.py", "--data-path", root, "--workers", 1)
    counted = re.findall(r"^(\w+): (\d+) images", capsys.readouterr().out, re.MULTILINE)
    assert counted == [("test", "0"), ("train", "4"), ("val", "1")]


def test_cityscapes_names_in_the_plain_layout_have_labels_of_test(root):
    assert not has_labels(root, "test", CITYSCAPES)
    (root / "labels/test").mkdir()
    assert has_labels(root, "test", CITYSCAPES)


def test_packed_copies_of_other_formats_have_names_of_their_own():
    assert packed_path(Path("a/b.png")) == Path("a/b.npy") and packed_path(Path("a/b.jpg")) == Path("a/b.jpg.npy")


def test_cityscapes_folders_are_preferred(root):
    save(root / "leftImg8bit/train/x/x_leftImg8bit.png", np.zeros((2, 4, 3)))
    assert [image.name for image in find_images(root, "train")] == ["x_leftImg8bit.png"]


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_missing_labels_and_classes_are_named(root):
    (root / "labels/train/day/d.png").unlink()
    write_missing_train_ids(root, workers=1)
    with pytest.raises(InputError) as error:
        find_samples(root, "train")
    assert str(root / "images/train/day/d.png") in str(error.value)
    assert str(root / "labels/train/day/d.png") in str(error.value)
    (root / "classes.json").unlink()
    for use in (write_missing_train_ids, lambda root: find_samples(root, "val")):
        with pytest.raises(InputError, match=f"^{root / 'classes.json'}: "):
            use(root)


def test_images_outside_of_a_split_are_named(root):
    for split in ("train", "val"):
        shutil.rmtree(root / "images" / split)
    save(root / "images/a.jpg", np.zeros((2, 4, 3)))
    with pytest.raises(InputError, match=f"^{root / 'images'}: "):
        write_missing_train_ids(root, workers=1)


def test_two_images_with_one_label_are_refused(root):
    save(root / "images/train/day/d.jpg", np.zeros((2, 4, 3)))
    with pytest.raises(InputError, match=f"^{root}/images/train/day/d.png: .*d.jpg"):
        find_images(root, "train")


def test_unknown_and_ambiguous_colors_are_named(root):
    save(root / "labels/train/a.png", [[[10, 20, 30], [1, 2, 3], [1, 2, 3], [10, 20, 30]]])
    with pytest.raises(InputError, match=rf"^{root}/labels/train/a.png: .*\[1, 2, 3\], 2 pixels"):
        write_missing_train_ids(root, workers=1)
    save(root / "labels/train/a.png", [[[10, 20, 30]] * 4] * 2)
    write_classes(root, [*ROWS[:3], {**ROWS[3], "train_id": 2}])
    with pytest.raises(InputError, match=f"^{root}/labels/train/a.png: .*'ground' and 'edge'"):
        write_missing_train_ids(root, workers=1)


def test_cityscapes_colors_are_read_as_its_classes(tmp_path):
    colors = save(tmp_path / "a.png", [[[153, 153, 153], [0, 0, 142], [0, 0, 0]]])  # pole or polegroup, car or plate
    assert np.asarray(train_ids_from_colors(colors)).tolist() == [[5, 13, 255]]


# ---- the README ------------------------------------------------------------------------------------------------------


def test_the_example_of_the_readme_runs_and_learns(tmp_path):
    section = (ROOT / "README.md").read_text().split("### Your own data")[1].split("\n## ")[0]
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))
    for name in ("train.py", "evaluate.py", "prepare_cityscapes.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    shell = f'set -euo pipefail; python() {{ "{sys.executable}" "$@"; }}\n{commands}'
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"^mIoU ([\d.]+), mean of 2 of 2 classes$", done.stdout, re.MULTILINE)[1]) > 85
    assert len(list((tmp_path / "runs/own/colored").glob("*_legend.png"))) > 1
