"""Pictures: that they show what they say."""

import numpy as np
import pytest
import torch

from ocrnet.data.classes import CITYSCAPES
from ocrnet.metrics import ConfusionMatrix
from ocrnet.visualize import colour_errors, draw_errors, draw_matrix, overlay, plt, save_scores, surest_pixels

ROAD, CAR = (128, 64, 128), (0, 0, 142)


def test_errors_have_the_colour_of_what_was_predicted():
    label, classes = np.array([[0, 13, 255]]), np.array([[0, 0, 13]])
    assert colour_errors(label, classes, CITYSCAPES).tolist() == [[[255] * 3, [*ROAD], [0] * 3]]


def test_an_overlay_is_the_mean_of_photo_and_colours():
    photo, colours = np.full((1, 2, 3), 200, np.uint8), np.array([[ROAD, CAR]], np.uint8)
    assert overlay(photo, colours).tolist() == [[[164, 132, 164], [100, 100, 171]]]


def test_what_the_context_mended_is_green_and_what_it_spoiled_red():
    label = np.array([[0, 0, 0, 255]])
    coarse, final = np.array([[13, 0, 0, 0]]), np.array([[0, 13, 0, 13]])
    figure = draw_errors(label, coarse, final, CITYSCAPES)
    change = figure.axes[3].images[0].get_array()
    assert change.tolist() == [[[0, 150, 0], [220, 0, 0], [255] * 3, [0] * 3]]
    assert "mended 33.3% (green), spoiled 33.3% (red)" in figure.axes[3].get_title()
    assert "66.7% of the scored pixels are right" in figure.axes[1].get_title()
    plt.close(figure)


def test_a_matrix_shows_its_numbers_where_they_belong():
    figure, axis = plt.subplots()
    draw_matrix(axis, np.array([[0.25, 1.0], [0.001, np.nan]]), ["a", "b"], ["c", "d"], 1, "{:.2f}", "magma")
    assert {text.get_position(): text.get_text() for text in axis.texts} == {(0, 0): ".25", (1, 0): "1.00"}
    plt.close(figure)


def test_bars_and_shares_are_those_of_the_confusion_matrix(tmp_path, monkeypatch):
    confusion = ConfusionMatrix(19)
    confusion.update(torch.tensor([0, 0, 0, 0, 13]), torch.tensor([0, 0, 0, 13, 13]))
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    save_scores(tmp_path / "scores.png", confusion, CITYSCAPES)
    bars, matrix = figures[0].axes[:2]
    assert [bar.get_width() for bar in bars.patches][::13] == pytest.approx([75, 50])
    assert bars.texts[1].get_text() == "does not occur" and "62.50" in bars.get_title()
    shares = {text.get_position(): text.get_text() for text in matrix.texts}
    assert shares == {(0, 0): "75", (13, 0): "25", (13, 13): "100"}
    assert (tmp_path / "scores.png").stat().st_size > 10_000


def test_the_surest_pixel_of_each_class_is_chosen():
    final, confidence = np.array([[3, 3, 7], [3, 7, 7]]), np.array([[0.2, 0.9, 0.3], [0.5, 0.8, 0.4]])
    assert surest_pixels(final, confidence) == [(1, 0), (1, 1)]
