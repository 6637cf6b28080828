"""Figures show the numbers that they are given."""

import importlib
from collections import Counter

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from test_logs import TRAIN, write

from ocrnet import plots
from ocrnet.data.classes import CITYSCAPES, ClassTable, Label
from ocrnet.data.datasets import EvalDataset, find_samples
from ocrnet.logs import Log
from ocrnet.metrics import ConfusionMatrix
from ocrnet.plots import IGNORED, RIGHT, class_legend, draw_matrix, error_map, image_axes, plt

MANY = ClassTable([Label(f"class number {k}", k, k, (k, k, k)) for k in range(60)])


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """The figures that would be saved, by the names of their files."""
    figures = {}
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: figures.update({str(path.relative_to(tmp_path)): figure})
    )
    yield figures
    plt.close("all")


def texts(labels):
    return [label.get_text() for label in labels]


# ---- parts of figures ------------------------------------------------------------------------------------------------


def test_errors_have_the_color_of_the_prediction():
    label, prediction = np.array([[0, 13, 255]]), np.array([[0, 0, 13]])
    assert error_map(label, prediction, CITYSCAPES).tolist() == [[[RIGHT] * 3, [128, 64, 128], [IGNORED] * 3]]


@pytest.mark.parametrize("height, inches", [(10, 2 * (1.5 + 0.2) + 0.5), (90, 2 * (6 + 0.2) + 0.5)])
def test_axes_have_the_shape_of_the_image_at_most_twice_as_tall_as_wide(height, inches):
    figure, axes = image_axes(np.zeros((height, 20, 3)), 2, 3, width=3.0, margin=0.5, title=0.2)
    assert figure.get_size_inches().tolist() == pytest.approx([9, inches])
    assert len(axes) == 6 and not any(axis.axison for axis in axes)
    plt.close(figure)


def test_figures_are_written_without_a_screen_at_100_pixels_an_inch_and_closed(tmp_path):
    matplotlib.use("svg")
    importlib.reload(plots)
    assert matplotlib.get_backend().lower() == "agg"
    for _ in range(2):  # the second time over the first
        figure = plt.figure(figsize=(2, 1))
        plots.save_figure(figure, tmp_path / "a/b/x.png")
    assert Image.open(tmp_path / "a/b/x.png").size == (200, 100) and not plt.fignum_exists(figure.number)


def test_matrix_shows_its_numbers_at_their_places():
    figure, (axis, large) = plt.subplots(1, 2)
    values = np.array([[0.5, 2.0, 1.21], [0.009, np.nan, 0.01]])
    image = draw_matrix(axis, values, ["a", "b"], ["c", "d", "e"], 2, "{:.2f}", "magma")
    numbers = {text.get_position(): (text.get_text(), text.get_color()) for text in axis.texts}
    assert numbers == {  # dark on the light colors of large values
        (0, 0): (".50", "white"), (1, 0): ("2.00", "black"), (2, 0): ("1.21", "black"), (2, 1): (".01", "white"),
    }  # fmt: skip
    assert all((text.get_ha(), text.get_va()) == ("center", "center") for text in axis.texts)
    assert texts(axis.get_xticklabels()) == ["c", "d", "e"] and texts(axis.get_yticklabels()) == ["a", "b"]
    assert np.array_equal(image.get_array(), values, equal_nan=True) and image.get_clim() == (0, 2)
    for columns, count in ((30, 30), (31, 0)):
        draw_matrix(large, np.ones((1, columns)), ["a"], ["b"] * columns, 1, "{:.0f}", "magma")
        assert len(large.texts) == count
        large.clear()
    plt.close(figure)


def test_legend_has_the_colors_of_the_classes_in_rows_that_are_about_equally_long():
    figure = plt.figure(figsize=(13, 3))
    class_legend(figure, [*range(11), 255], CITYSCAPES)  # eight fit in a row
    (legend,) = figure.legends
    assert texts(legend.get_texts()) == CITYSCAPES.names[:11] and figure.get_figheight() == pytest.approx(3.2)
    colors = [patch.get_facecolor()[:3] for patch in legend.get_patches()]
    np.testing.assert_allclose(colors, CITYSCAPES.palette[:11] / 255)
    figure.draw_without_rendering()
    rows = Counter(round(text.get_window_extent().y0) for text in legend.get_texts())
    assert sorted(rows.values()) == [5, 6] and legend.get_window_extent().width < 1300
    narrow = plt.figure(figsize=(1, 3))
    class_legend(narrow, range(2), MANY), class_legend(narrow, [], MANY)
    assert narrow.get_figheight() == pytest.approx(3.2) and texts(narrow.legends[1].get_texts()) == []
    plt.close("all")


# ---- figures of a run ------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_confusion_matrix(tmp_path, figures):
    confusion = ConfusionMatrix(19)
    confusion.update(torch.tensor([0, 0, 0, 0, 13]), torch.tensor([0, 0, 0, 13, 13]))
    plots.save_scores(tmp_path / "scores.png", confusion, CITYSCAPES)
    bars, matrix, color_bar = figures["scores.png"].axes
    widths = {0: 75, 13: 50}
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([widths.get(k, 0) for k in range(19)])
    np.testing.assert_allclose([bar.get_facecolor()[:3] for bar in bars.patches], CITYSCAPES.palette[:19] / 255)
    assert [text.get_position() for text in bars.texts] == [(widths.get(k, 0) + 1, k) for k in range(19)]
    numbers = {k: text for k, text in enumerate(texts(bars.texts)) if text != "does not occur"}
    assert numbers == {0: "75.0", 13: "50.0"} and "62.50" in bars.get_title()
    assert texts(bars.get_yticklabels()) == texts(matrix.get_yticklabels()) == CITYSCAPES.names
    assert bars.get_ylim() == (18.5, -0.5) and bars.get_xlim()[0] == 0 and bars.get_xlim()[1] > 110  # for "100.0"
    assert {text.get_position(): text.get_text() for text in matrix.texts} == {
        (0, 0): "75",
        (13, 0): "25",
        (13, 13): "100",
    }
    assert np.isnan(matrix.images[0].get_array()[1]).all() and matrix.images[0].get_clim() == (0, 100)
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("prediction", "label") and color_bar.get_ylim() == (0, 100)
    assert texts(figures["scores.png"].texts) == ["last.pt"]


@pytest.mark.parametrize("outputs", [1, 2])
def test_samples_show_label_predictions_and_errors(tmp_path, figures, outputs):
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (4, 8, 3), dtype=np.uint8), rng.integers(0, 5, (4, 8))
    label[0, 0] = 255
    predictions = [rng.integers(low, low + 5, (4, 8)) for low in (4, 9)[:outputs]]
    tall = np.zeros((16, 8, 3), np.uint8)
    plots.save_samples(tmp_path / "x.png", [(x, label, *predictions) for x in (image, tall, image)], CITYSCAPES)
    figure, count = figures["x.png"], 3 + outputs
    colors = [CITYSCAPES.palette[classes] for classes in (label, *predictions)]
    errors = error_map(label, predictions[0], CITYSCAPES)
    expected = [part for x in (image, tall, image) for part in (x, *colors, errors)]
    drawings = [axis.images[0] for axis in figure.axes]
    assert all(np.array_equal(a.get_array(), b) for a, b in zip(drawings, expected, strict=True))
    assert {drawing.get_interpolation() for drawing in drawings} == {"nearest"}
    titles = [axis.get_title() for axis in figure.axes]
    names = ["image", "label", "final", *["auxiliary"][: outputs - 1], "errors"]
    assert all(title.startswith(name) for title, name in zip(titles, names)) and not any(titles[count:])
    assert figure.get_size_inches()[1] > 3 * 6 and texts(figure.legends[0].get_texts()) == CITYSCAPES.names[:9]


def test_curves_are_those_of_the_logs(tmp_path, figures):
    def lines(axis):
        data = [
            (line.get_label(), *map(list, line.get_data()), line.get_color(), line.get_marker()) for line in axis.lines
        ]
        return [(*rest, marker == "o") for *rest, marker in data if not rest[0].startswith("_")]  # those in the legend

    train = [{"iter": 10 * i, "loss": 30 - i, "lr": 0.01 / (i + 1)} for i in range(15)]
    val = [{"iter": 20, "mIoU": 0.25, "loss": 7}, {"iter": 40, "mIoU": 0.5, "loss": 6}]
    plots.plot_curves([Log("a", train, val), Log("b", train[:1], [])], tmp_path / "x.png")
    axes = loss, lr, score = figures["x.png"].axes
    iters, losses, rates = ([entry[key] for entry in train] for key in ("iter", "loss", "lr"))
    smoothed = ("a, mean of 2 entries", iters, [30, *(30.5 - i for i in range(1, 15))], "C0", False)
    assert lines(loss) == [smoothed, ("a, validation", [20, 40], [7, 6], "C0", True), ("b", [0], [30], "C1", True)]
    assert [list(x) for x in loss.lines[0].get_data()] == [iters, losses] and loss.lines[0].get_alpha() < 1
    assert lines(lr) == [("a", iters, rates, "C0", False), ("b", [0], [0.01], "C1", True)]
    assert lines(score) == [("a", [20, 40], [25, 50], "C0", True)]
    assert [(text.get_text(), text.xy) for text in score.texts] == [("50.00", (40, 50))] and not loss.texts + lr.texts
    assert all(texts(axis.get_legend().get_texts()) == [line[0] for line in lines(axis)] for axis in axes)
    assert [axis.get_title() for axis in axes] == ["loss", "learning rate", "validation"]
    assert [axis.get_ylabel() for axis in axes] == ["loss", "learning rate", "mIoU (%)"]
    assert {axis.get_xlabel() for axis in axes} == {"iteration"}


def test_what_a_log_does_not_have_is_said_and_colors_repeat_after_ten(tmp_path, figures):
    plots.plot_curves([Log("a", [], [{"iter": 1, "mIoU": 0.5}])] * 11, tmp_path / "x.png")
    plots.plot_curves([Log("a", [{"iter": 1, "loss": 1, "lr": 1}], [])], tmp_path / "y.png")
    loss, lr, score = figures["x.png"].axes
    assert texts(figures["y.png"].axes[2].texts) == texts(loss.texts) == texts(lr.texts) == ["none in the log"]
    assert loss.get_legend() is None and [line.get_color() for line in score.lines] == [f"C{i % 10}" for i in range(11)]
    assert set(texts(score.texts)) == {"50.00"}


def test_the_figures_of_a_run_are_drawn_from_its_log_its_data_and_its_scores(tmp_path, figures, data):
    write(tmp_path / "run/log.jsonl", TRAIN)
    dataset, confusion = EvalDataset(find_samples(data, "val"), CITYSCAPES), ConfusionMatrix(19)
    plots.draw_run(tmp_path / "run", lambda image: 2 * (torch.zeros(1, 19, 128, 256),), dataset, confusion)
    assert {name: len(figure.axes) for name, figure in figures.items()} == {
        "run/curve.png": 3, "run/samples.png": 4 * 5, "run/scores.png": 3,
    }  # fmt: skip
    assert texts(figures["run/curve.png"].axes[0].get_legend().get_texts()) == ["run"]


def test_many_classes_and_tall_images_make_figures_of_reasonable_size(tmp_path, figures):
    label = np.arange(900 * 30).reshape(900, 30) % 60
    plots.save_samples(tmp_path / "samples.png", [(np.zeros((900, 30, 3), np.uint8), label, label)], MANY)
    plots.save_scores(tmp_path / "scores.png", ConfusionMatrix(60), MANY)
    for figure in figures.values():
        assert max(figure.get_size_inches()) < 40
    assert figures["scores.png"].get_figheight() >= 0.2 * 60
