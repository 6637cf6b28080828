"""Ways to look at a photo: properties that hold for any model, with small ones made for them."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ocrnet.data.cityscapes import Sample, WholeImages, find_samples, instance_path, read_instances
from ocrnet.data.classes import AVERAGE_INSTANCE, CITYSCAPES
from ocrnet.data.transforms import to_input
from ocrnet.device import Accelerator
from ocrnet.inference import explain, predict, score, segment, sliding
from ocrnet.metrics import InstanceScore
from ocrnet.models import build_model


class Pointwise(nn.Module):
    """Logits of each pixel from that pixel alone, so that windows and mirrors cannot matter."""

    align_corners = False

    def __init__(self):
        super().__init__()
        self.seen = []
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, image):
        self.seen.append(tuple(image.shape[-2:]))
        logits = self.layer(image)
        return logits, logits


@pytest.fixture(scope="module")
def cpu():
    return Accelerator("cpu")


@pytest.fixture
def photo():
    return torch.randint(0, 256, (2, 3, 20, 33), dtype=torch.uint8)


def test_probabilities_of_a_pixel_sum_to_one(cpu, photo):
    probabilities = predict(Pointwise(), photo, cpu, scales=[0.5, 1, 1.5], flip=True)
    assert probabilities.shape == (2, 4, 20, 33) and probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, 20, 33))


def test_a_mirror_does_nothing_to_a_symmetric_model(cpu, photo):
    torch.testing.assert_close(predict(Pointwise(), photo, cpu, flip=True), predict(Pointwise(), photo, cpu))


def test_a_mirrored_photo_is_seen_and_turned_back(cpu, photo):
    class Left(nn.Module):  # says 0 in the left half and 1 in the right
        def forward(self, image):
            side = torch.where(torch.arange(image.shape[3]) * 2 >= image.shape[3], 50.0, -50.0)
            logits = torch.stack([-side, side]).expand(image.shape[0], image.shape[2], 2, -1).transpose(1, 2)
            return logits, logits

    both = predict(Left(), photo, cpu, flip=True)
    torch.testing.assert_close(both[..., :16], torch.full((2, 2, 20, 16), 0.5), atol=1e-4, rtol=0)


def test_the_result_is_the_mean_of_softmaxes_over_scales(cpu, photo):
    model = Pointwise()
    parts = [predict(model, photo, cpu, scales=[scale]) for scale in (0.5, 1, 2)]
    torch.testing.assert_close(predict(model, photo, cpu, scales=[0.5, 1, 2]), sum(parts) / 3)
    assert model.seen[:3] == [(10, 17), (20, 33), (40, 66)]


@pytest.mark.parametrize("window", [(20, 33), (40, 50)])
def test_a_window_as_large_as_the_image_is_the_whole_image(cpu, photo, window):
    model = Pointwise()
    assert torch.equal(predict(model, photo, cpu, slide=window), predict(model, photo, cpu))
    assert model.seen == [(20, 33)] * 2


def test_windows_cover_the_image_and_end_at_its_border():
    model = Pointwise()
    image = torch.randn(1, 3, 20, 33)
    torch.testing.assert_close(sliding(model, image, (8, 16), (5, 9)), model.layer(image))
    assert model.seen == [(8, 16)] * (4 * 3)  # tops 0 5 10 12, lefts 0 9 17


def test_an_explanation_is_what_the_network_computes(cpu):
    torch.manual_seed(0)
    photo, model = torch.randint(0, 256, (3, 65, 98), dtype=torch.uint8), build_model("hr18s").eval()
    seen = explain(model, photo, cpu)
    assert seen.m.shape == seen.w.shape == (19, 17, 25) and seen.f.shape == (19, 512)
    torch.testing.assert_close(seen.m.sum((1, 2)), torch.ones(19))
    torch.testing.assert_close(seen.w.sum(0), torch.ones(17, 25))
    torch.testing.assert_close(seen.final, predict(model, photo[None], cpu)[0])
    torch.testing.assert_close(seen.coarse.sum(0), torch.ones(65, 98))
    assert not torch.equal(seen.coarse, seen.final)
    with torch.no_grad():  # f and the final logits follow from m and w as the paper says
        image = to_input(photo[None]).contiguous(memory_format=torch.channels_last)
        x = model.head.pixel_head(model.backbone(image)[1])  # (1, 512, 17, 25)
        torch.testing.assert_close(seen.f, torch.einsum("khw,chw->kc", seen.m, x[0]))
        context = model.head.attention.delta(seen.f.T[None, :, :, None])[0, :, :, 0]  # (256, 19)
        y = model.head.attention.rho(torch.einsum("dk,khw->dhw", context, seen.w)[None])
        logits = model.resize(model.head.classifier(model.head.g(torch.cat([y, x], 1))), image)
        torch.testing.assert_close(seen.final, logits[0].softmax(0))
    assert not model.head.gather._forward_hooks
    coarse_and_final = [y.argmax(0).numpy() for y in (seen.final, seen.coarse)]
    assert all(np.array_equal(*pair) for pair in zip(segment(model, photo, cpu), coarse_and_final))


def test_scoring_leaves_training_mode_as_it_was_and_counts_every_pixel_once(cpu, data):
    class Road(nn.Module):
        align_corners = False

        def forward(self, image):
            assert not self.training
            logits = torch.zeros(image.shape[0], 19, *image.shape[-2:])
            logits[:, 0] = 1
            return logits, logits

    dataset, model = WholeImages(find_samples(data, "val")), Road().train()
    confusion = score(model, dataset, 19, cpu)
    assert model.training
    assert confusion.counts.sum() == sum((label != 255).sum() for _, label in dataset)
    assert confusion.counts[:, 1:].sum() == 0


def test_scoring_takes_the_photo_as_it_is_told_and_counts_instances(cpu, data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    samples = find_samples(tmp_path, "val")
    for sample in samples:  # all of a class is one instance
        label = np.asarray(Image.open(sample.label))
        ids = np.array([*CITYSCAPES.ids, *[0] * 237])[label]
        Image.fromarray((1000 * ids + (ids > 0)).astype(np.uint16)).save(instance_path(sample))
    sizes = torch.tensor([AVERAGE_INSTANCE.get(name, np.nan) for name in CITYSCAPES.names], dtype=torch.float64)
    found, expected = (InstanceScore(sizes, CITYSCAPES.category_of) for _ in range(2))
    seen = []

    def look(model, photo, accelerator):
        seen.append(photo)
        return nn.functional.one_hot(photo[:, 0].long() % 19, 19).movedim(3, 1)  # of the reds

    dataset = WholeImages(samples, instances=True)
    confusion = score(nn.Identity(), dataset, 19, cpu, 0, found, look)
    for (photo, label, instances), shown in zip(dataset, seen, strict=True):
        assert torch.equal(photo, shown[0]) and torch.equal(instances > 0, label < 255)
        expected.update(instances, photo[0].long() % 19)
    iou, iou_of_categories = found.iou(confusion)
    assert iou[13] > 0 and iou_of_categories[6] > 0
    for one, two in zip(found.iou(confusion), expected.iou(confusion)):
        torch.testing.assert_close(one, two, equal_nan=True)


def test_instances_are_numbered_by_class(tmp_path):
    ids = np.array([[7, 24, 24000, 24003], [26001, 29001, 33999, 0]], dtype=np.uint16)  # 24: a group of persons
    Image.fromarray(ids).save(tmp_path / "a_gtFine_instanceIds.png")
    sample = Sample(tmp_path / "a_leftImg8bit.png", tmp_path / "a_gtFine_labelTrainIds.png")
    assert read_instances(sample).tolist() == [[0, 0, 12000, 12003], [14001, 0, 19999, 0]]
    assert set(AVERAGE_INSTANCE) <= set(CITYSCAPES.names)
