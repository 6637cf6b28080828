"""Inference and evaluation: properties that hold for every model, tested with small ones."""

import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ocrnet import InputError
from ocrnet.data.classes import CITYSCAPES, ClassTable, Label
from ocrnet.data.datasets import IMAGE_SUFFIXES, EvalDataset, find_samples, read_label, to_tensor
from ocrnet.data.transforms import preprocess
from ocrnet.device import Accelerator
from ocrnet.evaluation import evaluate, print_scores, sample_predictions, summarize
from ocrnet.inference import draw_legend, list_images, make_forward, slide_inference, write_predictions
from ocrnet.metrics import ConfusionMatrix


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


@pytest.fixture(scope="module")
def cpu():
    return Accelerator("cpu")


@pytest.fixture
def image():
    return torch.randint(0, 256, (2, 3, 20, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("scales, flip", [([1], True), ([2], False), ([0.01], False), ([0.5, 1, 1.3], True)])
def test_several_passes_give_the_mean_of_their_softmaxes(cpu, image, scales, flip, align_corners):
    model = Convolution(kernel_size=3, align_corners=align_corners)
    sizes = {0.01: (1, 1), 0.5: (10, 17), 1: (20, 33), 1.3: (26, 43), 2: (40, 66)}
    for slide in (None, (9, 8)):
        expected = []
        for scale, axes in itertools.product(scales, ([], [3]) if flip else ([],)):
            x = F.interpolate(preprocess(image), sizes[scale], mode="bilinear", align_corners=False).flip(axes)
            logits = slide_inference(model, x, slide or sizes[scale]).flip(axes)
            logits = F.interpolate(logits, (20, 33), mode="bilinear", align_corners=align_corners)
            expected.append(logits.softmax(dim=1))
        (found,) = make_forward(model, cpu, scales, flip, slide)(image)
        torch.testing.assert_close(found, torch.stack(expected).mean(0))


@pytest.mark.parametrize("options", [{"flip": True}, {"slide": (8, 15)}])
def test_mixed_precision_is_that_of_the_accelerator(image, options):
    model = Convolution()
    full, mixed = (make_forward(model, Accelerator("cpu", amp=amp), **options)(image)[0] for amp in (False, True))
    assert mixed.dtype == torch.float32 and not torch.equal(full, mixed)
    torch.testing.assert_close(full, mixed, rtol=0.05, atol=0.05)


def test_an_image_is_seen_at_its_long_side_and_its_outputs_have_its_own_size(cpu):
    sizes = (((60, 90), 12, (8, 12)), ((7, 4), 14, (14, 8)), ((46, 30), 20, (20, 13)), ((3, 400), 50, (1, 50)))
    for size, long_side, seen in (*sizes, ((20, 33), 0, (20, 33))):
        model = Convolution(align_corners=long_side < 20)
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        outputs = make_forward(model, cpu, long_side=long_side)(to_tensor(pixels)[None])
        (mean,) = make_forward(model, cpu, flip=True, long_side=long_side)(to_tensor(pixels)[None])
        small = to_tensor(Image.fromarray(pixels).resize(seen[::-1], Image.BILINEAR))  # with antialiasing
        torch.testing.assert_close(model.images[0], preprocess(small[None]), rtol=0, atol=0.02)  # PIL rounds
        logits = model.layer(model.images[0].clone())  # a normal tensor
        for found, expected in zip((*outputs, mean), (logits, -logits, logits.softmax(dim=1)), strict=True):
            expected = F.interpolate(expected, size, mode="bilinear", align_corners=model.align_corners)
            torch.testing.assert_close(found, expected)
            assert not found.requires_grad


@pytest.mark.parametrize(
    "size, window, tops, lefts",  # two thirds of a window apart, the last one at the border
    [
        ((20, 33), (8, 15), [0, 5, 10, 12], [0, 10, 18]), ((18, 5), (8, 8), [0, 5, 10], [0]),
        ((8, 9), (8, 8), [0], [0, 1]), ((2, 3), (1, 1), [0, 1], [0, 1, 2]),
    ],
)  # fmt: skip
def test_a_pixel_has_the_mean_logits_of_its_windows(size, window, tops, lefts):
    model, image = Convolution(kernel_size=3), torch.randn(2, 3, *size)
    total, counts = torch.zeros(2, 4, *size), torch.zeros(size)
    found = slide_inference(lambda x: (model(x)[0].double(),), image, window)
    for i, (top, left) in enumerate(itertools.product(tops, lefts)):
        area = (..., slice(top, top + window[0]), slice(left, left + window[1]))
        assert torch.equal(model.images[i], image[area])
        total[area] += model.layer(image[area])
        counts[area] += 1
    assert len(model.images) == i + 1 and found.dtype == torch.float32
    torch.testing.assert_close(found, total / counts)


# ---- image files -----------------------------------------------------------------------------------------------------


def save_images(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return [folder / name for name in names]


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


def test_images_are_colored_by_class_and_exported_as_ids(cpu, tmp_path, capsys):
    images = list_images(save_images(tmp_path, "a.png", "b.jpg"))
    write_predictions(by_red, images, CITYSCAPES, cpu, tmp_path / "out", tmp_path / "ids")
    printed = capsys.readouterr().out
    assert all(re.search(rf"\b2 .*{tmp_path / folder}$", printed, re.MULTILINE) for folder in ("out", "ids"))
    names = {"out": ["a", "a_overlay", "b", "b_overlay", "legend"], "ids": ["a", "b"]}
    assert {folder: sorted(path.stem for path in (tmp_path / folder).glob("*.png")) for folder in names} == names
    image, colors, mixed, legend, ids = (
        np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
        for name in ("a", "out/a", "out/a_overlay", "out/legend", "ids/a")
    )
    classes = image[..., 0] % 19
    assert np.array_equal(colors, CITYSCAPES.palette[classes]) and np.array_equal(mixed, (image + colors) // 2)
    assert np.array_equal(ids, np.array(CITYSCAPES.ids)[classes]) and np.array_equal(legend, draw_legend(CITYSCAPES))


@pytest.mark.parametrize("low, channels", [(0, 1), (-1, 3)])
def test_classes_are_exported_in_color_if_one_has_no_id(cpu, tmp_path, low, channels):
    rows = [label for label in CITYSCAPES.labels if label.train_id < 19]
    table = ClassTable([label._replace(id=low + label.train_id) for label in rows])
    (path,) = save_images(tmp_path, "a.png")
    write_predictions(by_red, {path: "b"}, table, cpu, export=tmp_path / "out")
    assert len(Image.open(tmp_path / "out/b.png").getbands()) == channels
    assert np.array_equal(read_label(tmp_path / "out/b.png", table), np.asarray(Image.open(path))[..., 0] % 19)


def test_a_row_of_the_legend_is_a_class_in_its_color_and_its_name():
    legend = draw_legend(CITYSCAPES)
    assert legend.shape[0] == 19 * 24 and (legend[:, -5:] == 255).all()  # no name is cut
    for k, label in enumerate(label for label in CITYSCAPES.labels if label.train_id < 19):
        row = legend[24 * k : 24 * (k + 1)]
        assert (row[5:20, 5:48] == label.color).all() and (row[[0, 1, 2, 3, -3, -2, -1], :50] == 255).all()
        alone = draw_legend(ClassTable([label]))
        assert (row[:, 48:] < 128).any() and np.array_equal(row[:, : alone.shape[1]], alone)


def test_only_own_outputs_are_overwritten(cpu, tmp_path):
    a, b, overlay, legend = save_images(tmp_path, "a.png", "b.png", "a_overlay.png", "legend.png")
    before = a.read_bytes()
    for _ in range(2):  # the second time over its own images
        write_predictions(by_red, list_images([a]), CITYSCAPES, cpu, tmp_path / "out")
    Image.open(a).save(tmp_path / "out/b.png")
    with pytest.raises(InputError, match=f"^{tmp_path / 'out/b.png'}: "):
        write_predictions(by_red, list_images([b]), CITYSCAPES, cpu, tmp_path / "out")
    assert a.read_bytes() == before
    for images in ([a, overlay], [legend]):  # an output of one would be that of another, or the legend
        with pytest.raises(InputError, match="^--save: "):
            write_predictions(by_red, list_images(images), CITYSCAPES, cpu, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        write_predictions(by_red, list_images(images), CITYSCAPES, cpu, export=tmp_path / "ids")


def test_outputs_are_not_written_among_the_images(cpu, tmp_path):
    images = dict.fromkeys(save_images(tmp_path / "x", "a.jpg"), "x/a")  # a.png beside it would be another image
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in ("save", "export"):
        with pytest.raises(InputError, match=f"^{tmp_path / 'link'}: "):
            write_predictions(by_red, images, CITYSCAPES, cpu, **{folder: tmp_path / "link"})
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a.jpg"]


def test_every_rank_takes_its_share_and_the_first_writes_the_legend(cpu, tmp_path, monkeypatch):
    images = list_images(save_images(tmp_path, *(f"{i}.png" for i in range(8))))
    monkeypatch.setattr(cpu, "world_size", 3)
    for rank, shares in enumerate((["0", "3", "6", "legend"], ["1", "4", "7"], ["2", "5"])):
        monkeypatch.setattr(cpu, "rank", rank)
        write_predictions(by_red, images, CITYSCAPES, cpu, tmp_path / str(rank))
        names = [path.stem for path in (tmp_path / str(rank)).iterdir()]
        assert sorted(name for name in names if "_" not in name) == shares


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_evaluation_counts_every_pixel_once_and_averages_the_criterion(cpu, data):
    dataset = EvalDataset(find_samples(data, "val"), CITYSCAPES)
    means = []

    def criterion(outputs, label):
        assert outputs[0].shape[-2:] == label.shape[-2:] and label.dtype == torch.int64
        means.append(label.float().mean())
        return means[-1], None

    confusion, loss = evaluate(by_red, dataset, 19, cpu, criterion=criterion)
    expected = ConfusionMatrix(19)
    for image, label in dataset:
        expected.update(label, image[0] % 19)
    assert torch.equal(confusion.counts, expected.counts) and confusion.counts.sum() > 100_000
    assert len(means) == 5 and loss == pytest.approx(sum(means).item() / 5)
    assert evaluate(by_red, dataset, 19, cpu)[1] == 0
    dataset.table = ClassTable([label._replace(train_id=0 if label.id < 0 else 255) for label in CITYSCAPES.labels])
    with pytest.raises(InputError, match=f"^{dataset.samples[0].label} "):
        evaluate(by_red, dataset, 19, cpu)


def test_scores_are_summarized_and_printed(capsys):
    names, confusion = ["road", "traffic light", "a class with a long name", "sky"], ConfusionMatrix(4)
    confusion.counts = torch.tensor([[6, 2, 0, 0], [0] * 4, [0, 0, 2, 0], [0] * 4])
    scores = summarize(confusion, ClassTable([Label(name, k, k, (k, 0, 0)) for k, name in enumerate(names)]))
    assert scores["IoU"] == dict(zip(names, [0.75, 0, 1, None])) and scores["pixels"] == dict(zip(names, [8, 0, 2, 0]))
    assert (scores["mIoU"], scores["pixel_accuracy"]) == pytest.approx((1.75 / 3, 0.8))
    print_scores(scores)
    printed = capsys.readouterr().out
    rows = re.findall(r"^(.+?) +(nan|\d+\.\d\d) +(\d+\.\d\d)$", printed, re.MULTILINE)
    numbers = [("75.00", "80.00"), ("0.00", "0.00"), ("100.00", "20.00"), ("nan", "0.00")]
    assert rows == [(name, *pair) for name, pair in zip(names, numbers)]
    assert len(set(map(len, printed.splitlines()[:5]))) == 1  # in columns
    assert re.search(r"\b58\.33\b.*\b3\b.*\b4\b", printed) and printed.endswith(
        ": traffic light\npixel accuracy 80.00\n"
    )
    print_scores(scores | {"pixels": dict.fromkeys(names, 1)})
    assert ": " not in capsys.readouterr().out  # no class is predicted only


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("count, expected", [({"count": 3}, [0, 1, 3]), ({}, [0, 1, 2, 3]), ({"count": 9}, range(5))])
def test_samples_are_spread_over_the_data_set_and_show_its_predictions(cpu, data, outputs, count, expected):
    dataset, forward = EvalDataset(find_samples(data, "val"), CITYSCAPES), make_forward(Convolution(19), cpu)
    samples = sample_predictions(lambda image: forward(image)[:outputs], dataset, **count)
    for (image, label, *predictions), i in zip(samples, expected, strict=True):
        assert np.array_equal(image, dataset[i][0].permute(1, 2, 0)) and np.array_equal(label, dataset[i][1])
        for found, logits in zip(predictions, forward(dataset[i][0][None])[:outputs], strict=True):
            assert np.array_equal(found, logits[0].argmax(0))
