"""--explain: its numbers are those of the network and of the labels."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ocrnet.data.classes import CITYSCAPES
from ocrnet.data.layout import find_images, find_sample
from ocrnet.data.transforms import preprocess
from ocrnet.device import Accelerator
from ocrnet.errors import InputError
from ocrnet.explain import (
    Explanation,
    draw_errors,
    draw_relation,
    explain,
    explain_images,
    find_label,
    most_confident_pixels,
    save_explanation,
)
from ocrnet.inference import forward_image, predict
from ocrnet.models import build_model
from ocrnet.visualize import plt


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
    torch.testing.assert_close(final, predict(model, image[None], cpu)[0])
    torch.testing.assert_close(aux, forward_image(model, image[None], cpu)[1][0].softmax(0))
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


def random_explanation():
    def probabilities():
        return torch.rand(19, 8, 16).softmax(0)

    return Explanation(
        torch.rand(19, 32).softmax(1).view(19, 4, 8), torch.rand(19, 6), torch.rand(19, 4, 8).softmax(0),
        probabilities(), probabilities(),
    )  # fmt: skip


def test_each_step_is_a_figure(tmp_path, monkeypatch):
    image, explanation = np.zeros((8, 16, 3), np.uint8), random_explanation()
    paths = save_explanation(str(tmp_path / "a"), image, explanation, CITYSCAPES, label=np.zeros((8, 16), np.uint8))
    assert sorted(tmp_path.iterdir()) == paths and len(paths) == 5
    assert all(Image.open(path).format == "PNG" for path in paths)
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, path, **_: Path(path).touch())  # drawing takes seconds
    paths = save_explanation(str(tmp_path / "b"), image, explanation, CITYSCAPES)
    assert sorted(tmp_path.glob("b_*")) == paths and len(paths) == 4 and not plt.get_fignums()


def test_relation_is_shown_at_the_place_of_the_pixel():
    image, w = np.zeros((8, 16, 3), np.uint8), random_explanation().w.numpy()
    figure = draw_relation(image, w, np.zeros((8, 16), int), [(0, 0), (15, 2)], CITYSCAPES)
    shown = figure.axes[1].images[0].get_array()
    assert np.array_equal(shown, [w[:, 0, 0], w[:, 1, 7]])
    plt.close(figure)


def test_most_confident_pixel_of_each_class_is_chosen():
    final, confidence = np.array([[3, 3, 7], [3, 7, 7]]), np.array([[0.2, 0.9, 0.3], [0.5, 0.8, 0.4]])
    assert most_confident_pixels(final, confidence) == [(1, 0), (1, 1)]


def test_corrected_pixels_are_green_and_broken_ones_red():
    label = np.array([[0, 0, 0, 255]])
    aux, final = np.array([[13, 0, 0, 0]]), np.array([[0, 13, 0, 13]])
    figure = draw_errors(label, aux, final, CITYSCAPES)
    change = figure.axes[3].images[0].get_array()
    assert change.tolist() == [[[0, 150, 0], [220, 0, 0], [255] * 3, [0] * 3]]
    shares = [re.findall(r"[\d.]+%", figure.axes[i].get_title()) for i in (1, 3)]
    assert shares == [["66.7%"], ["33.3%", "33.3%"]]  # right; corrected, broken
    plt.close(figure)


# ---- images and labels -----------------------------------------------------------------------------------------------


def test_label_is_found_for_images_of_the_data_set_only(data, tmp_path):
    image = find_images(data, "val")[0]
    assert np.array_equal(find_label(image, CITYSCAPES), Image.open(find_sample(image)[0].label))
    assert find_label(tmp_path / "street.jpg", CITYSCAPES) is None
    shutil.copytree(data, tmp_path / "data")
    image = tmp_path / "data" / image.relative_to(data)
    find_sample(image)[0].label.unlink()
    assert find_label(image, CITYSCAPES) is None


def test_label_of_other_classes_is_not_used(data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    rows = [{"name": name, "id": k, "train_id": k, "color": [0, 0, 0]} for k, name in enumerate(("road", "house"))]
    (tmp_path / "classes.json").write_text(json.dumps(rows))
    assert find_label(find_images(tmp_path, "val")[0], CITYSCAPES) is None


def test_label_of_another_size_is_named(data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    image = find_images(tmp_path, "val")[0]
    Image.new("RGB", (20, 10)).save(image)
    with pytest.raises(InputError) as error:
        find_label(image, CITYSCAPES)
    assert str(find_sample(image)[0].label) in str(error.value)


def test_pixel_outside_of_the_image_is_refused(cpu, model, data, tmp_path):
    image = find_images(data, "val")[0]
    for x, y in ((256, 0), (0, 128), (-1, 0)):
        with pytest.raises(InputError) as error:
            explain_images(model, [image], tmp_path / "out", CITYSCAPES, cpu, [(3, 4), (x, y)])
        assert f"--pixel {x} {y}" in str(error.value) and str(image) in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_model_without_regions_is_refused(cpu, data, tmp_path):
    with pytest.raises(InputError) as error:
        explain_images(build_model("hr18s", head="fcn"), find_images(data, "val"), tmp_path, CITYSCAPES, cpu)
    assert "--explain" in str(error.value)
