"""--explain: its numbers are those of the network and of the labels."""

import numpy as np
import pytest
import torch
from torch import nn

from ocrnet.data.classes import CITYSCAPES
from ocrnet.data.transforms import preprocess
from ocrnet.device import Accelerator
from ocrnet.explain import draw_relation, explain, most_confident_pixels
from ocrnet.inference import make_forward
from ocrnet.models import build_model
from ocrnet.plots import plt


@pytest.fixture(scope="module")
def cpu():
    return Accelerator("cpu")


@pytest.fixture(scope="module")
def image():
    return torch.randint(0, 256, (3, 65, 98), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(image):
    """A random model in evaluation mode, whose softmaxes for the image are neither uniform nor one-hot."""
    torch.manual_seed(0)
    model = build_model("hr18s").eval()
    for layer in model.backbone.train().modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # running statistics become those of the image
    for classifier in (model.head.region_head[-1], model.head.classifier[-1]):
        nn.init.normal_(classifier.weight, std=0.03)
    with torch.no_grad():
        model(preprocess(image[None]))
    return model.eval()


def test_explanation_is_what_the_network_computes(cpu, model, image):
    m, f, w, aux, final = explain(model, image, cpu)
    assert m.shape == w.shape == (19, 17, 25) and f.shape == (19, 512)
    torch.testing.assert_close(m.sum((1, 2)), torch.ones(19))
    torch.testing.assert_close(w.sum(0), torch.ones(17, 25))
    outputs = make_forward(model, cpu)(image[None])
    for found, logits in zip((final, aux), outputs, strict=True):
        torch.testing.assert_close(found, logits[0].softmax(0))
    assert not torch.equal(aux, final) and min(x.std() for x in (w, aux, final)) > 0.03
    with torch.no_grad():  # f and the final logits follow from m and w by the paper's formulas
        normalized = preprocess(image[None]).contiguous(memory_format=torch.channels_last)
        x = model.head.pixel_head(model.backbone(normalized)[1])  # (1, 512, 17, 25)
        torch.testing.assert_close(f, torch.einsum("khw,chw->kc", m, x[0]))
        v = model.head.attention.delta(f.T[None, :, :, None])[0, :, :, 0]  # (256, 19)
        y = model.head.attention.rho(torch.einsum("dk,khw->dhw", v, w)[None])
        logits = model.resize(model.head.classifier(model.head.g(torch.cat([y, x], 1))), normalized)
        torch.testing.assert_close(final, logits[0].softmax(0))
    assert not model.head.gather._forward_hooks


def test_explanation_runs_in_mixed_precision(cpu, model, image):
    full, mixed = explain(model, image, cpu), explain(model, image, Accelerator("cpu", amp=True))
    for one, two in zip(full, mixed):
        assert two.dtype == torch.float32 and not torch.equal(one, two)
        assert (one - two).norm() < 0.3 * one.norm()


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_relation_is_shown_at_the_place_of_the_pixel_in_colors_that_fit_its_values():
    image, w = np.zeros((8, 16, 3), np.uint8), (3 * torch.rand(19, 4, 8)).softmax(0).numpy()
    final, confidence = np.zeros((8, 16), int), np.zeros((8, 16))
    final[2, 15], confidence[2, 15], confidence[0, 0] = 5, 1, 1
    figure = draw_relation(image, w, final, confidence, CITYSCAPES)
    shown = figure.axes[1].images[0]
    assert np.array_equal(shown.get_array(), [w[:, 0, 0], w[:, 1, 7]])
    assert shown.get_clim() == pytest.approx((0, max(shown.get_array().max(), 2 / 19)))  # 1/K is half way at most
    plt.close(figure)


def test_most_confident_pixel_of_each_class_is_chosen():
    final, confidence = np.array([[3, 3, 7], [3, 7, 7]]), np.array([[0.2, 0.9, 0.3], [0.5, 0.8, 0.4]])
    assert most_confident_pixels(final, confidence) == [(1, 0), (1, 1)]
    assert len(most_confident_pixels(np.arange(50)[None], np.ones((1, 50)))) == 20
