"""The confusion matrix and its scores, against counting by hand."""

import math

import pytest
import torch

from ocrnet.metrics import ConfusionMatrix


def test_iou_is_intersection_over_union():
    target = torch.randint(0, 4, (3, 20, 20))
    target[0, :5] = 255
    prediction = torch.randint(0, 4, (3, 20, 20))
    confusion = ConfusionMatrix(4)
    for t, p in zip(target, prediction):
        confusion.update(t.byte(), p)  # as labels come
    valid = target != 255
    for k in range(4):
        union = (((target == k) | (prediction == k)) & valid).sum()
        intersection = ((target == k) & (prediction == k) & valid).sum()
        assert confusion.iou()[k].item() == (intersection.double() / union).item()
    assert confusion.mean_iou() == pytest.approx(confusion.iou().mean().item())
    assert confusion.pixel_accuracy() == pytest.approx(((target == prediction) & valid).sum() / valid.sum())


def test_class_that_does_not_occur_is_left_out_of_the_mean_and_one_that_is_only_predicted_counts_as_zero():
    confusion = ConfusionMatrix(4)
    confusion.update(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 3, 0]))
    assert confusion.iou()[[0, 1, 3]].tolist() == [0.5, 0, 0] and math.isnan(confusion.iou()[2])
    assert confusion.mean_iou() == pytest.approx(0.5 / 3)


def test_counts_are_integers_on_the_device():  # fp32 counts to 2^24
    counts = ConfusionMatrix(2, device="meta").counts
    assert counts.dtype == torch.int64 and counts.device.type == "meta" and ConfusionMatrix(2).counts.is_cpu


@pytest.mark.parametrize("target, prediction", [([0, 3], [0, 0]), ([0, 1], [0, 3]), ([0, 254], [0, 0]), ([0], [-1])])
def test_value_that_is_not_a_class_is_refused(target, prediction):
    confusion = ConfusionMatrix(3)
    with pytest.raises(ValueError):
        confusion.update(torch.tensor(target), torch.tensor(prediction))
    assert confusion.counts.sum() == 0
