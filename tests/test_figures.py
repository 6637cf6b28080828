"""Figures show the numbers that they are given, and those of --explain are the network's."""

import importlib
import pickle
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_logs import VAL, write
from torch import nn

from ocrnet import InputError, explain, plots
from ocrnet.data.classes import CITYSCAPES, ClassTable, Label
from ocrnet.data.datasets import EvalDataset, find_samples
from ocrnet.data.transforms import preprocess
from ocrnet.device import Accelerator
from ocrnet.inference import make_forward
from ocrnet.logs import Log
from ocrnet.metrics import ConfusionMatrix
from ocrnet.models import build_model
from ocrnet.plots import IGNORED, RIGHT, class_legend, draw_matrix, image_axes, plt

NAMES, CPU = CITYSCAPES.names, Accelerator("cpu")
IMAGE = torch.randint(0, 256, (3, 65, 98), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be saved, by the names of their files. All are closed in the end."""
    figures = {}
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.update({path.name: figure}))
    yield figures
    plt.close("all")
    assert all(figure.get_layout_engine() for figure in figures.values())  # nothing overlaps


def texts(labels):
    return [label.get_text() for label in labels]


def shown(axis):
    return axis.images[0].get_array()


def test_axes_have_the_shape_of_the_image_at_most_twice_as_tall_as_wide(figures):
    for height, inches in ((10, 2 * (1.5 + 0.2) + 0.5), (90, 2 * (6 + 0.2) + 0.5)):
        figure, axes = image_axes(np.zeros((height, 20, 3)), 2, 3, width=3.0, margin=0.5, title=0.2)
        assert figure.get_size_inches().tolist() == pytest.approx([9, inches])
        assert len(axes) == 6 and not any(axis.axison for axis in axes)


def test_figures_are_written_without_a_screen_at_100_pixels_an_inch_and_closed(tmp_path):
    matplotlib.use("svg")
    importlib.reload(plots)
    assert matplotlib.get_backend().lower() == "agg"
    for _ in range(2):  # the second time over the first
        figure = plt.figure(figsize=(2, 1))
        plots.save_figure(figure, tmp_path / "a/b/x.png")
    assert Image.open(tmp_path / "a/b/x.png").size == (200, 100) and not plt.fignum_exists(figure.number)


def test_matrix_shows_its_numbers_at_their_places(figures):
    _, axis = plt.subplots()
    values = np.array([[0.5, 2.0, 1.21], [0.009, np.nan, 0.01]])
    image = draw_matrix(axis, values, ["a", "b"], ["c", "d", "e"], 2, "{:.2f}", "magma")
    numbers = [(*x.get_position(), x.get_text(), x.get_color()) for x in axis.texts if x.get_ha() == "center"]
    assert numbers == [(0, 0, ".50", "white"), (1, 0, "2.00", "black"), (2, 0, "1.21", "black"), (2, 1, ".01", "white")]
    assert texts(axis.get_xticklabels()) == ["c", "d", "e"] and texts(axis.get_yticklabels()) == ["a", "b"]
    assert {label.get_rotation() for label in axis.get_xticklabels()} == {45}  # or long names overlap
    assert np.array_equal(image.get_array(), values, equal_nan=True) and image.get_clim() == (0, 2)


def test_legend_has_the_colors_of_the_classes_in_rows_that_are_about_equally_long(figures):
    figure, narrow = plt.figure(figsize=(13, 3)), plt.figure(figsize=(1, 3))
    class_legend(figure, [*range(11), 255], CITYSCAPES)  # eight fit in a row
    (legend,) = figure.legends
    figure.draw_without_rendering()
    rows = Counter(round(text.get_window_extent().y0) for text in legend.get_texts())
    assert texts(legend.get_texts()) == NAMES[:11] and sorted(rows.values()) == [5, 6]
    colors = [patch.get_facecolor()[:3] for patch in legend.get_patches()]
    np.testing.assert_allclose(colors, CITYSCAPES.palette[:11] / 255)
    class_legend(narrow, range(2), CITYSCAPES), class_legend(narrow, [], CITYSCAPES)
    assert figure.get_figheight() == narrow.get_figheight() == pytest.approx(3.2)  # two rows


def test_scores_are_those_of_the_confusion_matrix(tmp_path, figures):
    confusion = ConfusionMatrix(19)
    confusion.update(torch.tensor([0, 0, 0, 0, 13]), torch.tensor([0, 0, 0, 13, 13]))
    plots.save_scores(tmp_path / "scores.png", confusion, CITYSCAPES, "it. 4")
    bars, matrix, color_bar = figures["scores.png"].axes
    widths = [{0: 75, 13: 50}.get(k, 0) for k in range(19)]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(widths)
    np.testing.assert_allclose([bar.get_facecolor()[:3] for bar in bars.patches], CITYSCAPES.palette[:19] / 255)
    numbers = ["75.0" if k == 0 else "50.0" if k == 13 else "does not occur" for k in range(19)]
    assert texts(bars.texts) == numbers and "62.50" in bars.get_title()
    assert [text.get_position() for text in bars.texts] == [(width + 1, k) for k, width in enumerate(widths)]
    assert texts(bars.get_yticklabels()) == texts(matrix.get_yticklabels()) == texts(matrix.get_xticklabels()) == NAMES
    assert bars.get_ylim() == (18.5, -0.5) and bars.get_xlim() == pytest.approx((0, 112))  # the first on top
    shares = {text.get_position(): text.get_text() for text in matrix.texts}
    assert shares == {(0, 0): "75", (13, 0): "25", (13, 13): "100"} and np.ma.getmaskarray(shown(matrix))[1].all()
    assert [matrix.get_xlabel(), matrix.get_ylabel(), *texts(matrix.figure.texts)] == ["prediction", "label", "it. 4"]
    assert matrix.images[0].get_clim() == color_bar.get_ylim() == (0, 100) and "%" in color_bar.get_ylabel()
    confusion = ConfusionMatrix(60)
    confusion.update(torch.arange(60), torch.arange(60))
    many = ClassTable([Label(str(k), k, k, (k, k, k)) for k in range(60)])
    plots.save_scores(tmp_path / "many.png", confusion, many, "")
    assert 12 <= figures["many.png"].get_figheight() < 40 and not figures["many.png"].axes[1].texts


@pytest.mark.parametrize("outputs", [1, 2])
def test_samples_show_label_predictions_and_errors(tmp_path, figures, outputs):
    rng = np.random.default_rng(0)
    image, tall = rng.integers(0, 256, (4, 8, 3), dtype=np.uint8), np.zeros((16, 8, 3), np.uint8)
    label, *predictions = (rng.integers(low, low + 5, (4, 8)) for low in (0, 4, 9)[: 1 + outputs])
    label[0, 0] = 255
    plots.save_samples(tmp_path / "x.png", [(x, label, *predictions) for x in (image, tall, image)], CITYSCAPES)
    axes, legend = figures["x.png"].axes, figures["x.png"].legends[0]
    errors = np.where((label == predictions[0])[..., None], RIGHT, CITYSCAPES.palette[predictions[0]])
    errors[0, 0] = IGNORED
    maps = [*(CITYSCAPES.palette[x] for x in (label, *predictions)), errors]
    for axis, expected in zip(axes, [*(image, *maps), *(tall, *maps), *(image, *maps)], strict=True):
        assert np.array_equal(shown(axis), expected) and axis.images[0].get_interpolation() == "nearest"
    names = ["image", "label", "final", *["auxiliary"][: outputs - 1], "errors"]
    titles = [axis.get_title().partition(" ")[0].strip(",") for axis in axes]
    assert titles == [*names, *[""] * 2 * len(names)]  # above the first row
    assert figures["x.png"].get_figheight() > 3 * 6 and texts(legend.get_texts()) == NAMES[:9]


def test_curves_are_those_of_the_logs(tmp_path, figures):
    train = [{"iter": 10 * i, "loss": 30 - i, "lr": 0.01 / (i + 1)} for i in range(15)]
    val = [{"iter": 20, "mIoU": 0.25, "loss": 7}, {"iter": 40, "mIoU": 0.5, "loss": 6}]
    plots.plot_curves([Log("a", train, val), Log("b", train[:1], [])], tmp_path / "x.png")
    iters, losses, rates = ([entry[key] for entry in train] for key in ("iter", "loss", "lr"))
    smoothed = ("a, mean of 2 entries", iters, [30, *(30.5 - i for i in range(1, 15))], "C0")
    expected = {
        ("loss", "loss"): [smoothed, ("a, validation", [20, 40], [7, 6], "C0o"), ("b", [0], [30], "C1o")],
        ("learning rate", "learning rate"): [("a", iters, rates, "C0"), ("b", [0], [0.01], "C1o")],
        ("validation", "mIoU (%)"): [("a", [20, 40], [25, 50], "C0o")],
    }
    for axis, (names, lines) in zip(figures["x.png"].axes, expected.items(), strict=True):
        assert (axis.get_title(), axis.get_ylabel(), axis.get_xlabel()) == (*names, "iteration")
        named = [x for x in axis.lines if not x.get_label().startswith("_")]
        assert [(x.get_label(), *map(list, x.get_data()), x.get_color() + x.get_marker()) for x in named] == lines
        assert texts(axis.get_legend().get_texts()) == [line[0] for line in lines]
    loss, lr, score = figures["x.png"].axes
    assert [list(x) for x in loss.lines[0].get_data()] == [iters, losses] and loss.lines[0].get_alpha() < 1  # pale
    assert [(text.get_text(), text.xy) for text in score.texts] == [("50.00", (40, 50))] and not loss.texts + lr.texts


def test_the_figures_of_a_run_are_drawn_from_its_log_its_data_and_its_scores(tmp_path, figures, data):
    write(tmp_path / "run/log.jsonl", VAL)
    dataset, logits = EvalDataset(find_samples(data, "val"), CITYSCAPES), torch.zeros(1, 19, 128, 256)
    plots.draw_run(tmp_path / "run", lambda image: (logits, logits), dataset, ConfusionMatrix(19), "iteration 4")
    assert {name: len(x.axes) for name, x in figures.items()} == {"curve.png": 3, "samples.png": 20, "scores.png": 3}
    loss, lr, score = figures["curve.png"].axes
    assert texts(score.get_legend().get_texts()) == ["run"] and loss.get_legend() is None
    assert texts(loss.texts) == texts(lr.texts) == ["none in the log"] != texts(score.texts)
    plots.plot_curves(11 * [Log("a", [], [VAL])], tmp_path / "x.png")
    assert [line.get_color() for line in figures["x.png"].axes[2].lines] == [f"C{i % 10}" for i in range(11)]


@pytest.fixture(scope="module")
def model():
    """A random model in evaluation mode, whose softmaxes for the image are neither uniform nor one-hot."""
    torch.manual_seed(0)
    model = build_model("hr18s").eval()
    for layer in model.backbone.train().modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # running statistics become those of the image
    for classifier in (model.head.region_head[-1], model.head.classifier[-1]):
        nn.init.normal_(classifier.weight, std=0.03)
    with torch.no_grad():
        model(preprocess(IMAGE[None]))
    return model.eval()


@pytest.fixture(scope="module")
def explanation(model):
    return explain.explain(model, IMAGE, CPU)


def test_explanation_is_what_the_network_computes_also_in_mixed_precision(model, explanation):
    m, f, w, aux, final = explanation
    assert m.shape == w.shape == (19, 17, 25) and f.shape == (19, 512)
    outputs = make_forward(model, CPU)(IMAGE[None])
    for found, logits in zip((final, aux), outputs, strict=True):
        torch.testing.assert_close(found, logits[0].softmax(0))
    assert not torch.equal(aux, final) and min(x.std() for x in (w, aux, final)) > 0.03
    with torch.no_grad():  # f and the final logits follow from m and w by the paper's formulas
        normalized = preprocess(IMAGE[None]).contiguous(memory_format=torch.channels_last)
        x = model.head.pixel_head(model.backbone(normalized)[1])  # (1, 512, 17, 25)
        torch.testing.assert_close(f, torch.einsum("khw,chw->kc", m, x[0]))
        v = model.head.attention.delta(f.T[None, :, :, None])[0, :, :, 0]  # (256, 19)
        y = model.head.attention.rho(torch.einsum("dk,khw->dhw", v, w)[None])
        logits = model.resize(model.head.classifier(model.head.g(torch.cat([y, x], 1))), normalized)
        torch.testing.assert_close(final, logits[0].softmax(0))
    for one, two in zip(explanation, explain.explain(model, IMAGE, Accelerator("cpu", amp=True)), strict=True):
        assert two.dtype == torch.float32 and 0 < (one - two).norm() < 0.3 * one.norm()
    pickle.dumps(model.head)  # as before: nothing is left in it that has no name


@pytest.fixture(scope="module")
def explained(model, tmp_path_factory):
    """The figures of the image by their folders and their files' names."""
    folder, figures = tmp_path_factory.mktemp("images"), {}
    Image.fromarray(IMAGE.permute(1, 2, 0).numpy()).save(folder / "a.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain, "save_figure", lambda figure, path: figures.update({path: figure}))
        explain.explain_images(model, {folder / "a.png": Path("city/b")}, folder / "out", CITYSCAPES, CPU)
        explain.explain_images(model, {folder / "a.png": Path("b")}, folder / "small", CITYSCAPES, CPU, long_side=70)
        with pytest.raises(InputError, match=f"^{folder}: "):  # among the images
            explain.explain_images(model, {folder / "a.png": Path("b")}, folder, CITYSCAPES, CPU)
    assert all(figure.get_layout_engine() for figure in figures.values())  # nothing overlaps
    yield {str(path.relative_to(folder)): figure for path, figure in figures.items()}
    plt.close("all")


def test_regions_are_shown_in_multiples_of_the_mean_weight(explained, explanation):
    *axes, bar = explained["out/city/b_1_regions.png"].axes
    image = Image.fromarray(IMAGE.permute(1, 2, 0).numpy())
    small = shown(explained["small/b_1_regions.png"].axes[0])
    assert np.array_equal(shown(axes[0]), image) and np.array_equal(small, image.resize((70, 46), Image.BILINEAR))
    assert len(axes) == 20 and not any(axis.axison for axis in axes) and texts(bar.figure.texts)[0].startswith("1.")
    assert bar.get_xlim() == pytest.approx((0.01, 100)) and "1/N" in bar.get_xlabel()
    for axis, name, weights in zip(axes[1:], NAMES, explanation.m, strict=True):
        np.testing.assert_allclose(shown(axis), (weights * weights.numel()).clip(min=0.01), rtol=1e-5)
        assert axis.images[0].norm([0.01, 1, 100, 1e4]).tolist() == pytest.approx([0, 0.5, 1, 1])  # 1/N half way
        assert axis.get_title() == name and axis.images[0].get_interpolation() == "nearest"
    ten = ClassTable(label for label in CITYSCAPES.labels if label.train_id < 10)
    axes = explain.draw_regions(np.zeros((1, 1, 3)), np.ones((10, 1, 1)), ten).axes
    assert [axis.get_title() for axis in axes[1:11]] == NAMES[:10] and len(axes) == 16


def test_representations_are_compared_by_their_cosines(explained, explanation):
    axis, bar = explained["out/city/b_2_representations.png"].axes
    expected = F.cosine_similarity(explanation.f[:, None], explanation.f[None], dim=2)
    np.testing.assert_allclose(shown(axis), expected, rtol=1e-5)
    assert axis.images[0].get_clim() == bar.get_ylim() == (0, 1) and "cosine" in bar.get_ylabel()
    assert texts(axis.get_xticklabels()) == texts(axis.get_yticklabels()) == NAMES
    assert not shown(explain.draw_representations(np.zeros((19, 4)), CITYSCAPES).axes[0]).any()  # no nan


def test_relation_is_that_of_the_most_confident_pixels(explained, explanation):
    where, matrix, bar = explained["out/city/b_3_relation.png"].axes
    predicted, rows, names, marks = explanation.final.argmax(0), [], [], []
    for number, k in enumerate(predicted.unique().tolist(), 1):
        y, x = divmod(torch.where(predicted == k, explanation.final.amax(0), 0).argmax().item(), 98)
        rows.append(explanation.w[:, y * 17 // 65, x * 25 // 98])
        names.append(f"{number}: {NAMES[k]} ({x}, {y})")
        marks.append((x, y, "o", False, x, y, str(number)))  # whole at the border
    np.testing.assert_allclose(shown(matrix), torch.stack(rows), rtol=1e-5)
    assert texts(matrix.get_xticklabels()) == NAMES and texts(matrix.get_yticklabels()) == names
    labels = matrix.get_xlabel(), matrix.get_ylabel(), bar.get_ylabel()
    assert all(labels) and texts(bar.figure.texts)[0].startswith("3.")
    assert {len(text.get_text()) for text in matrix.texts} == {3} and not where.axison  # .25
    assert marks == [
        (*line.get_xydata()[0], line.get_marker(), line.get_clip_on(), *text.get_position(), text.get_text())
        for line, text in zip(where.lines, where.texts, strict=True)
    ]
    assert bar.lines[0].get_ydata() == pytest.approx([1 / 19] * 2) and bar.texts[0].get_position()[1] == 1 / 19


def test_relation_is_shown_for_the_frequent_classes_in_colors_that_fit_its_values(figures):
    final, w = np.arange(19)[None].repeat(8, axis=0), np.full((19, 4, 4), 1 / 19)
    for largest, top in ((1 / 19, 2 / 19), (0.8, 0.8)):  # 1/K is half way at most
        w[7, 0, 3] = largest
        figure = explain.draw_relation(np.zeros((8, 19, 3)), w, final, np.ones((8, 19)), CITYSCAPES)
        assert figure.axes[1].images[0].get_clim() == pytest.approx((0, top)) and figure.get_figheight() > 0.36 * 19
    assert explain.draw_relation(np.zeros((8, 19, 3)), w, 0 * final, final / 19, CITYSCAPES).get_figheight() < 0.36 * 19
    assert explain.most_confident_pixels(np.array([[5, 5, 1, 2, 2]]), np.ones((1, 5)), count=2) == [(3, 0), (0, 0)]
    assert len(explain.most_confident_pixels(np.arange(50)[None], np.ones((1, 50)))) == 20


def test_segmentations_are_shown_with_what_changed_and_how_sure_it_is(explained, explanation):
    *axes, bar = explained["out/city/b_4_segmentations.png"].axes
    aux, final, confidence = explanation.aux.argmax(0), explanation.final.argmax(0), explanation.final.amax(0)
    changed, colors = (aux != final).numpy(), CITYSCAPES.palette[final]
    images = (CITYSCAPES.palette[aux], colors, np.where(changed[:, :, None], colors, 255), confidence)
    titles = ("auxiliary", "final", f"{changed.mean():.1%}", f"{confidence.mean():.2f}")
    for axis, expected, title in zip(axes, images, titles, strict=True):
        np.testing.assert_allclose(shown(axis), expected)
        assert title in axis.get_title() and axis.images[0].get_interpolation() == "nearest"
    assert 0 < changed.mean() < 1 and axes[3].images[0].get_clim() == bar.get_ylim() == (0, 1)
    assert texts(bar.figure.texts)[0].startswith("4.")
    assert texts(bar.figure.legends[0].get_texts()) == [NAMES[k] for k in torch.cat([aux, final]).unique()]
