"""Reading logs of this project and of mmengine."""

import json
import math

import numpy as np
import pytest

from ocrnet import InputError
from ocrnet.logs import read_log, smooth, trim_log

TRAIN = {"split": "train", "iter": 50, "loss": 1.5, "lr": 0.01}
VAL = {"split": "val", "iter": 100, "mIoU": 0.5, "IoU": {"road": 0.5}}
# the first line is colored, as on a terminal
MMENGINE = """\
05/01 09:59:00 - mmengine - \x1b[4m\x1b[32mINFO\x1b[0m - Iter(train) [ 1/40000]  lr: 1e-02  loss: 2.5
2024/05/01 10:00:00 - mmengine - INFO - Iter(train) [ 50/40000]  lr: 9.9891e-03  eta: 5:23:11  loss: 1.9000  aux: 3.1
2024/05/01 10:09:00 - mmengine - INFO - Saving checkpoint at 50 iterations
2024/05/01 10:09:00 - mmengine - INFO - Iter(val) [500/500]    aAcc: 90.0000  mIoU: 61.5000  mAcc: 70.0000
2024/05/01 10:10:00 - mmengine - INFO - Iter(train) [ 51/40000]  lr: 9.9e-03  loss: nan
"""


def test_log_of_a_run_is_read_by_its_folder_or_its_file(tmp_path):
    folder = tmp_path / "hr18"
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in (TRAIN, VAL)))
    for path in (folder, folder / "log.jsonl", str(folder)):
        assert read_log(path) == ("hr18", [TRAIN], [VAL])


def test_incomplete_line_and_validation_without_valid_pixels_are_skipped(tmp_path):
    lines = [json.dumps(TRAIN), json.dumps(VAL | {"mIoU": None}), json.dumps(VAL)[:-9]]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert read_log(tmp_path)[1:] == ([TRAIN], [])


def test_log_of_mmengine_is_read(tmp_path):
    path = tmp_path / "original.log"
    path.write_text(MMENGINE)
    name, train, val = read_log(path)
    assert name == "original"
    assert train[0] == {"split": "train", "iter": 1, "loss": 2.5, "lr": 0.01}
    assert train[1] == {"split": "train", "iter": 50, "loss": 1.9, "lr": 9.9891e-03}
    assert [entry["iter"] for entry in train] == [1, 50, 51] and train[2]["loss"] != train[2]["loss"]  # nan
    assert val == [{"split": "val", "iter": 50, "mIoU": 0.615}]


def test_log_named_by_its_date_takes_the_name_of_the_work_dir(tmp_path):
    path = tmp_path / "hr18/20240501_100000/20240501_100000.log"
    path.parent.mkdir(parents=True)
    path.write_text(MMENGINE)
    assert read_log(path).name == "hr18"


@pytest.mark.parametrize("content", [None, "", "hello\n", "{}\n{\n"])
def test_file_that_is_not_a_log_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(InputError) as error:
        read_log(tmp_path)
    assert str(tmp_path / "log.jsonl") in str(error.value)


def test_the_header_of_mmengine_is_no_entry(tmp_path):
    environment = "Environment info:\n    sys.platform: linux\n    OpenCV: 4.7.0\n    loss: 3\n"
    header = environment + "{\"a\": 1}\n[1, 2]\n3\n{'seed': 0}\n---------\n"
    line = "05/01 10:00:00 - mmengine - INFO - Iter(train) [ 50/40000]  lr: 1e-02  loss: 1.9\n"
    (tmp_path / "x.log").write_text(header + line)
    assert read_log(tmp_path / "x.log").train == [{"split": "train", "iter": 50, "loss": 1.9, "lr": 0.01}]


def test_of_a_repeated_iteration_the_last_entry_counts(tmp_path):
    lines = [TRAIN, {**TRAIN, "iter": 100}, {**TRAIN, "loss": 7.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(entry["iter"], entry["loss"]) for entry in read_log(tmp_path).train] == [(50, 7.0), (100, 1.5)]


def test_a_validation_belongs_to_the_training_line_before_it_also_in_a_repeated_part(tmp_path):
    train, val = "Iter(train) [{}/9]  lr: 1e-02  loss: 1.0\n", "Iter(val) [5/5]  mIoU: {}\n"
    (tmp_path / "x.log").write_text(train.format(3) + train.format(4) + train.format(3) + val.format("60.0"))
    assert [entry["iter"] for entry in read_log(tmp_path / "x.log").val] == [3]


def test_a_loss_that_is_not_finite_leaves_a_gap_only():
    found = smooth([1, math.nan, math.nan, 2, 2, math.inf, 3], window=2)
    assert np.array_equal(found, [1, 1, math.nan, 2, 2, 2, 3], equal_nan=True)


def test_a_log_is_cut_where_the_checkpoint_stands_and_damaged_lines_go_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    trim_log(path, 3, 0)
    assert not path.exists()
    lines = [json.dumps({**TRAIN, "iter": i}) + "\n" for i in range(1, 7)]
    path.write_text("".join([*lines[:2], "{damaged\n", *lines[2:], '{"split": "train", "iter": 2']))
    trim_log(path, 4, 0)
    assert path.read_text() == "".join(lines[:4])


def test_a_validation_that_the_checkpoint_does_not_know_yet_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"  # of a run that was killed after the entry, before it saved
    lines = [json.dumps(entry) + "\n" for entry in (TRAIN, {**VAL, "iter": 50}, {**TRAIN, "iter": 100}, VAL)]
    path.write_text("".join(lines))
    trim_log(path, 100, 50)
    assert path.read_text() == "".join(lines[:3])
