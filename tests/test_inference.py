"""Inference and evaluation: properties that hold for every model, tested with small ones."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ocrnet import InputError
from ocrnet.data.classes import CITYSCAPES, ClassTable
from ocrnet.data.datasets import EvalDataset, find_samples, read_label
from ocrnet.data.transforms import preprocess
from ocrnet.device import Accelerator
from ocrnet.evaluation import evaluate, sample_predictions
from ocrnet.inference import list_images, make_forward, rank_shard, slide_inference, write_predictions


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


def test_one_pass_gives_the_outputs_for_the_normalized_image(cpu, image):
    model = Pointwise()
    logits, region_logits = make_forward(model, cpu)(image)
    torch.testing.assert_close(logits, model.layer(preprocess(image)))
    assert torch.equal(region_logits, -logits) and not logits.requires_grad


def probabilities(model, image, accelerator, **options):
    """What the closure gives, as probabilities."""
    output, *others = make_forward(model, accelerator, **options)(image)
    return output.softmax(1) if others else output  # one pass gives logits, and region_logits


def test_probabilities_of_a_pixel_sum_to_one(cpu, image):
    found = probabilities(Pointwise(), image, cpu, scales=[0.5, 1, 1.5], flip=True)
    assert found.shape == (2, 4, 20, 33) and found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(2, 20, 33))


def test_mixed_precision_is_that_of_the_accelerator(image):
    model = Pointwise()
    full, mixed = (probabilities(model, image, Accelerator("cpu", amp=amp), flip=True) for amp in (False, True))
    assert mixed.dtype == torch.float32 and not torch.equal(full, mixed)
    torch.testing.assert_close(full, mixed, rtol=0.05, atol=0.05)


def test_flip_changes_nothing_for_a_symmetric_model(cpu, image):
    torch.testing.assert_close(
        probabilities(Pointwise(), image, cpu, flip=True), probabilities(Pointwise(), image, cpu)
    )


def test_flipped_image_is_predicted_and_flipped_back(cpu, image):
    class Left(nn.Module):  # class 0 in the left half and 1 in the right
        align_corners = False

        def forward(self, image):
            side = torch.where(torch.arange(image.shape[3]) * 2 >= image.shape[3], 50.0, -50.0)
            logits = torch.stack([-side, side]).expand(image.shape[0], image.shape[2], 2, -1).transpose(1, 2)
            return logits, logits

    both = probabilities(Left(), image, cpu, flip=True)
    torch.testing.assert_close(both[..., :16], torch.full((2, 2, 20, 16), 0.5), atol=1e-4, rtol=0)


def test_scales_are_averaged_as_softmaxes(cpu, image):
    model = Pointwise()
    parts = [probabilities(model, image, cpu, scales=[scale]) for scale in (0.5, 1, 2)]
    torch.testing.assert_close(probabilities(model, image, cpu, scales=[0.5, 1, 2]), sum(parts) / 3)
    assert model.sizes[:3] == [(10, 17), (20, 33), (40, 66)]
    probabilities(model, image, cpu, scales=[0.01])
    assert model.sizes[-1] == (1, 1)


# ---- sliding window --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [(20, 33), (40, 50)])
def test_window_as_large_as_the_image_is_the_whole_image(cpu, image, window):
    model = Pointwise()
    torch.testing.assert_close(probabilities(model, image, cpu, slide=window), probabilities(model, image, cpu))
    assert model.sizes == [(20, 33)] * 2


def test_windows_cover_the_image_and_end_at_its_border():
    model = Pointwise()
    image = torch.randn(1, 3, 20, 33)
    torch.testing.assert_close(slide_inference(model, image, (8, 15)), model.layer(image))
    assert model.sizes == [(8, 15)] * (4 * 3)  # two thirds of a window apart: tops 0 5 10 12, lefts 0 10 18


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
    assert list(list_images([tmp_path / "photos", *alone])) == inside + alone


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


def by_red(image):
    """Logits of which class red % 19 is the highest."""
    return (nn.functional.one_hot(image[:, 0].long() % 19, 19).permute(0, 3, 1, 2).float(),)


def test_images_are_colored_by_class_and_exported_as_ids(cpu, tmp_path):
    images = list_images(save_images(tmp_path / "photos", "a.png", "b.jpg"))
    write_predictions(by_red, images, CITYSCAPES, cpu, tmp_path / "out", tmp_path / "ids")
    image = np.asarray(Image.open(tmp_path / "photos/a.png"))
    classes = image[..., 0] % 19
    colors, mixed = (np.asarray(Image.open(tmp_path / f"out/{name}.png")).astype(int) for name in ("a", "a_overlay"))
    assert np.array_equal(colors, CITYSCAPES.palette[classes])
    assert np.array_equal(mixed, (image.astype(int) + colors) // 2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "a.png", "a_overlay.png", "b.png", "b_overlay.png", "legend.png",
    }  # fmt: skip
    legend = np.asarray(Image.open(tmp_path / "out/legend.png")).reshape(-1, 3)
    assert all((legend == color).all(1).any() for color in CITYSCAPES.palette[:19])
    assert sorted(path.name for path in (tmp_path / "ids").iterdir()) == ["a.png", "b.png"]
    assert np.array_equal(Image.open(tmp_path / "ids/a.png"), np.array(CITYSCAPES.ids)[classes])
    table = ClassTable([label._replace(id=-1) for label in CITYSCAPES.labels])
    write_predictions(by_red, images, table, cpu, export=tmp_path / "colors")
    assert np.array_equal(read_label(tmp_path / "colors/a.png", table), classes)


def test_only_own_outputs_are_overwritten(cpu, tmp_path):
    a, b, overlay = save_images(tmp_path, "a.png", "b.png", "a_overlay.png")
    before = a.read_bytes()
    for _ in range(2):  # the second time over its own images
        write_predictions(by_red, list_images([a]), CITYSCAPES, cpu, tmp_path / "out")
    Image.open(a).save(tmp_path / "out/b.png")
    with pytest.raises(InputError, match=f"^{tmp_path / 'out/b.png'}: "):
        write_predictions(by_red, list_images([b]), CITYSCAPES, cpu, tmp_path / "out")
    assert a.read_bytes() == before
    with pytest.raises(InputError, match="^--save: "):  # the overlay of a.png would be both
        write_predictions(by_red, list_images([a, overlay]), CITYSCAPES, cpu, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_outputs_are_not_written_among_the_images(cpu, tmp_path):
    images = list_images(save_images(tmp_path, "a.jpg"))  # a.png beside it would be an image of the same name
    for folder in ("save", "export"):
        with pytest.raises(InputError, match=f"^{tmp_path}: "):
            write_predictions(by_red, images, CITYSCAPES, cpu, **{folder: tmp_path})
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_counts_every_pixel_once_and_averages_the_criterion(cpu, data):
    dataset = EvalDataset(find_samples(data, "val"), CITYSCAPES)
    means = []

    def criterion(outputs, label):
        assert outputs[0].shape[-2:] == label.shape[-2:] and label.dtype == torch.int64
        means.append(label.float().mean())
        return means[-1], None

    confusion, loss = evaluate(by_red, dataset, 19, cpu, criterion=criterion)
    expected = torch.zeros(19, dtype=torch.int64)
    for image, label in dataset:
        expected += torch.bincount(image[0][label != 255] % 19, minlength=19)
    assert confusion.counts.sum(0).tolist() == expected.tolist()
    assert len(means) == 5 and loss == pytest.approx(sum(means).item() / 5)


def test_samples_show_both_predictions(cpu, data):
    dataset, model = EvalDataset(find_samples(data, "val"), CITYSCAPES), Pointwise(19)
    samples = sample_predictions(make_forward(model, cpu), dataset, count=3)
    for (image, label, final, aux), i in zip(samples, (0, 1, 3), strict=True):  # spread over five
        expected, expected_label = dataset[i]
        assert np.array_equal(image, expected.permute(1, 2, 0)) and np.array_equal(label, expected_label)
        logits, region_logits = make_forward(model, cpu)(expected[None])
        assert np.array_equal(final, logits[0].argmax(0)) and np.array_equal(aux, region_logits[0].argmax(0))


def test_an_enlarged_photo_is_seen_at_the_size_of_training(cpu):
    model = Pointwise()
    small = torch.zeros(1, 3, 8, 12, dtype=torch.uint8)
    small[:, 0, :, 6:], small[:, 1, 4:] = 250, 200
    expected = make_forward(model, cpu)(small)[0].argmax(1)
    large = small.repeat_interleave(30, dim=2).repeat_interleave(30, dim=3)
    logits, region_logits = make_forward(model, cpu, long_side=12)(large)
    assert model.sizes == [(8, 12)] * 2 and logits.shape == region_logits.shape == (1, 4, 240, 360)
    assert (logits.argmax(1) == expected.repeat_interleave(30, 1).repeat_interleave(30, 2)).float().mean() > 0.9
