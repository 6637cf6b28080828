"""Inference and evaluation: properties that hold for every model, tested with small ones."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ocrnet.data.classes import CITYSCAPES
from ocrnet.data.datasets import EvalDataset
from ocrnet.data.layout import find_samples
from ocrnet.data.transforms import preprocess
from ocrnet.device import Accelerator
from ocrnet.errors import InputError
from ocrnet.evaluation import evaluate, export_split, sample_predictions
from ocrnet.inference import (
    color_images,
    forward_image,
    list_images,
    overlay,
    predict,
    rank_shard,
    segment,
    slide_inference,
)


class Pointwise(nn.Module):
    """Logits of each pixel from that pixel only, so windows and flips do not matter."""

    align_corners = False

    def __init__(self, num_classes=4):
        super().__init__()
        self.sizes = []  # of the images it was given
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, num_classes, 1)

    def forward(self, image):
        self.sizes.append(tuple(image.shape[-2:]))
        logits = self.layer(image)
        return logits, -logits


@pytest.fixture(scope="module")
def cpu():
    return Accelerator("cpu")


@pytest.fixture
def image():
    return torch.randint(0, 256, (2, 3, 20, 33), dtype=torch.uint8)


# ---- probabilities ---------------------------------------------------------------------------------------------------


def test_forward_image_gives_the_outputs_for_the_normalized_image(cpu, image):
    model = Pointwise()
    logits, region_logits = forward_image(model, image, cpu)
    torch.testing.assert_close(logits, model.layer(preprocess(image)))
    assert torch.equal(region_logits, -logits) and not logits.requires_grad


def test_probabilities_of_a_pixel_sum_to_one(cpu, image):
    probabilities = predict(Pointwise(), image, cpu, scales=[0.5, 1, 1.5], flip=True)
    assert probabilities.shape == (2, 4, 20, 33) and probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, 20, 33))


def test_prediction_is_the_softmax_of_the_final_logits(cpu, image):
    model = Pointwise()
    torch.testing.assert_close(predict(model, image, cpu), forward_image(model, image, cpu)[0].softmax(1))


@pytest.mark.parametrize(
    "options", [{}, {"scales": [0.5]}, {"scales": [1.0, 0.5]}, {"flip": True}, {"slide": (8, 9)}], ids=str
)
def test_segmentation_is_the_most_probable_class(cpu, image, options):
    model = Pointwise()
    classes = segment(model, image, cpu, **options)
    assert classes.shape == (2, 20, 33) and len(classes.unique()) > 1
    assert torch.equal(classes, predict(model, image, cpu, **options).argmax(1))


def test_mixed_precision_is_that_of_the_accelerator(image):
    model = Pointwise()
    full, mixed = (predict(model, image, Accelerator("cpu", amp=amp)) for amp in (False, True))
    assert mixed.dtype == torch.float32 and not torch.equal(full, mixed)
    torch.testing.assert_close(full, mixed, rtol=0.05, atol=0.05)


def test_flip_changes_nothing_for_a_symmetric_model(cpu, image):
    torch.testing.assert_close(predict(Pointwise(), image, cpu, flip=True), predict(Pointwise(), image, cpu))


def test_flipped_image_is_predicted_and_flipped_back(cpu, image):
    class Left(nn.Module):  # class 0 in the left half and 1 in the right
        def forward(self, image):
            side = torch.where(torch.arange(image.shape[3]) * 2 >= image.shape[3], 50.0, -50.0)
            logits = torch.stack([-side, side]).expand(image.shape[0], image.shape[2], 2, -1).transpose(1, 2)
            return logits, logits

    both = predict(Left(), image, cpu, flip=True)
    torch.testing.assert_close(both[..., :16], torch.full((2, 2, 20, 16), 0.5), atol=1e-4, rtol=0)


def test_scales_are_averaged_as_softmaxes(cpu, image):
    model = Pointwise()
    parts = [predict(model, image, cpu, scales=[scale]) for scale in (0.5, 1, 2)]
    torch.testing.assert_close(predict(model, image, cpu, scales=[0.5, 1, 2]), sum(parts) / 3)
    assert model.sizes[:3] == [(10, 17), (20, 33), (40, 66)]


# ---- sliding window --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [(20, 33), (40, 50)])
def test_window_as_large_as_the_image_is_the_whole_image(cpu, image, window):
    model = Pointwise()
    assert torch.equal(predict(model, image, cpu, slide=window), predict(model, image, cpu))
    assert model.sizes == [(20, 33)] * 2


def test_windows_cover_the_image_and_end_at_its_border():
    model = Pointwise()
    image = torch.randn(1, 3, 20, 33)
    torch.testing.assert_close(slide_inference(model, image, (8, 16), (5, 9)), model.layer(image))
    assert model.sizes == [(8, 16)] * (4 * 3)  # tops 0 5 10 12, lefts 0 9 17


def test_stride_is_two_thirds_of_the_window_by_default():
    model = Pointwise()
    slide_inference(model, torch.randn(1, 3, 20, 33), (9, 15))
    assert len(model.sizes) == 3 * 3  # tops 0 6 11, lefts 0 10 18


# ---- image files -----------------------------------------------------------------------------------------------------


def save_images(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return [folder / name for name in names]


def test_folders_are_listed_by_their_images(tmp_path):
    inside = save_images(tmp_path / "photos", "a.png", "b.JPG")
    (tmp_path / "photos/notes.txt").write_text("")
    save_images(tmp_path / "photos/deeper", "c.png")
    alone = save_images(tmp_path, "d.png")
    assert list_images([tmp_path / "photos", *alone]) == inside + alone


def test_unusable_paths_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    save_images(tmp_path / "photos", "a.png"), save_images(tmp_path, "a.jpg")
    for paths in (["absent.png"], ["empty"], ["photos", "a.jpg"]):
        with pytest.raises(InputError) as error:
            list_images([tmp_path / path for path in paths])
        assert "--images" in str(error.value) and str(tmp_path / paths[-1]) in str(error.value)


def test_every_rank_takes_its_share(cpu, monkeypatch):
    shares = []
    for rank in range(3):
        monkeypatch.setattr(cpu, "rank", rank)
        monkeypatch.setattr(cpu, "world_size", 3)
        shares.append(list(rank_shard(range(8), cpu, "")))
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_overlay_is_the_mean_of_image_and_colors():
    image, colors = np.full((1, 2, 3), 200, np.uint8), np.array([[(128, 64, 128), (0, 0, 142)]], np.uint8)
    assert overlay(image, colors).tolist() == [[[164, 132, 164], [100, 100, 171]]]


def segment_by_red(model, image):
    """Class red % 19 for every pixel."""
    return image[:, 0].long() % 19


def test_images_are_colored_by_class(cpu, tmp_path):
    (path,) = save_images(tmp_path / "photos", "a.png")
    color_images(nn.Identity(), [path], tmp_path / "out", CITYSCAPES, cpu, segment_by_red)
    image = np.asarray(Image.open(path))
    colors = np.asarray(Image.open(tmp_path / "out/a.png"))
    assert np.array_equal(colors, CITYSCAPES.palette[image[..., 0] % 19])
    assert np.array_equal(Image.open(tmp_path / "out/a_overlay.png"), overlay(image, colors))
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_frames_are_colored_in_order_and_classes_counted(cpu, tmp_path):
    frames = [Image.new("RGB", (8, 4), (red, 0, 0)) for red in (0, 1, 2)]
    frames[0].save(tmp_path / "video.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[1].save(tmp_path / "alone.png")
    paths = [tmp_path / "video.webp", tmp_path / "alone.png"]
    pixels = color_images(nn.Identity(), paths, tmp_path / "out", CITYSCAPES, cpu, segment_by_red, legend=True)
    assert pixels.tolist() == [32, 64, 32] + 16 * [0]
    names = ("video_0000", "video_0001", "video_0002", "alone")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{name}{suffix}.png" for name in names for suffix in ("", "_overlay", "_legend")}
    for name, k in zip(names, (0, 1, 2, 1)):
        assert (np.asarray(Image.open(tmp_path / f"out/{name}.png")) == CITYSCAPES.palette[k]).all()
        Image.open(tmp_path / f"out/{name}_legend.png").verify()
    with pytest.raises(InputError, match="^--save .*video_0001.png"):
        frames[0].save(tmp_path / "out/video.webp", save_all=True, append_images=frames[1:], lossless=True)
        images = [tmp_path / "out/video.webp", tmp_path / "out/video_0001.png"]
        color_images(nn.Identity(), images, tmp_path / "out", CITYSCAPES, cpu, segment_by_red)


@pytest.mark.parametrize("names, folder", [(["a.png"], "."), (["a.png", "a_overlay.png"], "out")])
def test_images_are_not_overwritten(cpu, tmp_path, names, folder):
    paths = save_images(tmp_path, *names)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(InputError) as error:
        color_images(nn.Identity(), paths, tmp_path / folder, CITYSCAPES, cpu, segment_by_red)
    assert f"--save {tmp_path / folder}" in str(error.value)
    assert [path.read_bytes() for path in paths] == before and not (tmp_path / "out").exists()


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_keeps_the_mode_and_counts_every_pixel_once(cpu, data):
    modes = []

    def segment_as_road(model, image):
        modes.append(model.training)
        return torch.zeros_like(image[:, 0]).long()

    dataset, model = EvalDataset(find_samples(data, "val")), nn.Identity()
    for training in (True, False):
        model.train(training)
        confusion = evaluate(model, dataset, 19, cpu, segment_as_road)
        assert model.training is training
        assert confusion.counts.sum() == sum((label != 255).sum() for _, label in dataset)
        assert confusion.counts[:, 1:].sum() == 0
    assert modes == [False] * 10


def test_samples_show_both_predictions(cpu, data):
    dataset, model = EvalDataset(find_samples(data, "val")), Pointwise(19)
    samples = sample_predictions(model, dataset, cpu, count=2)
    assert len(samples) == 2
    for (image, label, final, aux), i in zip(samples, (0, 2)):
        expected, expected_label = dataset[i]
        assert np.array_equal(image, expected.permute(1, 2, 0)) and np.array_equal(label, expected_label)
        logits, region_logits = forward_image(model, expected[None], cpu)
        assert np.array_equal(final, logits[0].argmax(0)) and np.array_equal(aux, region_logits[0].argmax(0))


def test_export_writes_label_ids(cpu, data, tmp_path):
    export_split(nn.Identity(), data, "val", tmp_path, CITYSCAPES, cpu, segment_by_red)
    images = [sample.image for sample in find_samples(data, "val")]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in images}
    train_ids = np.asarray(Image.open(images[0]))[..., 0] % 19
    assert np.array_equal(Image.open(tmp_path / images[0].name), np.array(CITYSCAPES.ids)[train_ids])
