"""prepare_cityscapes.py: unpacking, train ids, a check of every file, and counts."""

import json
import re
import shutil
import zipfile

import numpy as np
import pytest
from conftest import error_of
from PIL import Image

import prepare_cityscapes
from ocrnet import InputError
from ocrnet.data.classes import CITYSCAPES
from ocrnet.data.datasets import find_samples, read_label
from ocrnet.data.synthetic import write_dataset
from prepare_cityscapes import unpack


@pytest.fixture
def zips(data, tmp_path):
    """The two zips of Cityscapes, with files that training does not use."""
    folder = tmp_path / "zips"
    folder.mkdir()
    for name in ("leftImg8bit", "gtFine"):
        with zipfile.ZipFile(folder / f"{name}_trainvaltest.zip", "w") as archive:
            archive.writestr("license.txt", "text")
            for path in sorted((data / name).rglob("*.png")):
                archive.write(path, path.relative_to(data))
                archive.writestr(f"{path.relative_to(data)}_color.png", b"not used")
    return folder


def test_prepare_unpacks_maps_checks_counts_and_then_finds_nothing_to_do(script, main, data, zips, tmp_path, capsys):
    root = tmp_path / "cityscapes"
    shutil.copytree(data / "leftImg8bit/val", root / "leftImg8bit/val")  # unpacked before, but
    image = next((root / "leftImg8bit").rglob("*.png"))
    image.write_bytes(image.read_bytes()[:1000])  # only in part
    done = script("prepare_cityscapes.py", "--data-path", root, "--zips", zips)
    files = {path.relative_to(root) for path in root.rglob("*.*")}
    expected = {path.relative_to(data) for path in data.rglob("*.png")}
    train_ids = {path.with_name(path.name.replace("labelIds", "labelTrainIds")) for path in expected}
    assert files == expected | train_ids
    for path in expected:
        assert (root / path).read_bytes() == (data / path).read_bytes()
    for sample in find_samples(root, "train"):
        written = sample.label.with_name(sample.label.name.replace("labelIds", "labelTrainIds"))
        assert np.array_equal(Image.open(written), read_label(sample.label, CITYSCAPES))
    assert re.search(r"train: 6 .* 9\d\.\d%", done.stdout) and re.search(r"val: 5 .* 9\d\.\d%", done.stdout)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    main("prepare_cityscapes.py", "--data-path", root, "--zips", zips)
    assert capsys.readouterr().out == done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_the_shares_of_the_classes_are_those_of_the_labels(main, data, capsys, monkeypatch, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    main("prepare_cityscapes.py", "--data-path", tmp_path)
    rows = re.findall(r"^(\w[\w ]*?) +([\d.]+)% +([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 19
    for column, split in ((1, "train"), (2, "val")):
        labels = [read_label(sample.label, CITYSCAPES).ravel() for sample in find_samples(data, split)]
        counts = np.bincount(np.concatenate(labels), minlength=256)[:19]
        assert [float(row[column]) for row in rows] == pytest.approx(list(100 * counts / counts.sum()), abs=6e-4)


def test_generated_data_is_written_and_a_test_split_needs_no_labels(main, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_cityscapes, "write_dataset", lambda root: write_dataset(root, {"train": 1, "val": 1}))
    root = tmp_path / "new"
    main("prepare_cityscapes.py", "--synthetic", "--data-path", root)
    image = root / "leftImg8bit/test/city/a_leftImg8bit.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(image)
    capsys.readouterr()
    main("prepare_cityscapes.py", "--data-path", root)
    counted = re.findall(r"^(\w+): (\d+) ", capsys.readouterr().out, re.MULTILINE)
    assert counted == [("test", "1"), ("train", "1"), ("val", "1")]


def test_own_classes_are_checked_and_nothing_is_written(main, data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    rows = [{"name": name, "id": k, "train_id": k, "color": [k, k, k]} for k, name in enumerate("ab")]
    (tmp_path / "classes.json").write_text(json.dumps(rows))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=f"^{tmp_path}/gtFine/train/.*_labelIds.png: "):
        main("prepare_cityscapes.py", "--data-path", tmp_path)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["values", "colors"])
def test_without_classes_the_values_are_counted_and_a_file_to_start_from_is_printed(main, tmp_path, capsys, kind):
    label = np.array([[0, 0, 7, 255]], np.uint8)
    label = label if kind == "values" else np.stack([label, label // 2, label], axis=-1)
    for folder, pixels in (("images", np.zeros((1, 4, 3), np.uint8)), ("labels", label)):
        for split in ("train", "val"):
            (tmp_path / folder / split).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / folder / split / "a.png")
    with pytest.raises(InputError, match=f"^{tmp_path / 'classes.json'}: "):
        main("prepare_cityscapes.py", "--data-path", tmp_path)
    printed = capsys.readouterr().out
    assert re.findall(r"(\d+)\.\d+%", printed) == ["50", "25", "25"]
    (tmp_path / "classes.json").write_text(printed[printed.index("[\n") :])
    main("prepare_cityscapes.py", "--data-path", tmp_path)
    assert len(re.findall(r" (50|25)\.\d+%", capsys.readouterr().out)) == 6


def test_labels_of_one_bit_need_a_table_by_hand_and_hidden_folders_are_left_out(main, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/leftImg8bit/.cache").mkdir()
    main("prepare_cityscapes.py", "--data-path", tmp_path / "data")
    for folder, mode in (("images", "RGB"), ("labels", "1")):
        (tmp_path / folder / "train").mkdir(parents=True)
        Image.new(mode, (4, 4)).save(tmp_path / folder / "train/a.png")
    with pytest.raises(InputError, match=f"^{tmp_path}/labels/train/a.png: .* 1$"):
        main("prepare_cityscapes.py", "--data-path", tmp_path)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["absent", "text", "truncated", "flipped"])
def test_an_unusable_zip_is_named(zips, tmp_path, damage):
    path = zips / "gtFine_trainvaltest.zip"
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes(255 - b for b in content[middle : middle + 900]) + content[middle + 900 :]
    path.write_bytes({"text": b"text", "truncated": content[:middle], "flipped": flipped}.get(damage, content))
    if damage == "absent":
        path.unlink()
    with pytest.raises((InputError, FileNotFoundError), match=str(path)):
        unpack(path, "_labelIds.png", tmp_path / "root")


def test_entries_stay_below_the_root(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        for name in ("../x_labelIds.png", "/x_labelIds.png", "gtFine/../../x_labelIds.png"):
            archive.writestr(name, "outside")
    unpack(tmp_path / "bad.zip", "_labelIds.png", tmp_path / "deep/root")
    assert all((tmp_path / "deep/root") in path.parents for path in tmp_path.rglob("*.png"))


def test_an_empty_folder_is_one_line(script, tmp_path):
    done = script("prepare_cityscapes.py", "--data-path", tmp_path, ok=False)
    assert error_of(done).startswith(f"error: --data-path {tmp_path}: ")
