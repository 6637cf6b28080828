"""Figures show the numbers that they are given."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from ocrnet.data.classes import CITYSCAPES, ClassTable, Label
from ocrnet.logs import Log
from ocrnet.metrics import ConfusionMatrix
from ocrnet.plots import (
    IGNORED,
    RIGHT,
    class_legend,
    draw_matrix,
    error_map,
    plot_curves,
    plt,
    save_samples,
    save_scores,
)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, left open."""
    saved, close = [], plt.close
    monkeypatch.setattr(plt, "close", saved.append)
    yield saved
    close("all")


def test_errors_have_the_color_of_the_prediction():
    label, prediction = np.array([[0, 13, 255]]), np.array([[0, 0, 13]])
    assert error_map(label, prediction, CITYSCAPES).tolist() == [[[RIGHT] * 3, [128, 64, 128], [IGNORED] * 3]]


def test_matrix_shows_its_numbers_at_their_places():
    figure, axis = plt.subplots()
    draw_matrix(axis, np.array([[0.25, 1.0], [0.001, np.nan]]), ["a", "b"], ["c", "d"], 1, "{:.2f}", "magma")
    assert {text.get_position(): text.get_text() for text in axis.texts} == {(0, 0): ".25", (1, 0): "1.00"}
    plt.close(figure)


def test_scores_are_those_of_the_confusion_matrix(tmp_path, figures):
    confusion = ConfusionMatrix(19)
    confusion.update(torch.tensor([0, 0, 0, 0, 13]), torch.tensor([0, 0, 0, 13, 13]))
    save_scores(tmp_path / "scores.png", confusion, CITYSCAPES)
    bars, matrix = figures[0].axes[:2]
    widths = [75 if k == 0 else 50 if k == 13 else 0 for k in range(19)]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(widths)
    numbers = {k: text.get_text() for k, text in enumerate(bars.texts) if re.fullmatch(r"[\d.]+", text.get_text())}
    assert numbers == {0: "75.0", 13: "50.0"} and "62.50" in bars.get_title()  # the others do not occur
    shares = {text.get_position(): text.get_text() for text in matrix.texts}
    assert shares == {(0, 0): "75", (13, 0): "25", (13, 13): "100"}
    assert (tmp_path / "scores.png").exists()


@pytest.mark.parametrize("outputs", [1, 2])
def test_samples_show_label_predictions_and_errors(tmp_path, figures, outputs):
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (4, 8, 3), dtype=np.uint8), rng.integers(0, 19, (4, 8))
    predictions = [rng.integers(0, 19, (4, 8)) for _ in range(outputs)]
    save_samples(tmp_path / "samples.png", [(image, label, *predictions)] * 2, CITYSCAPES)
    shown = [axis.images[0].get_array() for axis in figures[0].axes]
    colors = [CITYSCAPES.palette[classes] for classes in (label, *predictions)]
    expected = [image, *colors, error_map(label, predictions[0], CITYSCAPES)] * 2
    assert all(np.array_equal(a, b) for a, b in zip(shown, expected, strict=True))
    assert (tmp_path / "samples.png").exists()


def test_curves_are_those_of_the_logs(tmp_path, figures):
    train = [{"iter": 10 * i, "loss": 3.0 - i, "lr": 0.01 / (i + 1)} for i in range(3)]
    val = [{"iter": 20, "mIoU": 0.25}, {"iter": 40, "mIoU": 0.5}]
    plot_curves([Log("a", train, val), Log("b", [], val)], tmp_path / "curve.png")
    loss, lr, score = figures[-1].axes
    assert [tuple(x.tolist()) for x in loss.lines[0].get_data()] == [(0, 10, 20), (3, 2, 1)]
    assert lr.lines[0].get_ydata().tolist() == [0.01, 0.005, 0.01 / 3]
    assert [line.get_ydata().tolist() for line in score.lines] == [[25, 50], [25, 50]]
    assert score.lines[0].get_xdata().tolist() == [20, 40]
    assert (tmp_path / "curve.png").exists()


def test_one_entry_is_a_point(tmp_path, figures):
    plot_curves([Log("a", [{"iter": 1, "loss": 3.0, "lr": 0.01}], [])], tmp_path / "curve.png")
    assert [axis.lines[-1].get_marker() for axis in figures[0].axes[:2]] == ["o", "o"]


def test_tall_images_and_many_classes_make_figures_of_reasonable_size(tmp_path, figures):
    table = ClassTable([Label(f"class number {k}", k, k, (k, k, k)) for k in range(60)])
    label = np.arange(900 * 30).reshape(900, 30) % 60
    save_samples(tmp_path / "samples.png", [(np.zeros((900, 30, 3), np.uint8), label, label)], table)
    confusion = ConfusionMatrix(60)
    confusion.update(torch.arange(60), torch.arange(60))
    save_scores(tmp_path / "scores.png", confusion, table)
    for name in ("samples", "scores"):
        assert max(Image.open(tmp_path / f"{name}.png").size) < 4000


def test_rows_of_a_legend_are_about_equally_long():
    fig = plt.figure(figsize=(13, 3))
    class_legend(fig, range(11), CITYSCAPES)  # eight fit in a row
    assert len(fig.legends[0].get_texts()) == 11 and fig.legends[0]._ncols == 6
    plt.close(fig)
