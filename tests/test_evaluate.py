"""evaluate.py: scores of a data set, and predictions and explanations of images."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, RUN, ReachedError, entries, error_of, raise_reached
from PIL import Image

import evaluate
from ocrnet import InputError, explain, plots
from ocrnet.checkpoint import load_model
from ocrnet.data.classes import CITYSCAPES, read_classes
from ocrnet.data.datasets import find_samples, read_label
from ocrnet.device import Accelerator

NAMES = ["road", "building", "pole", "vegetation", "sky", "person", "car"]  # of exercises/classes.json


def test_two_ranks_score_five_images_as_one_does(script, main, trained, data, tmp_path):
    flags = ["--ckpt", trained / "last.pt", "--data-path", data, "--device", "cpu"]
    main("evaluate.py", *flags, "--json", tmp_path / "new/one.json")
    done = script("evaluate.py", *flags, "--json", tmp_path / "two.json", processes=2)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("new/one.json", "two.json"))
    assert one == two and (one["images"], one["mIoU"]) == (5, entries(trained / "log.jsonl", "val")[-1]["mIoU"])
    assert re.findall(r"^mIoU ([\d.]+)", done.stdout, re.MULTILINE) == [f"{100 * one['mIoU']:.2f}"]  # by rank 0
    main("evaluate.py", *flags, "--json", tmp_path / "two.json", "--split", "train")  # over its own scores
    assert json.loads((tmp_path / "two.json").read_text())["images"] == 6


@pytest.fixture
def image(data):
    return next(data.glob("leftImg8bit/val/*/*.png"))


def test_images_of_any_size_are_colored_and_explained(main, trained, image, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    Image.open(image).resize((161, 97)).save(tmp_path / "images/odd.jpg")
    Image.open(image).convert("L").resize((40, 33)).save(tmp_path / "gray.png")
    flags = ["--ckpt", trained / "best.pt", "--device", "cpu"]
    main("evaluate.py", *flags, "--images", tmp_path / "images", tmp_path / "gray.png", "--save", tmp_path / "out")
    found = {path.name: Image.open(path).size for path in (tmp_path / "out").iterdir() if path.name != "legend.png"}
    sizes = {"gray": (40, 33), "odd": (161, 97)}
    assert found == {f"{name}{end}.png": size for name, size in sizes.items() for end in ("", "_overlay")}
    long_sides, explain_images = [], explain.explain_images
    monkeypatch.setattr(explain, "explain_images", lambda *args: long_sides.append(args[-1]) or explain_images(*args))
    main("evaluate.py", *flags, "--images", tmp_path / "gray.png", "--explain", tmp_path / "steps", "--long-side", 50)
    names = ("1_regions", "2_representations", "3_relation", "4_segmentations")
    assert {path.name for path in (tmp_path / "steps").iterdir()} == {f"gray_{name}.png" for name in names}
    assert long_sides == [50]


@pytest.mark.skipif("CAMVID" not in os.environ, reason="CAMVID names the prepared data set")
def test_the_model_in_the_box_has_its_score(script, tmp_path):
    flags = ["--ckpt", ROOT / ".assets/camvid.pt", "--data-path", os.environ["CAMVID"], "--device", "cpu"]
    script("evaluate.py", *flags, "--json", tmp_path / "x.json", processes=2)
    assert json.loads((tmp_path / "x.json").read_text())["mIoU"] == pytest.approx(0.7008, abs=1e-3)


def test_the_model_in_the_box_says_what_it_is_and_colors_its_street_at_any_size(main, tmp_path, capsys):
    street, flags = ROOT / ".assets/street.jpg", ["--ckpt", ROOT / ".assets/camvid.pt", "--device", "cpu"]
    with pytest.raises(InputError, match=f"^--data-path {tmp_path / 'missing'}: "):
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


def test_images_of_a_split_keep_their_names_and_folders(main, trained, image, tmp_path):
    for city in "ab":  # of one name in two cities
        path = tmp_path / f"data/leftImg8bit/test/{city}/x_leftImg8bit.png"
        path.parent.mkdir(parents=True)
        shutil.copy(image, path)
    flags = ["--ckpt", trained / "last.pt", "--data-path", tmp_path / "data", "--split", "test", "--device", "cpu"]
    main("evaluate.py", *flags, "--export", tmp_path / "ids", "--save", tmp_path / "colors")
    found = {str(path.relative_to(tmp_path)) for folder in ("ids", "colors") for path in tmp_path.glob(f"{folder}/*/*")}
    files = ("ids/{}/x_leftImg8bit.png", "colors/{}/x_leftImg8bit.png", "colors/{}/x_leftImg8bit_overlay.png")
    assert found == {file.format(city) for city in "ab" for file in files}


@pytest.mark.parametrize("what, long_side, files", [
    ("--data-path {data}", 0, 0), ("--data-path {data} --split train --export {out}", 0, 6),
    ("--images {city} --save {out}", 256, 11), ("--images {city} --export {out} --long-side 0", 0, 5),
])  # fmt: skip
def test_flags_of_inference_reach_predictions(
    main, trained, image, tmp_path, monkeypatch, capsys, what, long_side, files
):
    calls = []

    def remember(model, accelerator, *options):
        calls.append((model, accelerator.amp, *options))
        return lambda image: (torch.zeros(1, 19, *image.shape[-2:]),)

    monkeypatch.setattr(evaluate, "make_forward", remember)
    monkeypatch.setattr(Accelerator, "compile", lambda self, model, frozen: f"compiled {frozen}")
    flags = what.format(data=image.parents[3], city=image.parent, out=tmp_path)
    flags += " --device cpu --scales 0.5 1 --flip --slide 64 96 --amp --compile"
    main("evaluate.py", "--ckpt", trained / "last.pt", *flags.split())
    assert calls == [("compiled True", True, [0.5, 1.0], True, [64, 96], long_side)]
    assert len(list(tmp_path.rglob("*.png"))) == files and (" 256 " in capsys.readouterr().out) == (long_side == 256)


@pytest.mark.parametrize("flags, named", [
    ("--images x.png --explain out --flip", "--explain"), ("--images x.png --explain out --scales 2", "--explain"),
    ("--images x.png --explain out --slide 32 32", "--explain"), ("--explain out --compile", "--compile"),
    ("--images x", "--images"), ("--save y --export ./y", "--export"), ("--images x --save y --split val", "--split"),
    ("--export out --json x.json", "--json"), ("--save out --json x.json", "--json"),
    ("--explain out --json x.json", "--json"), ("--export out --long-side 0", "--images"),
    ("--scales 0", "--scales"), ("--slide 0 32", "--slide"), ("--images x --save y --long-side -1", "--long-side"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused_by_name(main, flags, named, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main("evaluate.py", "--ckpt", "x.pt", *flags.split())
    assert re.search(f"error: .*{named}([ ,:]|$)", capsys.readouterr().err.splitlines()[-1])


def test_scores_are_not_written_over_something_else(script, main, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "x.json").write_text('{"mIoU": 0.5, "IoU": {}, "mine": 1}')
    flags = ["--ckpt", tmp_path / "missing.pt", "--device", "cpu", "--json"]  # before the checkpoint is read
    for path in (tmp_path / "pipe", "/dev/null", tmp_path):
        with pytest.raises(InputError, match=f"^{path}: "):
            main("evaluate.py", *flags, path)
    done = script("evaluate.py", *flags, tmp_path / "x.json", ok=False)
    assert error_of(done).startswith(f"error: {tmp_path / 'x.json'}: ")


@pytest.fixture(scope="module")
def categories(main, data, tmp_path_factory):
    """A data set whose classes are seven groups of Cityscapes', in which a backbone was trained without OCR."""
    root = tmp_path_factory.mktemp("categories")
    shutil.copytree(data, root, dirs_exist_ok=True)
    shutil.copy(ROOT / "tests/exercises/classes.json", root)
    flags = [*RUN, "--workers", 0, "--max-iters", 1, "--head", "fcn", "--data-path", root, "--output-dir", root / "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_run", lambda *args: None)
        main("train.py", *flags)
    return root


def test_a_data_set_brings_its_own_classes(main, categories, tmp_path, monkeypatch):
    log = entries(categories / "run/log.jsonl")
    assert log[0]["loss_aux"] == 0 and log[0]["loss"] == log[0]["loss_final"]  # without OCR
    flags = ["--ckpt", categories / "run/last.pt", "--data-path", categories, "--device", "cpu"]
    monkeypatch.setattr(evaluate, "print_scores", raise_reached)
    with pytest.raises(ReachedError):
        main("evaluate.py", *flags, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(log[-1]["IoU"]) == list(scores["IoU"]) == NAMES and scores["mIoU"] == log[-1]["mIoU"]
    labels = [read_label(sample.label, read_classes(categories)) for sample in find_samples(categories, "val")]
    pixels = np.bincount(np.concatenate([label.ravel() for label in labels]), minlength=256)[:7]
    assert list(scores["pixels"].values()) == pixels.tolist() and pixels.all()


def test_what_a_checkpoint_is_not_made_for_is_refused(main, categories, data, image, tmp_path):
    flags = ["--ckpt", categories / "run/last.pt", "--device", "cpu"]
    with pytest.raises(InputError, match="^--explain: .*fcn"):
        main("evaluate.py", *flags, "--images", image, "--explain", tmp_path)
    (tmp_path / "classes.json").write_text((categories / "classes.json").read_text().replace('"pole"', '"mast"'))
    for root, name in ((data, "sidewalk"), (tmp_path, "mast")):
        with pytest.raises(InputError, match=f"^--data-path {root}: .*{', '.join(NAMES)}.* {name}"):
            main("evaluate.py", *flags, "--data-path", root)


def test_colors_are_those_of_the_checkpoint_or_of_the_data_set(main, categories, data, image, tmp_path):
    state = torch.load(categories / "run/last.pt", weights_only=True)
    torch.save({key: state[key] for key in ("model", "config")}, tmp_path / "x.pt")  # without names
    flags = ["--device", "cpu", "--images", image, "--save", tmp_path / "out", "--ckpt"]
    colors = {label.color for label in CITYSCAPES.labels if label.name in NAMES}
    for path, own in ((categories / "run/last.pt", ()), (tmp_path / "x.pt", ("--data-path", categories))):
        main("evaluate.py", *flags, path, *own)
        assert {color for _, color in Image.open(tmp_path / "out" / image.name).getcolors()} <= colors
    with pytest.raises(InputError, match=f"^--data-path {data}: "):  # has no effect
        main("evaluate.py", *flags, categories / "run/last.pt", "--data-path", data)
    with pytest.raises(InputError, match=f"^--ckpt {tmp_path / 'x.pt'}: .*7 .*19"):
        main("evaluate.py", *flags, tmp_path / "x.pt", "--data-path", data)
