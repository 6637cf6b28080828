"""prepare_cityscapes.py: unpacking, train ids, a check of every file, and counts."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import error_of
from PIL import Image
from test_classes import ROWS
from test_datasets import save

import prepare_cityscapes
from ocrnet import InputError
from ocrnet.data.classes import CITYSCAPES, read_classes
from ocrnet.data.datasets import find_samples, read_label
from ocrnet.data.synthetic import write_dataset


@pytest.fixture
def zips(data, tmp_path):
    """The two zips of Cityscapes, with files that training does not use."""
    folder = tmp_path / "zips"
    folder.mkdir()
    for name in ("leftImg8bit", "gtFine"):
        with zipfile.ZipFile(folder / f"{name}_trainvaltest.zip", "w") as archive:
            archive.writestr("../../outside_gtFine_labelIds.png", "unpacked below the root")
            for path in sorted((data / name).rglob("*.png")):
                archive.write(path, path.relative_to(data))
                archive.writestr(f"{path.relative_to(data)}_color.png", b"not used")
    return folder


def test_prepare_unpacks_maps_checks_counts_and_then_finds_nothing_to_do(main, data, zips, tmp_path, capsys):
    root = tmp_path / "cityscapes"
    shutil.copytree(data / "leftImg8bit/val", root / "leftImg8bit/val")  # unpacked before, but
    image = next((root / "leftImg8bit").rglob("*.png"))
    image.write_bytes(image.read_bytes()[:1000])  # only in part
    main("prepare_cityscapes.py", "--data-path", root, "--zips", zips)
    printed, bars = capsys.readouterr()
    files = {path.relative_to(root) for path in root.rglob("*.*")}
    expected = {path.relative_to(data) for path in data.rglob("*.png")}
    train_ids = {path.with_name(path.name.replace("labelIds", "labelTrainIds")) for path in expected}
    assert files == expected | train_ids | {Path("outside_gtFine_labelIds.png")}
    assert all((root / path).read_bytes() == (data / path).read_bytes() for path in expected)
    rows = re.findall(r"^(\w[\w ]*?) +([\d.]+)% +([\d.]+)%$", printed, re.MULTILINE)
    assert [row[0] for row in rows] == CITYSCAPES.names and re.search("^class +train +val$", printed, re.MULTILINE)
    for column, split in ((1, "train"), (2, "val")):
        samples = find_samples(root, split)
        labels = np.stack([read_label(sample.label, CITYSCAPES) for sample in samples])
        written = [sample.label.with_name(sample.label.name.replace("labelIds", "labelTrainIds")) for sample in samples]
        assert np.array_equal([np.array(Image.open(path)) for path in written], labels)
        shares = 100 * np.bincount(labels[labels < 255], minlength=19) / (labels < 255).sum()
        assert [float(row[column]) for row in rows] == pytest.approx(shares.tolist(), abs=6e-4)
        assert re.search(rf"^{split}: {len(samples)} .* {(labels < 255).mean():.1%}", printed, re.MULTILINE)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*/*")}
    main("prepare_cityscapes.py", "--data-path", root, "--zips", zips)
    assert capsys.readouterr().out == printed and not bars
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*/*")}
    (label := find_samples(root, "val")[0].label).write_bytes(b"corrected by hand")
    prepare_cityscapes.unpack(zips / "gtFine_trainvaltest.zip", "_labelIds.png", root)
    assert label.read_bytes() == b"corrected by hand" and str(label) in capsys.readouterr().out


def test_generated_data_is_written_and_only_a_test_split_needs_no_labels(main, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_cityscapes, "write_dataset", lambda root: write_dataset(root, {"train": 1, "val": 1}))
    with pytest.raises(SystemExit, match="2"):
        main("prepare_cityscapes.py", "--synthetic", "--zips", tmp_path)
    assert not list(tmp_path.iterdir())
    main("prepare_cityscapes.py", "--synthetic")
    shutil.move("data/synthetic", "data/cityscapes")
    for split in ("demo", "zoo", "b", "test"):
        image = save(tmp_path / f"data/cityscapes/leftImg8bit/{split}/city/a_leftImg8bit.png", np.zeros((4, 4, 3)))
    save(image.parents[2] / ".hidden/a.png", [[0]])
    save(image.parents[2] / "no split.png", [[0]])
    capsys.readouterr()
    main("prepare_cityscapes.py")
    counted = re.findall(r"^([\w.]+): 1 ", capsys.readouterr().out, re.MULTILINE)
    assert counted == ["b", "demo", "test", "train", "val", "zoo"]
    save(image.parents[2] / "val" / image.name, np.zeros((4, 4, 3)))
    with pytest.raises(InputError, match=f"val/{image.name}: "):
        main("prepare_cityscapes.py")


def test_own_classes_are_checked_and_nothing_is_written(main, tmp_path, capsys):
    rows = [{"name": name, "id": k, "train_id": k, "color": [k, k, k]} for k, name in enumerate("abc")]
    (tmp_path / "classes.json").write_text(json.dumps(rows))
    for split, label in (("train", [0, 0, 0, 2]), ("val", [0, 1, 1, 255])):
        save(tmp_path / f"leftImg8bit/{split}/x_leftImg8bit.png", np.zeros((1, 4, 3)))
        path = save(tmp_path / f"gtFine/{split}/x_gtFine_labelIds.png", [label])
    before = set(tmp_path.rglob("*"))
    main("prepare_cityscapes.py", "--data-path", tmp_path)
    printed = capsys.readouterr().out
    assert " ".join(re.findall(r"([\d.]+)%", printed)) == "100.0 75.0 75.000 33.333 0.000 66.667 25.000 0.000"
    assert re.findall("NOTE: .* ([abc]):", printed) == ["b"]
    save(path, [[3] * 4])
    with pytest.raises(InputError, match=f"^{path}: "):
        main("prepare_cityscapes.py", "--data-path", tmp_path)
    assert set(tmp_path.rglob("*")) == before and capsys.readouterr()
    save(path, [[255] * 4])
    shutil.rmtree(tmp_path / "leftImg8bit/train")
    main("prepare_cityscapes.py", "--data-path", tmp_path)
    printed = capsys.readouterr().out
    assert re.findall(r"([\d.]+)%", printed) == ["0.0", *["0.000"] * 3] and "NOTE" not in printed


def test_without_folders_of_splits_images_are_checked_as_they_are_drawn(main, tmp_path, capsys):
    (tmp_path / "classes.json").write_text(json.dumps(ROWS))
    for path in (tmp_path / folder / f"day/{i}.png" for i in range(13) for folder in ("images", "labels")):
        save(path, np.zeros((2, 4)))
    main("prepare_cityscapes.py", "--data-path", tmp_path)
    assert re.findall(r"^(\w+): (\d+) ", capsys.readouterr().out, re.MULTILINE) == [("train", "11"), ("val", "2")]


GRAY, RED = (9, 9, 9), (200, 9, 9)
FIRST, SECOND, THIRD = map(tuple, CITYSCAPES.palette[:3].tolist())


@pytest.mark.parametrize("labels, shares, expected", [
    ([[0, 0, 7, 255]], ["50", "25", "25"], [(0, FIRST), (7, SECOND), (255, THIRD)]),
    ([[RED, GRAY, RED, RED]], ["75", "25"], [(-1, GRAY), (-1, RED)]),
    ([[1, 1, 1, 0], [(*GRAY, 0)] * 4], ["50", "37", "12"], [(0, FIRST), (1, SECOND), (-1, GRAY)]),
])  # fmt: skip
def test_without_classes_a_file_to_start_from_is_printed(main, tmp_path, capsys, labels, shares, expected):
    for i, label in enumerate(labels):
        for split, pixels in (("train", label), ("val", label[:1] * 4)):
            save(tmp_path / f"images/{split}/{i}.png", np.zeros((1, 4, 3)))
            save(tmp_path / f"labels/{split}/{i}.png", [pixels])
    with pytest.raises(InputError, match=f"^{tmp_path / 'classes.json'}: "):
        main("prepare_cityscapes.py", "--data-path", tmp_path)
    printed, bars = capsys.readouterr()
    assert re.findall(r"(\d+)\.\d+%", printed) == shares and not bars
    (tmp_path / "classes.json").write_text(printed[printed.index("[\n") :])
    table = read_classes(tmp_path)
    assert table.labels == [(f"class {k}", i, k, color) for k, (i, color) in enumerate(expected)]
    main("prepare_cityscapes.py", "--data-path", tmp_path)


def test_at_most_254_classes_are_printed_and_one_bit_needs_a_table_by_hand(main, tmp_path, capsys):
    colors = np.stack([*np.indices((20, 20)), np.zeros((20, 20))], axis=2)
    for mode, found in ((None, "classes.json"), ("1", "labels/train/a.png: .* 1$")):
        for folder in ("images", "labels"):
            save(tmp_path / folder / "train/a.png", colors, mode)
        with pytest.raises(InputError, match=f"^{tmp_path}/{found}"):
            main("prepare_cityscapes.py", "--data-path", tmp_path)
    printed = capsys.readouterr().out
    assert len(json.loads(printed[printed.index("[\n") :])) == 254


@pytest.mark.parametrize("damage", [
    None, lambda x: b"text", lambda x: x[: len(x) // 2], lambda x: x[:9000] + bytes(900) + x[9900:],
    lambda x: re.sub(rb"(PK\x03\x04..|PK\x01\x02....)\0", b"\\1\x01", x, flags=re.DOTALL),  # locked by a password
])  # fmt: skip
def test_an_unusable_zip_is_named(zips, tmp_path, damage):
    path = zips / "gtFine_trainvaltest.zip"
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises((InputError, FileNotFoundError), match=str(path)):
        prepare_cityscapes.unpack(path, "_labelIds.png", tmp_path / "root")


def test_an_empty_folder_is_one_line(script, tmp_path):
    done = script("prepare_cityscapes.py", "--data-path", tmp_path, ok=False)
    assert error_of(done).startswith(f"error: --data-path {tmp_path}: ")
