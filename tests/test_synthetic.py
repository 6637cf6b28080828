"""The generated data set."""

import json

import numpy as np

from ocrnet.data.classes import CITYSCAPES
from ocrnet.data.layout import find_samples
from ocrnet.data.synthetic import street, write_dataset
from ocrnet.data.train_ids import check_samples, train_ids_from_polygons


def test_streets_are_determined_by_their_seed():
    (a, first), (b, second), (c, _) = (street(np.random.default_rng([0, 1, i])) for i in (5, 5, 6))
    assert np.array_equal(a, b) and first == second and not np.array_equal(a, c)


def test_existing_scenes_are_kept_and_missing_ones_written_the_same(tmp_path):
    write_dataset(tmp_path, {"train": 1, "val": 1}, workers=1)
    paths = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(paths) == 4
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    missing = next(path for path in paths if path.suffix == ".json")
    missing.unlink()
    write_dataset(tmp_path, {"train": 1, "val": 1}, workers=1)
    assert [path.read_bytes() for path in paths] == [content for content, _ in before]
    changed = [path for path, (_, time) in zip(paths, before) if path.stat().st_mtime_ns != time]
    assert len(changed) == 2 and missing in changed  # one scene: image and annotation


def test_data_set_holds_all_classes_and_the_special_cases_of_annotations(data):
    samples = find_samples(data, "train") + find_samples(data, "val")
    assert (check_samples(samples, 19, quiet=True).sum(0) > 0).all()
    objects = [item for i in range(30) for item in street(np.random.default_rng(i))[1]["objects"]]
    labels = {item["label"] for item in objects}
    assert {"persongroup", "license plate", "ego vehicle", "rail track"} <= labels
    assert any(item.get("deleted") for item in objects)


def test_color_does_not_determine_the_class(tmp_path):
    """The mean colors of a class vary more within it than between it and the class that shares its colors."""
    means = {k: [] for k in range(19)}
    path = tmp_path / "x_polygons.json"
    for i in range(40):
        image, annotation = street(np.random.default_rng([9, i]))
        path.write_text(json.dumps(annotation))
        image, label = np.asarray(image).astype(float), np.asarray(train_ids_from_polygons(path))
        for k in means:
            if (label == k).sum() > 30:
                means[k].append(image[label == k].mean(0))
    for a, b in [("road", "sidewalk"), ("building", "wall"), ("wall", "fence"), ("bus", "truck"), ("car", "bus")]:
        x, y = (np.array(means[CITYSCAPES.names.index(name)]) for name in (a, b))
        between = np.linalg.norm(x.mean(0) - y.mean(0))
        assert between < min(np.linalg.norm(x.std(0)), np.linalg.norm(y.std(0))), (a, b)
