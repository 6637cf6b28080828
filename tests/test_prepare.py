"""prepare_cityscapes.py: unpacking, train ids, counts and packed copies."""

import re
import shutil
import zipfile

import pytest
from conftest import error_of
from PIL import Image

import prepare_cityscapes
from ocrnet.data.synthetic import write_dataset
from ocrnet.errors import InputError
from prepare_cityscapes import unpack


def test_prepare_unpacks_draws_counts_packs_and_then_finds_nothing_to_do(script, main, data, tmp_path, capsys):
    zips, root = tmp_path / "zips", tmp_path / "cityscapes"
    zips.mkdir()
    for folder in ("leftImg8bit", "gtFine"):
        with zipfile.ZipFile(zips / f"{folder}_trainvaltest.zip", "w") as archive:
            for path in sorted((data / folder).rglob("*")):
                if path.is_file() and "labelTrainIds" not in path.name:
                    archive.write(path, path.relative_to(data))
    shutil.copytree(data / "leftImg8bit/val", root / "leftImg8bit/val")  # unpacked before, but
    image = next((root / "leftImg8bit").rglob("*.png"))
    image.write_bytes(image.read_bytes()[:1000])  # not by this script, and only in part
    image.with_name(image.name + ".part123").write_bytes(b"left by a killed process")
    flags = ["--data-path", root, "--zips", zips, "--pack"]

    done = script("prepare_cityscapes.py", *flags)
    for source in data.rglob("*.*"):
        assert (root / source.relative_to(data)).read_bytes() == source.read_bytes()
    assert len(list(root.rglob("*.npy"))) == 12 and not list(root.rglob("*.part*"))
    assert re.search(r"train: 6 .* 9\d\.\d%", done.stdout) and re.search(r"val: 5 .* 9\d\.\d%", done.stdout)
    assert re.search(r"^road +\d+\.\d+% +\d+\.\d+%$", done.stdout, re.MULTILINE)

    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    main("prepare_cityscapes.py", *flags)
    assert capsys.readouterr().out == done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_the_shares_of_the_classes_are_those_of_the_labels(main, data, capsys):
    main("prepare_cityscapes.py", "--data-path", data)
    rows = re.findall(r"^(\w[\w ]*?) +([\d.]+)% +([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 19
    for column, split in ((1, "train"), (2, "val")):
        counts = [0] * 256
        for path in data.glob(f"gtFine/{split}/*/*_labelTrainIds.png"):
            counts = [a + b for a, b in zip(counts, Image.open(path).histogram())]
        shares = [100 * count / sum(counts[:19]) for count in counts[:19]]
        assert [float(row[column]) for row in rows] == pytest.approx(shares, abs=6e-4)


def test_generated_data_is_prepared_and_a_test_split_needs_no_labels(main, tmp_path, monkeypatch, capsys):
    def write_two(root, workers):
        write_dataset(root, {"train": 1, "val": 1}, workers)

    monkeypatch.setattr(prepare_cityscapes, "write_dataset", write_two)
    image = tmp_path / "leftImg8bit/test/city/a_leftImg8bit.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(image)
    main("prepare_cityscapes.py", "--synthetic", "--data-path", tmp_path, "--workers", 1)
    assert len(list(tmp_path.glob("gtFine/*/*/*_labelTrainIds.png"))) == 2
    counted = re.findall(r"^(\w+): (\d+) ", capsys.readouterr().out, re.MULTILINE)
    assert counted == [("test", "1"), ("train", "1"), ("val", "1")]


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_zip_that_leaves_the_root_is_refused_as_a_whole(main, tmp_path):
    for entry in ("../outside.png", str(tmp_path / "absolute_outside.png"), "gtFine/../../outside.png"):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
            archive.writestr("gtFine/fine.txt", "fine")
            archive.writestr(entry, "outside")
        with pytest.raises(InputError, match=f"^{tmp_path / 'bad.zip'}: "):
            unpack(tmp_path / "bad.zip", tmp_path / "root")
        with pytest.raises(InputError, match=f"^{tmp_path / 'bad.zip'}: "):
            main("prepare_cityscapes.py", "--data-path", tmp_path / "root", "--zips", tmp_path)
    assert not list(tmp_path.rglob("*outside.png")) and not list(tmp_path.rglob("fine.txt"))


def write_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("leftImg8bit/bomb.png", b"\0" * 10**8)


def write_truncated(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("leftImg8bit/x.png", b"0123456789" * 100)
    path.write_bytes(path.read_bytes()[:-30])


def write_wrong_checksum(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("leftImg8bit/x.png", b"0123456789" * 100)
    path.write_bytes(path.read_bytes().replace(b"0123456789", b"0123456780"))


def write_encrypted(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("leftImg8bit/x.png", b"0123456789" * 100)
    content = path.read_bytes()  # sets the flag of encryption in both headers of the entry
    content = content.replace(b"PK\x03\x04\x14\0\0", b"PK\x03\x04\x14\0\x01")
    path.write_bytes(content.replace(b"PK\x01\x02\x14\x03\x14\0\0", b"PK\x01\x02\x14\x03\x14\0\x01"))


@pytest.mark.parametrize("write", [write_bomb, write_truncated, write_wrong_checksum, write_encrypted])
def test_a_zip_that_cannot_be_unpacked_is_named_and_leaves_no_file(tmp_path, write):
    write(tmp_path / "bad.zip")
    with pytest.raises(InputError, match=f"^{tmp_path / 'bad.zip'}: "):
        unpack(tmp_path / "bad.zip", tmp_path / "root")
    assert not [path for path in (tmp_path / "root").rglob("*") if path.is_file()]


def test_a_zip_larger_than_the_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "large.zip", "w") as archive:
        archive.writestr("leftImg8bit/x.png", b"0123456789" * 100)
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((999, False), (1000, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if fits:
            unpack(tmp_path / "large.zip", tmp_path / "root")
            continue
        with pytest.raises(InputError, match=f"^{tmp_path / 'large.zip'}: .*1,000 .*999"):
            unpack(tmp_path / "large.zip", tmp_path / "root")
        assert not list((tmp_path / "root").iterdir())
    assert (tmp_path / "root/leftImg8bit/x.png").stat().st_size == 1000


def test_a_folder_without_data_or_zips_is_named_by_its_flag(main, tmp_path):
    with pytest.raises(InputError, match=f"^--data-path {tmp_path}: "):
        main("prepare_cityscapes.py", "--data-path", tmp_path)
    with pytest.raises(InputError, match=f"^--zips {tmp_path}: "):
        main("prepare_cityscapes.py", "--data-path", tmp_path / "data", "--zips", tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(script, tmp_path):
    (tmp_path / "file").write_text("in the way")
    flags = ["--synthetic", "--data-path", tmp_path / "file/data", "--workers", 1]
    assert "file/data" in error_of(script("prepare_cityscapes.py", *flags, ok=False))
