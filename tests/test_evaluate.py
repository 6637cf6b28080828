"""evaluate.py: scores of a data set, and predictions and explanations of images."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, entries, error_of
from PIL import Image

import evaluate
import train
from ocrnet.checkpoint import load_model
from ocrnet.data.classes import CITYSCAPES
from ocrnet.data.images import read_image, to_tensor
from ocrnet.data.layout import find_samples
from ocrnet.device import Accelerator
from ocrnet.errors import InputError
from ocrnet.inference import overlay, predict
from ocrnet.models import build_model

STEPS = ("1_regions", "2_representations", "3_relation", "4_segmentations")  # the figures of --explain


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_two_ranks_score_five_images_as_one_does(script, main, trained, data, tmp_path, capsys):
    flags = ["--ckpt", trained / "last.pt", "--data-path", data, "--device", "cpu", "--workers", 0]
    main("evaluate.py", *flags, "--json", tmp_path / "new/one.json")
    script("evaluate.py", *flags, "--json", tmp_path / "two.json", processes=2)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("new/one.json", "two.json"))
    assert one == two and one["images"] == 5
    labels = [np.asarray(Image.open(path)) for path in data.glob("gtFine/val/*/*_labelTrainIds.png")]
    assert sum(one["pixels"].values()) == sum((label != 255).sum() for label in labels)
    assert one["mIoU"] == entries(trained / "log.jsonl", "val")[-1]["mIoU"]  # as training logged it
    printed = capsys.readouterr().out
    for score in ("mIoU", "pixel_accuracy", "mIoU_categories"):
        assert f" {100 * one[score]:.2f}" in printed
    assert all(re.search(rf"^{name} +(nan|\d+\.\d\d) +\d+\.\d\d$", printed, re.MULTILINE) for name in CITYSCAPES.names)


def test_absent_classes_are_named_and_left_out_of_a_second_mean(main, trained, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("gtFine/val/*/*_labelTrainIds.png"):
        label = np.asarray(Image.open(path)).copy()
        label[label > 2] = 255
        Image.fromarray(label).save(path)
    flags = ["--data-path", tmp_path, "--device", "cpu", "--workers", 0, "--json", tmp_path / "scores.json"]
    main("evaluate.py", "--ckpt", trained / "last.pt", *flags, "--baseline")
    scores = json.loads((tmp_path / "scores.json").read_text())
    iou = list(scores["IoU"].values())
    assert scores["mIoU_present"] == pytest.approx(sum(iou[:3]) / 3)
    assert all(x in (0, None) for x in iou[3:])  # predicted, or not
    assert scores["mIoU"] == pytest.approx(sum(x for x in iou if x is not None) / sum(x is not None for x in iou))
    printed = capsys.readouterr().out
    assert f" {100 * scores['mIoU_present']:.2f}" in printed
    for score in ("mIoU", "mIoU_present"):
        assert f" {100 * scores['row_baseline'][score]:.2f}" in printed
    absent = next(line for line in printed.splitlines() if "wall" in line and "fence" in line)
    assert [name for name in CITYSCAPES.names if re.search(rf"[:,] {name}\b", absent)] == CITYSCAPES.names[3:]


def test_the_split_is_that_of_the_flag(main, trained, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "segment", lambda model, image, **_: torch.zeros(1, *image.shape[-2:]).long())
    flags = ["--data-path", data, "--device", "cpu", "--workers", 0, "--json", tmp_path / "scores.json"]
    main("evaluate.py", "--ckpt", trained / "last.pt", *flags, "--split", "train")
    assert json.loads((tmp_path / "scores.json").read_text())["images"] == 6


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(data, tmp_path):
    """A folder with a color image, a gray image, and an image of the data set, which has a label."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    Image.fromarray(rng.integers(0, 255, (97, 161, 3), dtype=np.uint8)).save(tmp_path / "images/odd.jpg")
    Image.fromarray(rng.integers(0, 255, (33, 40), dtype=np.uint8)).save(tmp_path / "gray.png")
    return tmp_path / "images", tmp_path / "gray.png", next(data.glob("leftImg8bit/val/*/*.png"))


def test_images_of_any_size_are_colored_and_explained(main, trained, images, tmp_path):
    flags = ["--ckpt", trained / "best.pt", "--device", "cpu", "--images", *images]
    flags += ["--data-path", tmp_path / "missing"]  # names and colors are in the checkpoint
    main("evaluate.py", *flags, "--save", tmp_path / "out")
    labeled = images[2].stem
    names = ("gray", "odd", labeled)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        name + ending for name in names for ending in (".png", "_overlay.png")
    }
    image = read_image(tmp_path / "images/odd.jpg")
    classes = predict(load_model(trained / "best.pt")[0], to_tensor(image)[None], Accelerator("cpu"))[0].argmax(0)
    colors, mixed = (np.asarray(Image.open(tmp_path / f"out/{name}.png")) for name in ("odd", "odd_overlay"))
    assert np.mean(colors == CITYSCAPES.palette[classes]) > 0.999  # but for the last bit of a logit
    assert np.array_equal(mixed, overlay(np.asarray(image), colors))
    more = ["--images", *images[1:], "--explain", tmp_path / "steps", "--pixel", 3, 4, "--pixel", 39, 32]
    main("evaluate.py", *flags, *more)
    assert {path.name for path in (tmp_path / "steps").iterdir()} == {
        *(f"{name}_{step}.png" for name in ("gray", labeled) for step in STEPS),
        f"{labeled}_5_errors.png",  # the only one with a label
    }
    for path in (tmp_path / "steps").iterdir():
        Image.open(path).verify()


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["scores", "export", "images"])
def test_flags_of_inference_reach_every_prediction(main, trained, data, tmp_path, monkeypatch, what):
    calls = []

    def remember(model, image, accelerator, **options):
        calls.append((accelerator.amp, accelerator.amp_dtype, options))
        return torch.zeros(1, *image.shape[-2:]).long()

    monkeypatch.setattr(evaluate, "segment", remember)
    images = sorted(data.glob("leftImg8bit/val/*/*.png"))
    where = {
        "scores": ["--data-path", data],
        "export": ["--data-path", data, "--export", tmp_path],
        "images": ["--images", *images, "--save", tmp_path],
    }[what]
    flags = "--device cpu --workers 0 --scales 0.5 1 --flip --slide 64 96 --stride 32 48 --amp --amp-dtype fp16"
    main("evaluate.py", "--ckpt", trained / "last.pt", *where, *flags.split())
    expected = dict(scales=[0.5, 1.0], flip=True, slide=[64, 96], stride=[32, 48])
    assert calls == [(True, torch.float16, expected)] * 5
    written = {path.name for path in tmp_path.iterdir()}
    names = {path.name for path in images}
    assert written == {"export": names, "scores": set()}.get(what, names | {f"{x.stem}_overlay.png" for x in images})


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--stride 32 32", "--stride"),
        ("--slide 32 64 --stride 32 65", "--stride"),
        ("--images x.png --explain out --flip", "--explain"),
        ("--images x.png --explain out --scales 2", "--explain"),
        ("--images x.png --explain out --slide 32 32", "--explain"),
        ("--images x.png", "--images"),
        ("--save out", "--images"),
        ("--legend", "--legend"),
        ("--scales 0", "--scales"),
        ("--slide 0 32", "--slide"),
        ("--pixel 1 2", "--pixel"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_by_name(main, flags, named, capsys):
    with pytest.raises(SystemExit) as error:
        main("evaluate.py", "--ckpt", "x.pt", *flags.split())
    line = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and re.search(f"error: .*{named}[ ,:]", line)


def test_a_file_that_is_no_checkpoint_is_one_line(script, tmp_path):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    done = script("evaluate.py", "--ckpt", tmp_path / "text.pt", "--device", "cpu", ok=False)
    assert error_of(done).startswith(f"error: {tmp_path / 'text.pt'}: ")


def test_a_model_of_other_classes_without_names_is_refused(main, tmp_path):
    model = build_model("hr18s", num_classes=4)
    torch.save({"model": model.state_dict(), "config": model.config}, tmp_path / "four.pt")
    with pytest.raises(InputError, match=f"^--ckpt {tmp_path / 'four.pt'}: .*4 .*19"):
        main("evaluate.py", "--ckpt", tmp_path / "four.pt", "--data-path", tmp_path, "--device", "cpu")


# ---- other classes ---------------------------------------------------------------------------------------------------

NAMES = ["road", "building", "pole", "vegetation", "sky", "person", "car"]  # the first class of each category


@pytest.fixture(scope="module")
def categories(main, data, tmp_path_factory):
    """A data set whose classes are Cityscapes' 7 categories, in which a backbone was trained without OCR."""
    root = tmp_path_factory.mktemp("categories")
    shutil.copytree(data, root, dirs_exist_ok=True)
    shutil.copy(ROOT / "tests/exercises/classes.json", root)
    for path in root.glob("gtFine/*/*/*_labelTrainIds.png"):
        os.utime(path, (0, 0))  # older than the table
    with pytest.raises(InputError, match=f"^{root}/gtFine/val/.*_labelTrainIds.png: "):
        find_samples(root, "val")
    main("prepare_cityscapes.py", "--data-path", root)
    flags = [*TINY_RUN, "--workers", 0, "--max-iters", 1, "--head", "fcn"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_run", lambda *args: None)
        main("train.py", *flags, "--data-path", root, "--output-dir", root / "run")
    return root


def test_a_data_set_brings_its_own_classes(main, categories, data, tmp_path, capsys):
    log = entries(categories / "run/log.jsonl")
    assert log[0]["loss_aux"] == 0 and log[0]["loss"] == log[0]["loss_final"]  # without OCR
    assert list(log[-1]["IoU"]) == NAMES
    flags = ["--ckpt", categories / "run/last.pt", "--data-path", categories, "--device", "cpu", "--workers", 0]
    main("evaluate.py", *flags, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores["IoU"]) == NAMES and scores["mIoU"] == log[-1]["mIoU"]
    assert capsys.readouterr().out.count("\nroad ") == 1  # no table of categories: they are the classes
    pixels = dict.fromkeys(NAMES, 0)
    for path in data.glob("gtFine/val/*/*_labelTrainIds.png"):
        for value, count in enumerate(Image.open(path).histogram()[:19]):
            pixels[NAMES[CITYSCAPES.category_of[value]]] += count
    assert scores["pixels"] == pixels


def test_the_classes_of_a_checkpoint_and_a_data_set_must_agree(main, categories, data):
    with pytest.raises(InputError, match=f"^--data-path {data}: .*{', '.join(NAMES)}.* sidewalk"):
        main("evaluate.py", "--ckpt", categories / "run/last.pt", "--data-path", data, "--device", "cpu")


def test_only_cityscapes_hides_the_labels_of_test(main, categories, trained, data, tmp_path):
    with pytest.raises(InputError, match="^--split test: .*--export"):
        main("evaluate.py", "--ckpt", trained / "last.pt", "--data-path", data, "--split", "test", "--device", "cpu")
    root = tmp_path / "categories"
    shutil.copytree(categories, root)
    for folder in ("leftImg8bit", "gtFine"):
        shutil.copytree(root / folder / "val", root / folder / "test")
    flags = ["--ckpt", categories / "run/last.pt", "--data-path", root, "--device", "cpu", "--workers", 0]
    for split in ("val", "test"):
        main("evaluate.py", *flags, "--split", split, "--json", tmp_path / f"{split}.json")
    assert (tmp_path / "test.json").read_text() == (tmp_path / "val.json").read_text()


def test_a_model_without_regions_is_not_explained(main, categories, images, tmp_path):
    flags = ["--device", "cpu", "--images", images[1], "--explain", tmp_path / "steps"]
    with pytest.raises(InputError, match="^--explain: .*fcn"):
        main("evaluate.py", "--ckpt", categories / "run/last.pt", *flags)
    assert not (tmp_path / "steps").exists()


def test_images_have_the_colors_of_the_checkpoints_classes(main, categories, images, tmp_path):
    flags = ["--device", "cpu", "--data-path", tmp_path, "--images", images[2], "--save", tmp_path / "out"]
    main("evaluate.py", "--ckpt", categories / "run/last.pt", *flags)
    colors = np.asarray(Image.open(tmp_path / "out" / images[2].name)).reshape(-1, 3)
    expected = CITYSCAPES.palette[[CITYSCAPES.names.index(name) for name in NAMES]]
    assert set(map(tuple, colors.tolist())) <= set(map(tuple, expected.tolist()))
