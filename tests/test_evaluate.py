"""evaluate.py: scores of a data set, and predictions and explanations of images."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, RUN, entries, error_of
from PIL import Image

import evaluate
from ocrnet import InputError, plots
from ocrnet.checkpoint import load_model
from ocrnet.data.classes import CITYSCAPES, read_classes
from ocrnet.data.datasets import find_samples, read_image, read_label, to_tensor
from ocrnet.device import Accelerator
from ocrnet.inference import make_forward

STEPS = ("1_regions", "2_representations", "3_relation", "4_segmentations")  # the figures of --explain


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_two_ranks_score_five_images_as_one_does(script, main, trained, data, tmp_path):
    flags = ["--ckpt", trained / "last.pt", "--data-path", data, "--device", "cpu"]
    main("evaluate.py", *flags, "--json", tmp_path / "new/one.json")
    done = script("evaluate.py", *flags, "--json", tmp_path / "two.json", processes=2)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("new/one.json", "two.json"))
    assert one == two and one["images"] == 5
    labels = [read_label(sample.label, CITYSCAPES) for sample in find_samples(data, "val")]
    assert sum(one["pixels"].values()) == sum((label != 255).sum() for label in labels)
    assert one["mIoU"] == entries(trained / "log.jsonl", "val")[-1]["mIoU"]  # as training logged it
    assert re.findall(r"^mIoU ([\d.]+)", done.stdout, re.MULTILINE) == [f"{100 * one['mIoU']:.2f}"]  # by rank 0
    main("evaluate.py", *flags, "--json", tmp_path / "two.json", "--split", "train")  # over its own scores
    assert json.loads((tmp_path / "two.json").read_text())["images"] == 6


def test_a_split_without_labeled_pixels_is_no_score(main, trained, data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    for sample in find_samples(tmp_path, "val"):
        Image.fromarray(np.zeros((128, 256), np.uint8)).save(sample.label)  # as Cityscapes' test labels are
    with pytest.raises(InputError, match=f"^{find_samples(tmp_path, 'val')[0].label} "):
        main("evaluate.py", "--ckpt", trained / "last.pt", "--data-path", tmp_path, "--device", "cpu")


def test_a_data_set_that_is_not_there_is_named(main, trained, tmp_path):
    with pytest.raises(InputError, match=f"^--data-path {tmp_path / 'missing'}: "):
        main("evaluate.py", "--ckpt", trained / "last.pt", "--data-path", tmp_path / "missing", "--device", "cpu")


def test_scores_are_not_written_over_something_else(main, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "x.json").write_text("[]")
    for path in (tmp_path / "x.json", tmp_path / "pipe", "/dev/null", tmp_path):  # before the checkpoint is read
        with pytest.raises(InputError, match=f"^{path}: "):
            main("evaluate.py", "--ckpt", tmp_path / "missing.pt", "--device", "cpu", "--json", path)


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
    main("evaluate.py", *flags, "--save", tmp_path / "out", "--export", tmp_path / "ids")
    labeled = images[2].stem
    names = ("gray", "odd", labeled)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "legend.png", *(name + ending for name in names for ending in (".png", "_overlay.png")),
    }  # fmt: skip
    image = read_image(tmp_path / "images/odd.jpg")
    model = load_model(trained / "best.pt")[0]
    forward = make_forward(model, Accelerator("cpu"), long_side=256)  # as trained
    classes = forward(to_tensor(image)[None])[0][0].argmax(0)
    colors = np.asarray(Image.open(tmp_path / "out/odd.png"))
    assert np.mean(colors == CITYSCAPES.palette[classes]) > 0.999  # but for the last bit of a logit
    ids = np.asarray(Image.open(tmp_path / "ids/odd.png"))
    assert np.array_equal(CITYSCAPES.palette[CITYSCAPES.to_train_ids(ids)], colors)
    main("evaluate.py", *flags, "--images", images[2], "--explain", tmp_path / "steps")
    names = {f"{labeled}_{step}.png" for step in STEPS}
    assert {path.name for path in (tmp_path / "steps").iterdir()} == names
    for path in (tmp_path / "steps").iterdir():
        Image.open(path).verify()


def test_the_model_in_the_box_says_what_it_is_and_colors_its_street_at_any_size(main, tmp_path, capsys):
    street, flags = ROOT / ".assets/street.jpg", ["--ckpt", ROOT / ".assets/camvid.pt", "--device", "cpu"]
    with pytest.raises(InputError):  # there is no data
        main("evaluate.py", *flags, "--data-path", tmp_path / "missing")
    assert "70.08 %" in capsys.readouterr().out
    image = Image.open(street)
    image.resize((3 * image.width, 3 * image.height)).save(tmp_path / "large.png")
    main("evaluate.py", *flags, "--images", street, tmp_path / "large.png", "--save", tmp_path / "out")
    assert "70.08 %" not in capsys.readouterr().out
    small, large = (np.asarray(Image.open(tmp_path / "out" / name)) for name in ("street.png", "large.png"))
    table = load_model(ROOT / ".assets/camvid.pt")[1]
    for name, share in (("road", 0.2), ("building", 0.2), ("car", 0.02)):
        assert (small == table.palette[table.names.index(name)]).all(axis=2).mean() > share
    assert (small == large[1::3, 1::3]).all(axis=2).mean() > 0.95


def test_images_of_a_split_keep_their_names_and_folders(main, trained, data, tmp_path):
    cities = [tmp_path / "data/leftImg8bit/test" / city for city in ("a", "b")]
    for city, image in zip(cities, sorted(data.glob("leftImg8bit/val/*/*.png"))):  # of one name in two cities
        city.mkdir(parents=True)
        shutil.copy(image, city / "x_leftImg8bit.png")
    flags = ["--ckpt", trained / "last.pt", "--data-path", tmp_path / "data", "--split", "test", "--device", "cpu"]
    main("evaluate.py", *flags, "--export", tmp_path / "ids", "--save", tmp_path / "colors")
    found = {str(path.relative_to(tmp_path)) for folder in ("ids", "colors") for path in tmp_path.glob(f"{folder}/*/*")}
    files = ("ids/{}/x_leftImg8bit.png", "colors/{}/x_leftImg8bit.png", "colors/{}/x_leftImg8bit_overlay.png")
    assert found == {file.format(city) for city in "ab" for file in files}


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what, long_side, files",
    [
        ("--data-path {data}", 0, 0), ("--data-path {data} --split train --export {out}", 0, 6),
        ("--images {city} --save {out}", 256, 11), ("--images {city} --export {out} --long-side 100", 100, 5),
        ("--images {city} --export {out} --long-side 0", 0, 5),
    ],
)  # fmt: skip
def test_flags_of_inference_reach_every_prediction(
    main, trained, data, tmp_path, monkeypatch, capsys, what, long_side, files
):
    calls = []

    def remember(model, accelerator, *options):
        calls.append((model, accelerator.amp, *options))
        return lambda image: (torch.zeros(1, 19, *image.shape[-2:]),)

    monkeypatch.setattr(evaluate, "make_forward", remember)
    monkeypatch.setattr(Accelerator, "compile", lambda self, model, frozen: f"compiled {frozen}")
    (city,) = data.glob("leftImg8bit/val/*")
    what = (
        what.format(data=data, city=city, out=tmp_path)
        + " --device cpu --scales 0.5 1 --flip --slide 64 96 --amp --compile"
    )
    main("evaluate.py", "--ckpt", trained / "last.pt", *what.split())
    assert calls == [("compiled True", True, [0.5, 1.0], True, [64, 96], long_side)]
    assert len(list(tmp_path.rglob("*.png"))) == files and (
        not long_side or f" {long_side} " in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--images x.png --explain out --flip", "--explain"), ("--images x.png --explain out --scales 2", "--explain"),
        ("--images x.png --explain out --slide 32 32", "--explain"), ("--explain out --compile", "--compile"),
        ("--images x.png", "--images"), ("--images x.png --save out --export out", "--export"),
        ("--export out --json x.json", "--json"), ("--save out --json x.json", "--json"),
        ("--explain out --json x.json", "--json"), ("--export out --long-side 0", "--images"),
        ("--scales 0", "--scales"), ("--slide 0 32", "--slide"), ("--images x --save y --long-side -1", "--long-side"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together_are_refused_by_name(main, flags, named, capsys):
    with pytest.raises(SystemExit) as error:
        main("evaluate.py", "--ckpt", "x.pt", *flags.split())
    line = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and re.search(f"error: .*{named}([ ,:]|$)", line)


def test_a_file_that_is_no_checkpoint_is_one_line(script, tmp_path):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    done = script("evaluate.py", "--ckpt", tmp_path / "text.pt", "--device", "cpu", ok=False)
    assert error_of(done).startswith(f"error: {tmp_path / 'text.pt'}: ")


# ---- other classes ---------------------------------------------------------------------------------------------------

NAMES = ["road", "building", "pole", "vegetation", "sky", "person", "car"]


@pytest.fixture(scope="module")
def categories(main, data, tmp_path_factory):
    """A data set whose classes are seven groups of Cityscapes', in which a backbone was trained without OCR."""
    root = tmp_path_factory.mktemp("categories")
    shutil.copytree(data, root, dirs_exist_ok=True)
    shutil.copy(ROOT / "tests/exercises/classes.json", root)
    flags = [*RUN, "--workers", 0, "--max-iters", 1, "--head", "fcn"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_run", lambda *args: None)
        main("train.py", *flags, "--data-path", root, "--output-dir", root / "run")
    return root


def test_a_data_set_brings_its_own_classes(main, categories, tmp_path):
    log = entries(categories / "run/log.jsonl")
    assert log[0]["loss_aux"] == 0 and log[0]["loss"] == log[0]["loss_final"]  # without OCR
    assert list(log[-1]["IoU"]) == NAMES
    flags = ["--ckpt", categories / "run/last.pt", "--data-path", categories, "--device", "cpu"]
    main("evaluate.py", *flags, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores["IoU"]) == NAMES and scores["mIoU"] == log[-1]["mIoU"]
    labels = [read_label(sample.label, read_classes(categories)) for sample in find_samples(categories, "val")]
    pixels = np.bincount(np.concatenate([label.ravel() for label in labels]), minlength=256)[:7]
    assert list(scores["pixels"].values()) == pixels.tolist() and pixels.all()


def test_the_classes_of_a_checkpoint_and_a_data_set_must_agree(main, categories, data, tmp_path):
    (tmp_path / "classes.json").write_text((categories / "classes.json").read_text().replace('"pole"', '"mast"'))
    for root, name in ((data, "sidewalk"), (tmp_path, "mast")):
        with pytest.raises(InputError, match=f"^--data-path {root}: .*{', '.join(NAMES)}.* {name}"):
            main("evaluate.py", "--ckpt", categories / "run/last.pt", "--data-path", root, "--device", "cpu")


def test_a_model_without_regions_is_not_explained(main, categories, images, tmp_path):
    flags = ["--device", "cpu", "--images", images[1], "--explain", tmp_path / "steps"]
    with pytest.raises(InputError, match="^--explain: .*fcn"):
        main("evaluate.py", "--ckpt", categories / "run/last.pt", *flags)
    assert not (tmp_path / "steps").exists()


def test_images_have_the_colors_of_the_checkpoints_classes_or_without_them_of_the_data_set(
    main, categories, data, images, tmp_path
):
    state = torch.load(categories / "run/last.pt", weights_only=True)
    torch.save({key: state[key] for key in ("model", "config")}, tmp_path / "x.pt")
    flags = ["--device", "cpu", "--images", images[2], "--save", tmp_path / "out"]
    for path, root in ((categories / "run/last.pt", tmp_path), (tmp_path / "x.pt", categories)):
        main("evaluate.py", "--ckpt", path, "--data-path", root, *flags)
        colors = np.asarray(Image.open(tmp_path / "out" / images[2].name)).reshape(-1, 3)
        expected = CITYSCAPES.palette[[CITYSCAPES.names.index(name) for name in NAMES]]
        assert set(map(tuple, colors.tolist())) <= set(map(tuple, expected.tolist()))
    with pytest.raises(InputError, match=f"^--ckpt {tmp_path / 'x.pt'}: .*7 .*19"):
        main("evaluate.py", "--ckpt", tmp_path / "x.pt", "--data-path", data, *flags)
