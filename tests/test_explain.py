"""--explain: its numbers are those of the network and of the labels, and its figures show them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ocrnet import InputError
from ocrnet.data.classes import CITYSCAPES
from ocrnet.data.transforms import preprocess
from ocrnet.device import Accelerator
from ocrnet.explain import draw_relation, draw_representations, explain, explain_images, most_confident_pixels
from ocrnet.inference import make_forward
from ocrnet.models import build_model
from ocrnet.plots import plt

NAMES = CITYSCAPES.names


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
    pickle.dumps(model.head)  # as before: nothing is left in it that has no name


def test_explanation_runs_in_mixed_precision(cpu, model, image):
    full, mixed = explain(model, image, cpu), explain(model, image, Accelerator("cpu", amp=True))
    for one, two in zip(full, mixed):
        assert two.dtype == torch.float32 and not torch.equal(one, two)
        assert (one - two).norm() < 0.3 * one.norm()


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explanation(cpu, model, image):
    return explain(model, image, cpu)


@pytest.fixture(scope="module")
def drawn(cpu, model, image, tmp_path_factory):
    """The figures of the image by the names of their files."""
    folder, figures = tmp_path_factory.mktemp("images"), {}
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "a.png")
    images = {folder / "a.png": Path("city/b")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ocrnet.explain.save_figure", lambda figure, path: figures.update({path: figure}))
        explain_images(model, images, folder / "out", CITYSCAPES, cpu)
        explain_images(model, images, folder / "small", CITYSCAPES, cpu, long_side=70)
    yield {str(path.relative_to(folder)): figure for path, figure in figures.items()}
    plt.close("all")


def shown(figure, axis):
    return figure.axes[axis].images[0].get_array()


def texts(labels):
    return [label.get_text() for label in labels]


def test_figures_are_those_of_the_image_at_its_own_size_or_at_its_long_side(drawn, image):
    image = Image.fromarray(image.permute(1, 2, 0).numpy())
    for name, axis in (("1_regions", 0), ("3_relation", 0)):
        assert np.array_equal(shown(drawn[f"out/city/b_{name}.png"], axis), image)
        small = image.resize((70, 46), Image.BILINEAR)
        assert np.array_equal(shown(drawn[f"small/city/b_{name}.png"], axis), small)


def test_figures_are_not_written_among_the_images(cpu, model, tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}: "):
        explain_images(model, {tmp_path / "a.png": Path("b")}, tmp_path, CITYSCAPES, cpu)


def test_regions_are_shown_in_multiples_of_the_mean_weight(drawn, explanation):
    (*axes, bar), m = drawn["out/city/b_1_regions.png"].axes, explanation.m
    assert len(axes) == 20 and not any(axis.axison for axis in axes)
    assert bar.get_xlim() == pytest.approx((0.01, 100)) and "1/N" in bar.get_xlabel()
    for axis, name, weights in zip(axes[1:], NAMES, m, strict=True):
        drawing = axis.images[0]
        np.testing.assert_allclose(drawing.get_array(), (weights * weights.numel()).clip(min=0.01), rtol=1e-5)
        assert drawing.norm([0.01, 1, 100, 1e4]).tolist() == pytest.approx([0, 0.5, 1, 1])  # 1/N is half way
        assert axis.get_title() == name and drawing.get_interpolation() == "nearest"


def test_representations_are_compared_by_their_cosines(drawn, explanation):
    (axis, bar), f = drawn["out/city/b_2_representations.png"].axes, explanation.f
    expected = F.cosine_similarity(f[:, None], f[None], dim=2)
    np.testing.assert_allclose(axis.images[0].get_array(), expected, rtol=1e-5)
    assert axis.images[0].get_clim() == bar.get_ylim() == (0, 1)
    assert texts(axis.get_xticklabels()) == texts(axis.get_yticklabels()) == NAMES
    numbers = {text.get_position(): float(text.get_text()) for text in axis.texts}
    assert all(abs(numbers[j, i] - expected[i, j]) < 0.00501 for i in range(19) for j in range(19))
    assert not shown(draw_representations(np.zeros((19, 4)), CITYSCAPES), 0).any()  # no nan


def test_relation_is_that_of_the_most_confident_pixels(drawn, explanation):
    where, matrix, bar = drawn["out/city/b_3_relation.png"].axes
    rows, names, pixels = [], [], []
    for k in explanation.final.argmax(0).unique().tolist():
        best = torch.where(explanation.final.argmax(0) == k, explanation.final.amax(0), 0).argmax()
        y, x = divmod(best.item(), 98)
        rows.append(explanation.w[:, y * 17 // 65, x * 25 // 98])
        names.append(f"{len(rows)}: {NAMES[k]} ({x}, {y})")
        pixels.append((x, y))
    np.testing.assert_allclose(matrix.images[0].get_array(), torch.stack(rows), rtol=1e-5)
    assert texts(matrix.get_xticklabels()) == NAMES and texts(matrix.get_yticklabels()) == names
    assert {len(text.get_text()) for text in matrix.texts} == {3}  # .25
    assert [text.get_position() for text in where.texts] == pixels and not where.axison
    assert texts(where.texts) == [str(i + 1) for i in range(len(pixels))]
    assert all((line.get_marker(), line.get_clip_on()) == ("o", False) for line in where.lines)  # whole at the border
    assert [tuple(line.get_xydata()[0]) for line in where.lines] == pixels
    assert bar.lines[0].get_ydata() == pytest.approx([1 / 19] * 2) and bar.texts[0].get_position()[1] == 1 / 19


def test_relation_is_shown_in_colors_that_fit_its_values():
    final, w = np.zeros((8, 16), int), np.full((19, 4, 4), 1 / 19)
    final[2, 15], w[:, 1, 3] = 5, np.arange(19) / 171
    figure = draw_relation(np.zeros((8, 16, 3)), w, final, final / 5, CITYSCAPES)
    assert figure.axes[1].images[0].get_clim() == pytest.approx((0, 2 / 19))  # 1/K is half way at most
    w[7, 1, 3] = 0.8
    figure = draw_relation(np.zeros((8, 16, 3)), w, final, final / 5, CITYSCAPES)
    assert figure.axes[1].images[0].get_clim() == pytest.approx((0, 0.8))
    many = draw_relation(np.zeros((1, 19, 3)), w, np.arange(19)[None], np.ones((1, 19)), CITYSCAPES)
    assert many.get_figheight() > 0.36 * 19 > figure.get_figheight()
    plt.close("all")


def test_segmentations_are_shown_with_what_changed_and_how_sure_it_is(drawn, explanation):
    figure = drawn["out/city/b_4_segmentations.png"]
    aux, final, confidence = explanation.aux.argmax(0), explanation.final.argmax(0), explanation.final.amax(0)
    colors, changed = CITYSCAPES.palette[final], (aux != final).numpy()
    changes = np.where(changed[:, :, None], colors, 255)
    parts = ("auxiliary", "final", f"{changed.mean():.1%}", f"{confidence.mean():.2f}")
    for i, expected in enumerate((CITYSCAPES.palette[aux], colors, changes, confidence)):
        np.testing.assert_allclose(shown(figure, i), expected)
        assert figure.axes[i].images[0].get_interpolation() == "nearest" and parts[i] in figure.axes[i].get_title()
    assert 0 < changed.mean() < 1 and figure.axes[3].images[0].get_clim() == figure.axes[4].get_ylim() == (0, 1)
    predicted = sorted({*aux.unique().tolist(), *final.unique().tolist()})
    assert texts(figure.legends[0].get_texts()) == [NAMES[k] for k in predicted]


def test_most_confident_pixel_of_each_class_is_chosen():
    final, confidence = np.array([[3, 3, 7], [3, 7, 7]]), np.array([[0.2, 0.9, 0.3], [0.5, 0.8, 0.4]])
    assert most_confident_pixels(final, confidence) == [(1, 0), (1, 1)]
    assert most_confident_pixels(np.array([[5, 5, 1, 2, 2]]), np.ones((1, 5)), count=2) == [(3, 0), (0, 0)]
    assert len(most_confident_pixels(np.arange(50)[None], np.ones((1, 50)))) == 20
