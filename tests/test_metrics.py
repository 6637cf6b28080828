"""Scores, held against counting by hand."""

import math

import pytest
import torch

from ocrnet.metrics import ConfusionMatrix, InstanceScore, row_baseline


def test_iou_is_intersection_over_union():
    target = torch.randint(0, 4, (3, 20, 20))
    target[0, :5] = 255
    prediction = torch.randint(0, 4, (3, 20, 20))
    confusion = ConfusionMatrix(4)
    for t, p in zip(target, prediction):
        confusion.update(t, p)
    scored = target != 255
    for k in range(4):
        union = (((target == k) | (prediction == k)) & scored).sum()
        intersection = ((target == k) & (prediction == k) & scored).sum()
        assert confusion.iou()[k].item() == (intersection.double() / union).item()
    assert confusion.mean_iou() == pytest.approx(confusion.iou().mean().item())
    assert confusion.pixel_accuracy() == pytest.approx(((target == prediction) & scored).sum() / scored.sum())


def test_rows_are_labels_and_columns_predictions():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([[0, 0, 2]]), torch.tensor([[1, 1, 2]]))
    assert confusion.counts.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]


def test_a_class_that_does_not_occur_is_nan_and_left_out_of_the_mean():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]))
    assert confusion.iou()[:2].tolist() == [2 / 3, 0] and math.isnan(confusion.iou()[2])
    assert confusion.mean_iou() == pytest.approx(1 / 3)
    assert confusion.present().tolist() == [True, True, False]


def test_a_class_that_is_only_predicted_counts_as_zero():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 0]), torch.tensor([0, 2]))
    assert confusion.iou()[2] == 0 and not confusion.present()[2]


def test_predictions_on_ignored_pixels_do_not_count():
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([255, 255, 1]), torch.tensor([0, 1, 1]))
    assert confusion.counts.tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("target, prediction", [([0, 3], [0, 0]), ([0, 1], [0, 3]), ([0, 254], [0, 0])])
def test_values_that_are_no_class_are_refused(target, prediction):
    with pytest.raises(ValueError, match="expected 0 .. 2"):
        ConfusionMatrix(3).update(torch.tensor(target), torch.tensor(prediction))


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        ConfusionMatrix(3).update(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long))


def test_groups_of_classes_are_scored_as_one_class_each():
    target, prediction = torch.randint(0, 4, (500,)), torch.randint(0, 4, (500,))
    fine, coarse = ConfusionMatrix(4), ConfusionMatrix(2)
    fine.update(target, prediction)
    coarse.update(target // 2, prediction // 2)
    assert torch.equal(fine.merged([0, 0, 1, 1]).counts, coarse.counts)


def test_every_instance_of_a_class_weighs_the_same():
    """Class 1 has instances of 1 and 9 pixels; the small one is missed, and 5 pixels of class 0 are taken for it."""
    instances = torch.tensor([0] * 10 + [2000] + [2001] * 9)
    target = torch.tensor([0] * 10 + [1] * 10)
    prediction = torch.tensor([1] * 5 + [0] * 5 + [0] + [1] * 9)
    confusion = ConfusionMatrix(3)
    confusion.update(target, prediction)
    score = InstanceScore(torch.tensor([math.nan, 6.0, math.nan]), group_of=[0, 1, 0])
    score.update(instances, prediction)
    classes, groups = score.iou(confusion)
    assert classes[1].item() == pytest.approx(
        6 / (6 + 6 + 5)
    )  # hit, missed, wrongly given: instances weigh 6 pixels each
    assert groups[1].item() == pytest.approx(6 / (6 + 6 + 5))
    assert math.isnan(classes[0]) and math.isnan(classes[2]) and math.isnan(groups[0])


def test_an_instance_taken_for_another_class_of_its_group_is_right_for_the_group():
    instances, prediction = torch.tensor([2000, 2000, 3000, 3000]), torch.tensor([2, 1, 1, 0])
    confusion = ConfusionMatrix(3)
    confusion.update(instances // 1000 - 1, prediction)
    score = InstanceScore(torch.tensor([math.nan, 2.0, 4.0]), group_of=[0, 1, 1])
    score.update(instances, prediction)
    classes, groups = score.iou(confusion)
    assert classes[1].item() == 1 / (2 + 1) and classes[2].item() == 0
    assert groups[1].item() == (2 + 2) / (2 + 4)


def test_row_baseline_predicts_what_fills_the_row_most():
    train = torch.tensor([[2, 2, 2, 0], [1, 1, 0, 255]]).repeat_interleave(64, 0)  # top: 2, bottom: 1
    val = torch.tensor([[2, 2], [1, 0]])
    assert row_baseline([train], [val], 3).counts.tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 2]]
