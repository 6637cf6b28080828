"""The real scripts, as a user runs them, on a data set of a few pictures."""

import json
import math
import os
import re
import shutil
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, RUN, entries
from PIL import Image

import evaluate
from ocrnet.checkpoint import load_model
from ocrnet.data.cityscapes import find_samples, read_photo, to_tensor
from ocrnet.data.classes import CITYSCAPES, ClassTable, Label
from ocrnet.device import Accelerator
from ocrnet.errors import InputError
from ocrnet.inference import predict
from ocrnet.losses import ocr_loss
from ocrnet.models import build_model
from ocrnet.visualize import overlay, plot_curves, read_log
from prepare_cityscapes import unpack
from train import memory_estimate

RHYTHM = ["--iters", 6, "--val-every", 3, "--save-every", 2]


# ---- prepare ----


def test_prepare_unpacks_draws_counts_and_then_finds_nothing_to_do(script, data, tmp_path):
    zips, root = tmp_path / "zips", tmp_path / "cityscapes"
    zips.mkdir()
    for name, folder in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine")):
        with zipfile.ZipFile(zips / f"{name}_trainvaltest.zip", "w") as archive:
            for path in sorted((data / folder).rglob("*")):
                if path.is_file() and "labelTrainIds" not in path.name:
                    archive.write(path, path.relative_to(data))
    shutil.copytree(data / "leftImg8bit/val", root / "leftImg8bit/val")  # a part is there already
    done = script("prepare_cityscapes.py", "--root", root, "--zips", zips, "--pack")
    assert re.search(r"train: 6 pictures, 9\d\.\d% of their pixels labelled", done.stdout)
    assert "val: 5 pictures" in done.stdout and re.search(r"road +\d+\.\d+% +\d+\.\d+%", done.stdout)
    for path in (data / "gtFine").rglob("*_labelTrainIds.png"):
        assert (root / path.relative_to(data)).read_bytes() == path.read_bytes()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert "packed: 6 training pictures and labels" in done.stdout and len(list(root.rglob("*.npy"))) == 12
    again = script("prepare_cityscapes.py", "--root", root, "--zips", zips, "--pack")
    assert again.stdout == done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_prepare_refuses_a_zip_that_leaves_the_root(script, tmp_path):
    for entry in ("../outside.png", "/tmp/ocrnet_outside.png", "gtFine/../../outside.png"):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
            archive.writestr("gtFine/fine.txt", "fine")
            archive.writestr(entry, "outside")
        with pytest.raises(InputError, match="would land outside"):
            unpack(tmp_path / "bad.zip", tmp_path / "root")
    done = script("prepare_cityscapes.py", "--root", tmp_path / "root", "--zips", tmp_path, ok=False)
    assert done.stderr.startswith(f"error: {tmp_path / 'bad.zip'}: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*outside.png")) and not list(tmp_path.rglob("fine.txt"))


def test_prepare_refuses_what_cannot_be_unpacked(tmp_path):
    def refused(message):
        with pytest.raises(InputError, match=message) as error:
            unpack(tmp_path / "bad.zip", tmp_path / "root")
        assert str(error.value).startswith(f"{tmp_path / 'bad.zip'}: ")
        assert not [path for path in tmp_path.rglob("root/*") if path.is_file()]

    with zipfile.ZipFile(tmp_path / "bad.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("leftImg8bit/bomb.png", b"\0" * 10**8)
    refused("this is a zip bomb")
    (tmp_path / "bad.zip").write_bytes((tmp_path / "bad.zip").read_bytes()[:-30])
    refused("not a zip, or a damaged one")
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("leftImg8bit/x.png", b"0123456789" * 100)
    content = (tmp_path / "bad.zip").read_bytes()
    (tmp_path / "bad.zip").write_bytes(content.replace(b"0123456789", b"0123456780"))
    refused("Bad CRC-32")
    (tmp_path / "bad.zip").write_bytes(
        content.replace(b"PK\x03\x04\x14\0\0", b"PK\x03\x04\x14\0\x01").replace(
            b"PK\x01\x02\x14\x03\x14\0\0", b"PK\x01\x02\x14\x03\x14\0\x01"
        )
    )
    refused("password")


def test_prepare_says_what_it_expects_where_there_is_nothing(main, tmp_path):
    with pytest.raises(InputError, match="no folder leftImg8bit and no .*zip: expected .* or use --synthetic"):
        main("prepare_cityscapes.py", "--root", tmp_path)


# ---- train, resume, evaluate, plot ----


@pytest.fixture(scope="module")
def trained(script, data, tmp_path_factory):
    """A run of six iterations on two processes."""
    out = tmp_path_factory.mktemp("runs") / "two"
    return out, script("train.py", *RUN, *RHYTHM, "--data", data, "--out", out, processes=2)


def test_two_ranks_train_validate_save_and_draw(trained):
    out, done = trained
    pictures = {"curve.png", "samples.png", "scores.png"}
    assert {path.name for path in out.iterdir()} == {"log.jsonl", "last.pt", "best.pt", *pictures}
    log = entries(out / "log.jsonl")
    assert [(e["split"], e["iter"]) for e in log] == [
        ("train", 1), ("train", 2), ("train", 3), ("val", 3), ("train", 4), ("train", 5), ("train", 6), ("val", 6)
    ]  # fmt: skip
    train, val = log[0], log[-1]
    assert train["loss"] == pytest.approx(train["loss_final"] + 0.4 * train["loss_regions"], rel=1e-5)
    assert train["lr"] == 0.01 and log[-2]["lr"] == pytest.approx(1e-4) and train["images_per_s"] > 0
    assert 0 <= val["mIoU"] <= 1 and len(val["IoU"]) == 19
    assert "WARNING: training from RANDOM weights" in done.stdout
    assert "6 iterations of 4 crops of 32x64" in done.stdout and "2 processes" in done.stdout
    assert Image.open(out / "curve.png").size == (1500, 450)


def test_a_checkpoint_holds_tensors_and_plain_values_only(trained):
    state = torch.load(trained[0] / "last.pt", weights_only=True)
    assert state["config"]["name"] == "hr18s" and state["config"]["num_classes"] == 19 and state["iter"] == 6
    assert state["best"] == max(e["mIoU"] for e in entries(trained[0] / "log.jsonl") if e["split"] == "val")


def test_a_run_is_not_overwritten(main, trained, data):
    before = (trained[0] / "last.pt").stat().st_mtime_ns
    with pytest.raises(InputError, match="go on with --resume, or choose another folder with --out"):
        main("train.py", *RUN, "--data", data, "--out", trained[0])
    assert (trained[0] / "last.pt").stat().st_mtime_ns == before


def test_two_ranks_score_five_pictures_as_one_does(script, trained, data, tmp_path):
    flags = ["--ckpt", trained[0] / "last.pt", "--data", data, "--device", "cpu", "--workers", 0]
    one = script("evaluate.py", *flags, "--json", tmp_path / "one.json")
    script("evaluate.py", *flags, "--json", tmp_path / "two.json", processes=2)
    one_scores, two_scores = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one_scores == two_scores and one_scores["images"] == 5
    labels = [np.asarray(Image.open(path)) for path in data.glob("gtFine/val/*/*_labelTrainIds.png")]
    assert sum(one_scores["pixels"].values()) == sum((label != 255).sum() for label in labels)
    assert one_scores["mIoU"] == entries(trained[0] / "log.jsonl")[-1]["mIoU"]  # what training logged
    assert re.search(r"mIoU +\d+\.\d\d   mean of \d+ of 19 classes", one.stdout)


def test_absent_classes_are_counted_out_loud(script, trained, data, tmp_path):
    shutil.copytree(data / "leftImg8bit", tmp_path / "leftImg8bit")
    shutil.copytree(data / "gtFine", tmp_path / "gtFine")
    for path in tmp_path.glob("gtFine/val/*/*_labelTrainIds.png"):
        label = np.asarray(Image.open(path)).copy()
        label[label > 2] = 255
        Image.fromarray(label).save(path)
    done = script("evaluate.py", "--ckpt", trained[0] / "last.pt", "--data", tmp_path, "--baseline", "--device", "cpu")
    assert "16 classes do not occur in these labels: wall, fence" in done.stdout
    assert "mean of the 3 that occur" in done.stdout and "without looking at the photo" in done.stdout


def test_a_dry_run_says_what_would_be_and_writes_nothing(main, data, tmp_path, capsys):
    flags = [*RUN, "--iters", 700, "--batch-size", 8, "--data", data, "--out", tmp_path / "run", "--dry-run"]
    main("train.py", *flags)
    output = capsys.readouterr().out
    assert "6,378,496 parameters" in output and "6 training and 5 validation pictures" in output
    assert "700 iterations of 8 crops of 32x64" in output and f"writing to {tmp_path}/run" in output
    assert re.search(r"memory: at least 0\.\d GiB", output) and not (tmp_path / "run").exists()


def test_the_memory_estimate_is_what_autograd_keeps():
    model = build_model("hr18s").to(memory_format=torch.channels_last)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x
    ):
        image = torch.zeros(1, 3, 256, 256).contiguous(memory_format=torch.channels_last)
        loss, _ = ocr_loss(model(image), torch.zeros(1, 256, 256, dtype=torch.long))
    momentum_and_gradients = 2 * 4 * sum(p.numel() for p in model.parameters())
    estimate = memory_estimate(model, 1, (256, 256), False)
    assert estimate == pytest.approx((sum(kept.values()) + momentum_and_gradients) / 2**30, rel=0.03)
    assert memory_estimate(model, 1, (256, 256), True) < 0.8 * estimate


def test_pictures_of_any_size_are_coloured_and_explained(script, main, trained, data, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    Image.fromarray(rng.integers(0, 255, (97, 161, 3), dtype=np.uint8)).save(tmp_path / "photos/odd.jpg")
    Image.fromarray(rng.integers(0, 255, (33, 40), dtype=np.uint8)).save(tmp_path / "grey.png")
    labelled = next(data.glob("leftImg8bit/val/*/*.png"))
    pictures = ["--images", tmp_path / "photos", tmp_path / "grey.png", labelled]
    flags = ["--ckpt", trained[0] / "best.pt", "--device", "cpu", *pictures, "--explain", tmp_path / "steps"]
    script("evaluate.py", *flags, "--save", tmp_path / "out", "--pixel", 3, 4, "--pixel", 39, 32)
    names = ("grey", "odd", labelled.stem)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        name + ending for name in names for ending in (".png", "_overlay.png")
    }
    photo = read_photo(tmp_path / "photos/odd.jpg")
    classes = predict(load_model(trained[0] / "best.pt")[0], to_tensor(photo)[None], Accelerator("cpu"))[0].argmax(0)
    coloured, laid_over = (np.asarray(Image.open(tmp_path / f"out/{name}.png")) for name in ("odd", "odd_overlay"))
    assert np.mean(coloured == CITYSCAPES.palette[classes]) > 0.999  # but for the last bit of a logit
    assert np.array_equal(laid_over, overlay(np.asarray(photo), coloured))
    steps = ["1_regions", "2_representations", "3_relation", "4_segmentations", "5_confidence"]
    assert {path.name for path in (tmp_path / "steps").iterdir()} == {
        *(f"{name}_{step}.png" for name in names for step in steps),
        f"{labelled.stem}_6_errors.png",  # the only one with a label
    }
    with pytest.raises(InputError, match="--pixel 161 0: .*odd.jpg is 161x97"):
        main("evaluate.py", *flags, "--pixel", 161, 0)
    for more, message in (
        (["--save", tmp_path, "--images", tmp_path / "grey.png"], "would write over .*grey.png"),
        (["--save", tmp_path / "new", "--images", tmp_path / "grey.png", tmp_path / "grey_overlay.png"], "write over"),
    ):
        (tmp_path / "grey_overlay.png").write_bytes((tmp_path / "grey.png").read_bytes())
        with pytest.raises(InputError, match=message):
            main("evaluate.py", "--ckpt", trained[0] / "best.pt", *more)


def test_flags_of_the_look_reach_every_prediction(main, trained, data, tmp_path, monkeypatch, capsys):
    looks = []

    def remember(model, photo, accelerator, **how):
        looks.append(how)
        return predict(model, photo, accelerator)

    monkeypatch.setattr(evaluate, "predict", remember)
    flags = "--device cpu --workers 0 --baseline --scales 0.5 1 --flip --slide 64 96 --stride 32 48 --amp"
    flags = [*flags.split(), "--json", str(tmp_path / "a/scores.json")]
    main("evaluate.py", "--ckpt", trained[0] / "last.pt", "--data", data, *flags)
    expected = dict(amp=True, scales=[0.5, 1.0], flip=True, slide=[64, 96], stride=[32, 48])
    assert looks == [expected] * 5
    scores = json.loads((tmp_path / "a/scores.json").read_text())
    assert scores["mIoU"] == entries(trained[0] / "log.jsonl")[-1]["mIoU"]
    assert f"mIoU {100 * scores['row_baseline']['mIoU']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--stride 32 32", "--stride: is for --slide"),
        ("--slide 32 64 --stride 32 65", "no larger"),
        ("--images x.png --explain out --flip", "leave out --scales, --flip"),
        ("--images x.png", "--images goes with"),
        ("--scales 0", "above 0"),
        ("--pixel 1 2", "is for --explain"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(main, flags, message, capsys):
    with pytest.raises(SystemExit):
        main("evaluate.py", "--ckpt", "x.pt", *flags.split())
    assert message in capsys.readouterr().err


def test_flags_of_the_recipe_reach_the_run(script, data, tmp_path):
    flags = "--amp --ohem 0.7 --class-weights --align-corners --dropout 0.1 --no-colour --accumulate 2 --iters 1"
    done = script("train.py", *RUN, *flags.split(), "--min-lr", 0.004, "--data", data, "--out", tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["config"]["align_corners"] is True and state["config"]["dropout"] == 0.1
    assert state["conditions"]["mixed precision"] is True and state["conditions"]["global batch"] == 4
    assert "mixed precision" in done.stdout and "1 iterations of 4 crops" in done.stdout
    assert entries(tmp_path / "log.jsonl")[0]["loss_final"] != pytest.approx(math.log(19), rel=1e-3)


def test_a_label_of_another_size_than_its_photo_is_refused(data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    photo = next(tmp_path.glob("leftImg8bit/val/*/*.png"))
    assert evaluate.label_of(photo, CITYSCAPES).shape == (128, 256)
    assert evaluate.label_of(tmp_path / "street.jpg", CITYSCAPES) is None
    other = ClassTable([Label("road", 1, 0, "", (0, 0, 0)), Label("house", 2, 1, "", (0, 0, 0))])
    assert evaluate.label_of(photo, other) is None  # it is of other classes
    Image.new("RGB", (20, 10)).save(photo)
    with pytest.raises(InputError, match="its photo is 20x10"):
        evaluate.label_of(photo, CITYSCAPES)


def test_plot_lays_a_run_beside_a_log_of_mmengine(script, trained, tmp_path):
    log = tmp_path / "original.log"
    log.write_text(
        "05/01 09:59:00 - mmengine - \x1b[4m\x1b[32mINFO\x1b[0m - Iter(train) [ 1/40000]  lr: 1e-02  loss: 2.5\n"
        "2024/05/01 10:00:00 - mmengine - INFO - Iter(train) [ 50/40000]  lr: 9.9891e-03  eta: 5:23:11  loss: 1.9000\n"
        "2024/05/01 10:09:00 - mmengine - INFO - Iter(val) [500/500]    aAcc: 90.0000  mIoU: 61.5000  mAcc: 70.0000\n"
    )
    done = script("plot_curve.py", trained[0], log, "--out", tmp_path / "both.png")
    assert "two: 6 training entries, 2 validations" in done.stdout
    assert "original: 2 training entries, 1 validations, best mIoU 61.50%" in done.stdout
    assert read_log(log).train[0] == {"split": "train", "iter": 1, "loss": 2.5, "lr": 0.01}
    (tmp_path / "hr18/20240501_100000").mkdir(parents=True)
    shutil.copy(log, tmp_path / "hr18/20240501_100000/20240501_100000.log")
    assert read_log(tmp_path / "hr18/20240501_100000/20240501_100000.log").name == "hr18"
    both = Image.open(tmp_path / "both.png")
    assert both.size == (1500, 450)
    plot_curves([read_log(trained[0]), read_log(log)], tmp_path / "log.png", log_scale=True)
    assert np.any(np.asarray(both) != np.asarray(Image.open(tmp_path / "log.png")))


# ---- errors ----


def test_training_without_data_says_so_on_every_rank(script, tmp_path):
    done = script("train.py", *RUN, "--data", tmp_path, "--out", tmp_path / "run", processes=2, ok=False)
    assert done.stderr.count("error: ") == done.stderr.count("no photos: expected CITY/*_leftImg8bit.png") == 2
    assert 'train.py", line' not in done.stderr and not (tmp_path / "run").exists()  # torchrun's own traceback aside


def test_a_bad_picture_met_in_training_ends_the_run_with_its_name(script, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    victim = sorted((tmp_path / "data/leftImg8bit/train").rglob("*.png"))[0]
    victim.write_bytes(victim.read_bytes()[:3000])  # the header is whole, so that the check before training passes
    flags = ["--iters", 3, "--data", tmp_path / "data", "--out", tmp_path / "run"]
    done = script("train.py", *RUN, *flags, ok=False)
    assert victim.name in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("error: ")


def test_bad_data_met_by_one_rank_ends_all_within_seconds(script, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for victim in sorted((tmp_path / "data/leftImg8bit/train").rglob("*.png"))[::2]:
        victim.write_bytes(victim.read_bytes()[:3000])
    flags = ["--iters", 9, "--data", tmp_path / "data", "--out", tmp_path / "run"]
    start = time.monotonic()
    done = script("train.py", *RUN, "--batch-size", 1, *flags, processes=2, ok=False)
    assert time.monotonic() - start < 60  # of which most is starting
    assert "cannot be read (image file is truncated)" in done.stderr
    assert not (tmp_path / "run/last.pt").exists()


@pytest.mark.parametrize("flag", ["--weights", "--resume"])
def test_training_does_not_start_from_a_file_that_is_no_checkpoint(main, data, tmp_path, flag):
    (tmp_path / "last.pt").write_text("not a checkpoint")
    given = [flag, tmp_path / "last.pt"] if flag == "--weights" else [flag]
    out = tmp_path if flag == "--resume" else tmp_path / "run"
    with pytest.raises(InputError, match=f"^{tmp_path / 'last.pt'}: not a checkpoint"):
        main("train.py", *RUN, "--iters", 3, "--data", data, "--out", out, *given)
    assert (tmp_path / "last.pt").read_text() == "not a checkpoint"


def test_a_loss_that_is_not_finite_stops_the_run(script, data, tmp_path):
    flags = ["--lr", 1e30, "--iters", 5, "--data", data, "--out", tmp_path / "run"]
    done = script("train.py", *RUN, *flags, ok=False)
    assert "the loss became nan" in done.stderr and "--lr" in done.stderr
    assert not (tmp_path / "run/last.pt").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(script, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = script("prepare_cityscapes.py", "--synthetic", "--root", tmp_path / "file/data", "--workers", 1, ok=False)
    assert done.stderr.splitlines()[-1].startswith("error: ") and "file/data" in done.stderr.splitlines()[-1]


def test_a_model_of_other_classes_is_refused(main, tmp_path):
    model = build_model("hr18s", num_classes=4)
    torch.save({"model": model.state_dict(), "config": model.config}, tmp_path / "four.pt")
    with pytest.raises(
        InputError, match="a model of 4 classes whose names are not in the file: expected 19, or --data"
    ):
        main("evaluate.py", "--ckpt", tmp_path / "four.pt", "--device", "cpu")


@pytest.fixture(scope="module")
def categories(script, data, tmp_path_factory):
    """A data set whose classes.json has Cityscapes' 7 categories as classes, and a run there of the backbone alone."""
    root = tmp_path_factory.mktemp("categories")
    shutil.copytree(data, root, dirs_exist_ok=True)
    shutil.copy(ROOT / "tests/exercises/classes.json", root)
    for path in root.glob("gtFine/*/*/*_labelTrainIds.png"):
        os.utime(path, (0, 0))  # before there was the table
    with pytest.raises(InputError, match="is older than classes.json; run python prepare_cityscapes.py"):
        find_samples(root, "val")
    prepared = script("prepare_cityscapes.py", "--root", root)
    flags = [*RUN, "--iters", 2, "--head", "fcn", "--data", root, "--out", root / "run"]
    return root, prepared, script("train.py", *flags)


def test_a_data_set_brings_its_own_classes(main, categories, data, tmp_path, capsys):
    root, prepared, trained = categories
    assert re.search(r"car +\d+\.\d+% +\d+\.\d+%", prepared.stdout) and "sidewalk" not in prepared.stdout
    assert "hr18s with head fcn" in trained.stdout and "5 validation pictures, 7 classes" in trained.stdout
    names = ["road", "building", "pole", "vegetation", "sky", "person", "car"]
    assert list(entries(root / "run/log.jsonl")[-1]["IoU"]) == names
    flags = ["--ckpt", root / "run/last.pt", "--device", "cpu"]
    main("evaluate.py", *flags, "--data", root, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores["IoU"]) == names and scores["mIoU"] == entries(root / "run/log.jsonl")[-1]["mIoU"]
    assert "category" not in capsys.readouterr().out
    pixels = dict(zip(names, np.zeros(7)))  # each label's class is its category
    for path in data.glob("gtFine/val/*/*_labelTrainIds.png"):
        for value, count in enumerate(Image.open(path).histogram()[:19]):
            pixels[names[CITYSCAPES.category_of[value]]] += count
    assert scores["pixels"] == pixels

    def refused(*more):
        with pytest.raises(InputError) as error:
            main("evaluate.py", *flags, *more)
        return str(error.value)

    assert f"--data {data}: its classes are road, sidewalk, " in refused("--data", data)
    photo = next(data.glob("leftImg8bit/val/*/*.png"))
    assert "has head fcn, which has no regions" in refused("--images", photo, "--explain", tmp_path / "steps")
    main(
        "evaluate.py", *flags, "--images", photo, "--save", tmp_path
    )  # without the data set: names and colours are in the checkpoint
    colours = {tuple(color) for color in np.asarray(Image.open(tmp_path / photo.name)).reshape(-1, 3).tolist()}
    assert colours <= {tuple(color) for color in CITYSCAPES.palette[[0, 2, 5, 8, 10, 11, 13]].tolist()}


def test_predictions_are_exported_as_label_ids_under_the_photos_names(script, trained, data, tmp_path):
    flags = ["--ckpt", trained[0] / "last.pt", "--data", data, "--device", "cpu"]
    script("evaluate.py", *flags, "--export", tmp_path / "out")
    photos = sorted((data / "leftImg8bit/val").rglob("*.png"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [path.name for path in photos]
    for path in photos:
        exported = Image.open(tmp_path / "out" / path.name)
        assert exported.mode == "L" and exported.size == Image.open(path).size
        assert set(np.unique(exported)) <= set(CITYSCAPES.ids)
    refused = script("evaluate.py", *flags, "--split", "test", ok=False)
    assert "its labels are not public" in refused.stderr


def test_a_file_that_is_no_checkpoint_is_refused(script, tmp_path):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    done = script("evaluate.py", "--ckpt", tmp_path / "text.pt", "--device", "cpu", ok=False)
    assert done.stderr.startswith(f"error: {tmp_path / 'text.pt'}: not a checkpoint") and done.stderr.count("\n") == 1
