"""The generated data set."""

import numpy as np
import pytest

from ocrnet import InputError
from ocrnet.data.classes import CITYSCAPES
from ocrnet.data.datasets import find_samples, read_label
from ocrnet.data.synthetic import street, write_dataset


def test_streets_are_determined_by_their_seed_and_have_the_size_asked_for():
    a, b, c = (street(np.random.default_rng(seed), (48, 96)) for seed in (5, 5, 6))
    assert a == b and a[0] != c[0] and a[1] != c[1]
    assert [(image.mode, image.size) for image in a] == [("RGB", (96, 48)), ("L", (96, 48))]


def test_all_classes_occur_in_the_training_images(data):
    labels = [read_label(sample.label, CITYSCAPES) for sample in find_samples(data, "train")]
    assert set(np.unique(labels)) == {*range(19), 255}


def test_color_does_not_determine_the_class():
    """The mean colors of a class vary more within it than between it and the class that shares its colors."""
    means = {name: [] for name in CITYSCAPES.names}
    for i in range(25):
        image, label = map(np.asarray, street(np.random.default_rng([9, i])))
        label = CITYSCAPES.to_train_ids(label)
        for k, name in enumerate(CITYSCAPES.names):
            if (label == k).sum() > 30:
                means[name].append(image[label == k].mean(0))
    for a, b in [("road", "sidewalk"), ("building", "wall"), ("wall", "fence"), ("bus", "truck"), ("car", "bus")]:
        x, y = np.array(means[a]), np.array(means[b])
        between = np.linalg.norm(x.mean(0) - y.mean(0))
        assert between < min(np.linalg.norm(x.std(0)), np.linalg.norm(y.std(0))), (a, b)


def test_a_data_set_is_whole_or_absent_and_kept(tmp_path):
    root = tmp_path / "a/b"
    with pytest.raises(ValueError, match="unknown"):
        write_dataset(root, {"train": 1, "unknown": 1})
    assert not any(root.parent.iterdir())
    write_dataset(root, {"train": 1, "val": 1})
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
    assert len(times) == 4 and list(root.parent.iterdir()) == [root]
    write_dataset(root, {"train": 1, "val": 1})
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}


@pytest.mark.parametrize("name", ["leftImg8bit/train/synthtrain/synthtrain_000000_000000_leftImg8bit.png", "own.txt"])
def test_a_folder_of_other_files_is_refused_and_untouched(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=f"{tmp_path}: expected generated data"):
        write_dataset(tmp_path, {"train": 1, "val": 1})
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / name).read_text() == "mine"
