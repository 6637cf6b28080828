"""The generated data set."""

import numpy as np
import pytest
from PIL import Image

from ocrnet import InputError
from ocrnet.data.classes import CITYSCAPES
from ocrnet.data.datasets import count_classes, find_samples
from ocrnet.data.synthetic import SPLITS, street, write_dataset


def test_the_generated_data_set_stays_as_it_is_and_has_all_classes(data):
    """So that scores on it can be compared. Where a CPU rounds differently, single pixels may differ."""
    train, val = (find_samples(data, split) for split in ("train", "val"))
    pixels = [51027, 7730, 39058, 5519, 2045, 3168, 2037, 1828, 15235, 2845, 23244, 1568, 1493, 12107, 3894, 3845, 4823]
    assert count_classes(train, CITYSCAPES) == pytest.approx([*pixels, 403, 3111], abs=3)
    sums = sum(np.asarray(Image.open(sample.image), np.int64).sum((0, 1)) for sample in train + val)
    assert sums == pytest.approx(np.array([35602270, 37371570, 35469860]), abs=150)  # of red, green and blue
    assert SPLITS == {"train": 480, "val": 60}


def test_color_does_not_determine_the_class():
    """The mean colors of a class vary more within it than between it and the class that shares its colors."""
    means = {name: [] for name in CITYSCAPES.names}
    for i in range(25):
        image, label = map(np.asarray, street(np.random.default_rng([9, i]), (64, 128)))
        label = CITYSCAPES.to_train_ids(label)
        for k, name in enumerate(CITYSCAPES.names):
            means[name] += [image[label == k].mean(0)] if (label == k).sum() > 30 else []
    for a, b in [("road", "sidewalk"), ("building", "wall"), ("wall", "fence"), ("bus", "truck"), ("car", "bus")]:
        x, y = np.array(means[a]), np.array(means[b])
        assert np.linalg.norm(x.mean(0) - y.mean(0)) < min(np.linalg.norm(x.std(0)), np.linalg.norm(y.std(0))), (a, b)
    assert image.shape == (64, 128, 3)


def test_a_data_set_is_whole_or_absent_and_kept(tmp_path, capsys):
    root = tmp_path / "a/b"
    with pytest.raises(ValueError, match="unknown"):
        write_dataset(root, {"train": 1, "unknown": 1})
    assert not any(root.parent.iterdir())
    write_dataset(root, {"train": 1, "val": 1})
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
    assert len(times) == 4 and list(root.parent.iterdir()) == [root] and not capsys.readouterr().err  # no bar
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
