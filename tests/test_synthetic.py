"""The generated data set."""

import numpy as np
import pytest

from ocrnet import InputError
from ocrnet.data.classes import CITYSCAPES
from ocrnet.data.datasets import find_samples, read_label
from ocrnet.data.synthetic import street, write_dataset


def test_streets_are_determined_by_their_seed():
    (a, first), (b, second), (c, _) = (street(np.random.default_rng([0, 1, i])) for i in (5, 5, 6))
    assert np.array_equal(a, b) and np.array_equal(first, second) and not np.array_equal(a, c)


def test_a_data_set_is_kept_and_a_folder_of_something_else_refused(tmp_path):
    write_dataset(tmp_path / "new", {"train": 1, "val": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_dataset(tmp_path / "new")
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (tmp_path / "own/images").mkdir(parents=True)
    with pytest.raises(InputError, match=f"{tmp_path / 'own'}: "):
        write_dataset(tmp_path / "own")
    assert [path.name for path in (tmp_path / "own").rglob("*")] == ["images"]


def test_data_set_holds_all_classes_and_ignored_pixels(data):
    samples = find_samples(data, "train") + find_samples(data, "val")
    found = np.unique(np.concatenate([read_label(sample.label, CITYSCAPES).ravel() for sample in samples]))
    assert found.tolist() == [*range(19), 255]


def test_color_does_not_determine_the_class():
    """The mean colors of a class vary more within it than between it and the class that shares its colors."""
    means = {k: [] for k in range(19)}
    for i in range(40):
        image, label = map(np.asarray, street(np.random.default_rng([9, i])))
        image, label = image.astype(float), CITYSCAPES.to_train_ids(label)
        for k in means:
            if (label == k).sum() > 30:
                means[k].append(image[label == k].mean(0))
    for a, b in [("road", "sidewalk"), ("building", "wall"), ("wall", "fence"), ("bus", "truck"), ("car", "bus")]:
        x, y = (np.array(means[CITYSCAPES.names.index(name)]) for name in (a, b))
        between = np.linalg.norm(x.mean(0) - y.mean(0))
        assert between < min(np.linalg.norm(x.std(0)), np.linalg.norm(y.std(0))), (a, b)
