"""Inference and evaluation: properties that hold for every model, tested with small ones."""

import itertools
import os
import re
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_datasets import save
from torch import nn

from ocrnet import InputError
from ocrnet.data.classes import CITYSCAPES, ClassTable, Label
from ocrnet.data.datasets import IMAGE_SUFFIXES, EvalDataset, find_samples, read_label, to_tensor
from ocrnet.data.transforms import preprocess
from ocrnet.device import Accelerator
from ocrnet.evaluation import evaluate, print_scores, sample_predictions, summarize
from ocrnet.inference import draw_legend, list_images, make_forward, slide_inference, write_predictions
from ocrnet.metrics import ConfusionMatrix

CPU = Accelerator("cpu")
IMAGE = torch.randint(0, 256, (2, 3, 20, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Convolution(nn.Module):
    """A model of one convolution. It keeps the images that it was given."""

    def __init__(self, num_classes=4, kernel_size=1, align_corners=False):
        super().__init__()
        self.images, self.align_corners = [], align_corners
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, num_classes, kernel_size, padding=kernel_size // 2)

    def forward(self, image):
        self.images.append(image)
        logits = self.layer(image)
        return logits, -logits


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("scales, flip", [([1], True), ([2], False), ([0.01], False), ([0.5, 1, 1.3], True)])
def test_several_passes_give_the_mean_of_their_softmaxes(scales, flip, align_corners):
    model = Convolution(kernel_size=3, align_corners=align_corners)
    sizes = {0.01: (1, 1), 0.5: (10, 17), 1: (20, 33), 1.3: (26, 43), 2: (40, 66)}
    for slide in (None, (9, 8)):
        expected = []
        for scale, axes in itertools.product(scales, ([], [3]) if flip else ([],)):
            x = F.interpolate(preprocess(IMAGE), sizes[scale], mode="bilinear", align_corners=False).flip(axes)
            logits = slide_inference(model, x, slide or sizes[scale]).flip(axes)
            logits = F.interpolate(logits, (20, 33), mode="bilinear", align_corners=align_corners)
            expected.append(logits.softmax(dim=1))
        (found,) = make_forward(model, CPU, scales, flip, slide)(IMAGE)
        torch.testing.assert_close(found, torch.stack(expected).mean(0))


def test_mixed_precision_is_that_of_the_accelerator():
    for options in ({"flip": True}, {"slide": (8, 15)}):
        accelerators = (Accelerator("cpu", amp=amp) for amp in (False, True))
        full, mixed = (make_forward(Convolution(), accelerator, **options)(IMAGE)[0] for accelerator in accelerators)
        assert mixed.dtype == torch.float32 and not torch.equal(full, mixed)
        torch.testing.assert_close(full, mixed, rtol=0.05, atol=0.05)


def test_an_image_is_seen_at_its_long_side_and_its_outputs_have_its_own_size():
    sizes = (((60, 90), 12, (8, 12)), ((7, 4), 14, (14, 8)), ((46, 30), 20, (20, 13)), ((3, 400), 50, (1, 50)))
    for size, long_side, seen in (*sizes, ((20, 33), 0, (20, 33))):
        model = Convolution(align_corners=long_side < 20)
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        outputs = make_forward(model, CPU, long_side=long_side)(to_tensor(pixels)[None])
        model.long_side = long_side  # of its training images, the default
        (mean,) = make_forward(model, CPU, flip=True)(to_tensor(pixels)[None])
        small = to_tensor(Image.fromarray(pixels).resize(seen[::-1], Image.BILINEAR))  # with antialiasing
        torch.testing.assert_close(model.images[0], preprocess(small[None]), rtol=0, atol=0.02)  # PIL rounds
        logits = model.layer(model.images[0].clone())  # a normal tensor
        for found, expected in zip((*outputs, mean), (logits, -logits, logits.softmax(dim=1)), strict=True):
            expected = F.interpolate(expected, size, mode="bilinear", align_corners=model.align_corners)
            torch.testing.assert_close(found, expected)
            assert not found.requires_grad


def test_a_pixel_has_the_mean_logits_of_its_windows():
    for size, window, tops, lefts in (  # two thirds of a window apart, the last one at the border
        ((20, 33), (8, 15), [0, 5, 10, 12], [0, 10, 18]), ((18, 5), (8, 8), [0, 5, 10], [0]),
        ((8, 9), (8, 8), [0], [0, 1]), ((2, 3), (1, 1), [0, 1], [0, 1, 2]),
    ):  # fmt: skip
        model, image = Convolution(kernel_size=3), torch.randn(3, 3, *size)
        total, counts = torch.zeros(3, 4, *size), torch.zeros(size)
        found = slide_inference(lambda x, model=model: (model(x)[0].double(),), image, window)
        for i, (top, left) in enumerate(itertools.product(tops, lefts)):
            area = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            assert torch.equal(model.images[i], image[area])
            total[area] += model.layer(image[area])
            counts[area] += 1
        assert len(model.images) == i + 1 and found.dtype == torch.float32
        torch.testing.assert_close(found, total / counts)


def save_images(folder, *names):
    rng = np.random.default_rng(0)
    return [save(folder / name, rng.integers(0, 256, (5, 7, 3))) for name in names]


def test_folders_are_listed_by_their_images_and_unusable_paths_are_named(tmp_path):
    folder, alone = tmp_path / "photos.png", tmp_path / ".x.y.gif"
    (folder / "deeper.png").mkdir(parents=True)
    names = [f"{9 - i}{suffix}" for i, suffix in enumerate((*IMAGE_SUFFIXES, ".JPG"))]
    for path in (alone, *(folder / name for name in (*names, "notes.txt", ".hidden.png"))):
        path.touch()
    found = {folder / name: name[0] for name in sorted(names)} | {alone: ".x.y"}
    assert [(path, str(name)) for path, name in list_images([folder, alone]).items()] == list(found.items())
    for paths in ([tmp_path / "absent.png"], [folder / "deeper.png"], [folder, folder / names[0]]):
        with pytest.raises(InputError, match=f"^--images.* {paths[-1]}\\b"):
            list_images(paths)


def by_red(image):
    """Logits of which class red % 19 is the highest."""
    return (nn.functional.one_hot(image[:, 0].long() % 19, 19).permute(0, 3, 1, 2).float(),)


def test_images_are_colored_by_class_and_exported_as_ids(tmp_path, capsys):
    images = list_images(save_images(tmp_path, "a.png", "b.jpg"))
    write_predictions(by_red, images, CITYSCAPES, CPU, tmp_path / "out", tmp_path / "ids")
    printed = capsys.readouterr().out
    assert all(re.search(rf"\b2 .*{tmp_path / folder}$", printed, re.MULTILINE) for folder in ("out", "ids"))
    names = {"out": ["a", "a_overlay", "b", "b_overlay", "legend"], "ids": ["a", "b"]}
    assert {folder: sorted(path.stem for path in (tmp_path / folder).glob("*.png")) for folder in names} == names
    paths = (tmp_path / f"{name}.png" for name in ("a", "out/a", "out/a_overlay", "out/legend", "ids/a"))
    image, colors, mixed, legend, ids = (np.asarray(Image.open(path)).astype(int) for path in paths)
    classes = image[..., 0] % 19
    assert np.array_equal(colors, CITYSCAPES.palette[classes]) and np.array_equal(mixed, (image + colors) // 2)
    assert np.array_equal(ids, np.array(CITYSCAPES.ids)[classes]) and np.array_equal(legend, draw_legend(CITYSCAPES))


def test_classes_are_exported_in_color_if_one_has_no_id(tmp_path):
    (path,) = save_images(tmp_path, "a.png")
    for low, channels in ((0, 1), (-1, 3)):
        labels = [label._replace(id=low + label.train_id) for label in CITYSCAPES.labels if label.train_id < 19]
        write_predictions(by_red, {path: "b"}, ClassTable(labels), CPU, export=tmp_path / "out")
        assert len(Image.open(tmp_path / "out/b.png").getbands()) == channels
        found = read_label(tmp_path / "out/b.png", ClassTable(labels))
        assert np.array_equal(found, np.asarray(Image.open(path))[..., 0] % 19)


def test_a_row_of_the_legend_is_a_class_in_its_color_and_its_name():
    legend = draw_legend(CITYSCAPES)
    assert legend.shape[0] == 19 * 24 and (legend[:, -5:] == 255).all()  # no name is cut
    for k, label in enumerate(label for label in CITYSCAPES.labels if label.train_id < 19):
        row = legend[24 * k : 24 * (k + 1)]
        assert (row[5:20, 5:48] == label.color).all() and (row[5:20, 49:58] == 255).all()
        assert (row[[0, 1, 2, 3, -3, -2, -1], :58] == 255).all()
        alone = draw_legend(ClassTable([label]))
        assert (row[:, 48:] < 128).any() and np.array_equal(row[:, : alone.shape[1]], alone)


def test_only_own_outputs_are_overwritten_and_none_is_among_the_images(tmp_path):
    a, b, overlay, legend = save_images(tmp_path, "a.png", "b.png", "a_overlay.png", "legend.png")
    before = a.read_bytes()
    for _ in range(2):  # the second time over its own images
        write_predictions(by_red, list_images([a]), CITYSCAPES, CPU, tmp_path / "out")
    Image.open(a).save(tmp_path / "out/b.png")
    with pytest.raises(InputError, match=f"^{tmp_path / 'out/b.png'}: "):
        write_predictions(by_red, list_images([b]), CITYSCAPES, CPU, tmp_path / "out")
    assert a.read_bytes() == before
    for images in ([a, overlay], [legend]):  # an output of one would be that of another, or the legend
        with pytest.raises(InputError, match="^--save: "):
            write_predictions(by_red, list_images(images), CITYSCAPES, CPU, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        write_predictions(by_red, list_images(images), CITYSCAPES, CPU, export=tmp_path / "ids")
    with pytest.raises(InputError, match=f"^{tmp_path / 'ids/a.png'}: "):  # colors are no ids
        write_predictions(by_red, list_images([a]), CITYSCAPES, CPU, tmp_path / "ids")
    (tmp_path / "link").symlink_to(tmp_path.parent)
    for folder in ("save", "export"):  # where a.png would be another image of the name a
        with pytest.raises(InputError, match=f"^{tmp_path / 'link'}: "):
            write_predictions(by_red, {a: f"{tmp_path.name}/c"}, CITYSCAPES, CPU, **{folder: tmp_path / "link"})


def test_outputs_are_whole_or_absent_and_not_among_the_images_of_a_data_set(tmp_path, monkeypatch):
    (image,) = save_images(tmp_path / "images/val", "a.png")
    write = partial(write_predictions, by_red, {image: "a"}, CITYSCAPES, CPU, None)
    (tmp_path / "labels").mkdir(), (tmp_path / "link").symlink_to(image.parent), (tmp_path / "out").mkdir()
    for folder in (image.parent / "b", tmp_path / "link/b"):
        with pytest.raises(InputError, match=f"^{folder}/a.png: "):
            write(folder)
    (tmp_path / "out/a.png.part").write_text("mine"), (tmp_path / "out/a.png").touch()  # an empty file is none
    write(tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    for folder in ("out", "new"):
        with pytest.raises(InputError, match=f"^{tmp_path / folder / 'a.png'}: .*No space"):
            write(tmp_path / folder)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")} and b"mine" in before.values()


def test_every_rank_takes_its_share_and_the_first_writes_the_legend(tmp_path, monkeypatch):
    images = list_images(save_images(tmp_path, *(f"{i}.png" for i in range(8))))
    monkeypatch.setattr(CPU, "world_size", 3)
    for rank, shares in enumerate(({"0", "3", "6", "legend"}, {"1", "4", "7"}, {"2", "5"})):
        monkeypatch.setattr(CPU, "rank", rank)
        write_predictions(by_red, images, CITYSCAPES, CPU, tmp_path / str(rank))
        assert {path.stem.removesuffix("_overlay") for path in (tmp_path / str(rank)).iterdir()} == shares


@pytest.mark.filterwarnings("error")
def test_evaluation_counts_every_pixel_once_and_averages_the_criterion(data, monkeypatch):
    dataset, means = EvalDataset(find_samples(data, "val"), CITYSCAPES), []

    def criterion(outputs, label):
        assert outputs[0].shape[-2:] == label.shape[-2:] and label.dtype == torch.int64
        means.append(label.float().mean())
        return means[-1], None

    confusion, loss = evaluate(by_red, dataset, CPU, criterion=criterion)
    expected = ConfusionMatrix(19)
    for image, label in dataset:
        expected.update(label, image[0] % 19)
    assert torch.equal(confusion.counts, expected.counts) and confusion.counts.sum() > 100_000
    assert (len(means), loss, evaluate(by_red, dataset, CPU)[1]) == (5, pytest.approx(sum(means).item() / 5), 0)
    unlabeled = [(image, torch.full_like(label, 255)) for image, label in dataset]
    monkeypatch.setattr(EvalDataset, "__getitem__", lambda _, index: unlabeled[index])
    with pytest.raises(InputError, match=f"^{dataset.samples[0].label} "):
        evaluate(by_red, dataset, CPU)


def test_scores_are_summarized_and_printed(capsys):
    names, confusion = ["road", "traffic light", "a class with a long name", "sky"], ConfusionMatrix(4)
    confusion.counts = torch.tensor([[6, 2, 0, 0], [0] * 4, [0, 0, 2, 0], [0] * 4])
    scores = summarize(confusion, ClassTable([Label(name, k, k, (k, 0, 0)) for k, name in enumerate(names)]))
    assert scores["IoU"] == dict(zip(names, [0.75, 0, 1, None])) and scores["pixels"] == dict(zip(names, [8, 0, 2, 0]))
    assert (scores["mIoU"], scores["pixel_accuracy"]) == pytest.approx((1.75 / 3, 0.8))
    print_scores(scores)
    printed = capsys.readouterr().out
    assert re.search(r"\b58\.33\b.*\b3\b.*\b4\b(?s:.*): traffic light\npixel accuracy 80\.00\n$", printed)
    rows = re.findall(r"^(.+?) +(nan|\d+\.\d\d) +(\d+\.\d\d)$", printed, re.MULTILINE)
    assert rows == list(zip(names, ("75.00", "0.00", "100.00", "nan"), ("80.00", "0.00", "20.00", "0.00")))
    assert len(set(map(len, printed.splitlines()[:5]))) == 1  # in columns
    print_scores(scores | {"pixels": dict.fromkeys(names, 1)})
    assert ": " not in capsys.readouterr().out  # no class is predicted only


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("count, expected", [({"count": 3}, [0, 1, 3]), ({}, [0, 1, 2, 3]), ({"count": 9}, range(5))])
def test_samples_are_spread_over_the_data_set_and_show_its_predictions(data, outputs, count, expected):
    dataset, forward = EvalDataset(find_samples(data, "val"), CITYSCAPES), make_forward(Convolution(19), CPU)
    samples = sample_predictions(lambda image: forward(image)[:outputs], dataset, **count)
    for (image, label, *predictions), i in zip(samples, expected, strict=True):
        assert np.array_equal(image, dataset[i][0].permute(1, 2, 0)) and np.array_equal(label, dataset[i][1])
        for found, logits in zip(predictions, forward(dataset[i][0][None])[:outputs], strict=True):
            assert np.array_equal(found, logits[0].argmax(0))
