"""iIoU, against counting by hand."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ocrnet.data.classes import CITYSCAPES, ClassTable
from ocrnet.data.layout import Sample, find_samples
from ocrnet.device import Accelerator
from ocrnet.evaluation import evaluate
from ocrnet.instance_iou import (
    AVERAGE_INSTANCE,
    InstanceDataset,
    InstanceIoU,
    has_instances,
    instance_path,
    read_instances,
)
from ocrnet.metrics import ConfusionMatrix

ROAD, PERSON, CAR, TRUCK = (CITYSCAPES.names.index(name) for name in ("road", "person", "car", "truck"))
HUMAN, VEHICLE = (CITYSCAPES.categories.index(name) for name in ("human", "vehicle"))


def instance(k, j):
    """Instance j of class k, as ``read_instances`` numbers it."""
    return 1000 * (k + 1) + j


def test_every_instance_of_a_class_weighs_the_same():
    """Cars of 1 and 9 pixels; the small one is missed, and 5 pixels of road are predicted as car."""
    instances = torch.tensor([0] * 10 + [instance(CAR, 0)] + [instance(CAR, 1)] * 9)
    target = torch.tensor([ROAD] * 10 + [CAR] * 10)
    prediction = torch.tensor([CAR] * 5 + [ROAD] * 5 + [ROAD] + [CAR] * 9)
    confusion, score = ConfusionMatrix(19), InstanceIoU()
    confusion.update(target, prediction)
    score.update(instances, prediction)
    classes, categories = score.iou(confusion)
    size = AVERAGE_INSTANCE["car"]  # what each instance weighs: true positive, false negative; then false positives
    assert classes[CAR].item() == pytest.approx(size / (size + size + 5), rel=1e-12)
    assert categories[VEHICLE].item() == pytest.approx(size / (size + size + 5), rel=1e-12)


def test_other_class_of_the_category_is_right_for_the_category():
    instances = torch.tensor([instance(CAR, 0)] * 2 + [instance(TRUCK, 0)] * 2)
    prediction = torch.tensor([TRUCK, CAR, CAR, ROAD])
    confusion, score = ConfusionMatrix(19), InstanceIoU()
    confusion.update(instances // 1000 - 1, prediction)
    score.update(instances, prediction)
    classes, categories = score.iou(confusion)
    car, truck = AVERAGE_INSTANCE["car"], AVERAGE_INSTANCE["truck"]
    assert classes[CAR].item() == pytest.approx((car / 2) / (car + 1), rel=1e-12) and classes[TRUCK].item() == 0
    assert categories[VEHICLE].item() == pytest.approx((car + truck / 2) / (car + truck), rel=1e-12)


def test_classes_without_instances_have_no_score():
    target = torch.tensor([PERSON] * 4 + list(range(PERSON)))
    prediction = torch.tensor([PERSON] * 4 + [(k + 3) % PERSON for k in range(PERSON)])  # false positives of the others
    confusion, score = ConfusionMatrix(19), InstanceIoU()
    confusion.update(target, prediction)
    score.update(torch.tensor([instance(PERSON, 0)] * 4 + [0] * PERSON), prediction)
    classes, categories = score.iou(confusion)
    assert classes[PERSON] == 1 and categories[HUMAN] == 1
    assert classes[:PERSON].isnan().all() and categories[:HUMAN].isnan().all()


def test_instances_are_numbered_by_class(tmp_path):
    ids = np.array([[7, 24, 24000, 24003], [26001, 29001, 33999, 0]], dtype=np.uint16)  # 24: a group of persons
    Image.fromarray(ids).save(tmp_path / "a_gtFine_instanceIds.png")
    sample = Sample(tmp_path / "a_leftImg8bit.png", tmp_path / "a_gtFine_labelTrainIds.png")
    assert read_instances(sample).tolist() == [[0, 0, 12000, 12003], [14001, 0, 19999, 0]]
    assert set(AVERAGE_INSTANCE) <= set(CITYSCAPES.names)


@pytest.fixture
def samples(data, tmp_path):
    """A val split with instances: all pixels of a class are one."""
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    samples = find_samples(tmp_path, "val")
    for sample in samples:
        label = np.asarray(Image.open(sample.label))
        ids = np.array([*CITYSCAPES.ids, *[0] * 237])[label]
        Image.fromarray((1000 * ids + (ids > 0)).astype(np.uint16)).save(instance_path(sample))
    return samples


def test_instances_are_scored_if_all_are_there_and_the_classes_are_cityscapes(samples):
    assert has_instances(samples, CITYSCAPES)
    assert not has_instances(samples, ClassTable(CITYSCAPES.labels[:12]))
    instance_path(samples[3]).unlink()
    assert not has_instances(samples, CITYSCAPES)


def test_evaluation_passes_raw_images_to_segment_and_counts_instances(samples):
    seen = []

    def segment(model, image):
        seen.append(image)
        return image[:, 0].long() % 19  # of the reds

    found, expected = InstanceIoU(), InstanceIoU()
    dataset = InstanceDataset(samples)
    confusion = evaluate(nn.Identity(), dataset, 19, Accelerator("cpu"), segment, instance_iou=found)
    for (image, label, instances), shown in zip(dataset, seen, strict=True):
        assert torch.equal(image, shown[0]) and torch.equal(instances > 0, label < 255)
        expected.update(instances, image[0].long() % 19)
    classes, categories = found.iou(confusion)
    assert classes[CAR] > 0 and categories[VEHICLE] > 0
    for one, two in zip((classes, categories), expected.iou(confusion)):
        torch.testing.assert_close(one, two, equal_nan=True)
