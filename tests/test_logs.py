"""Reading logs of this project and of mmengine, and plot_curve.py, which shows them."""

import contextlib
import json
import math
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from ocrnet import InputError
from ocrnet.logs import Log, compare_losses, read_log, smooth, smoothing_window
from ocrnet.run import trim_log

TRAIN = {"split": "train", "iter": 50, "loss": 1.5, "lr": 0.01}
VAL = {"split": "val", "iter": 100, "mIoU": 0.5, "IoU": {"road": 0.5}}
# the first lines are mmengine's header; one line is colored, as on a terminal
MMENGINE = """\
    OpenCV: 4.7.0
    loss: 3
2024/05/01 09:58:00 - mmengine - INFO - Iter(val) [500/500]    mIoU: 1.5000
05/01 09:59:00 - mmengine - \x1b[4m\x1b[32mINFO\x1b[0m - Iter(train) [ 1/40000]  lr: 1e-02  loss: 2.5
2024/05/01 10:00:00 - mmengine - INFO - Iter(train) [ 50/40000]  lr: 9.9891e-03  eta: 5:23:11  loss: 1.9000  aux: 3.1
2024/05/01 10:09:00 - mmengine - INFO - Iter(val) [500/500]    aAcc: 90.0000  mIoU: 61.5000  mAcc: 70.0000
2024/05/01 10:10:00 - mmengine - INFO - Iter(train) [ 52/40000]  loss: nan
2024/05/01 10:10:00 - mmengine - INFO - Iter(train) [ 53/40000]  lr: 9.9e-03
2024/05/01 10:10:00 - mmengine - INFO - Iter(train) [51/40000]  lr: 9.9e-03  loss: inf
2024/05/01 10:12:00 - mmengine - INFO - Iter(val) [500/500]  mIoU: 62.0
"""


def write(path, *lines):
    """A file of lines, or of entries as JSON. "\\udcff" becomes a byte that is no UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    path.write_text(text, errors="surrogateescape")
    return path


def test_log_of_a_run_is_read_by_its_folder_or_its_file(tmp_path, monkeypatch):
    path = write(tmp_path / "hr18/log.jsonl", TRAIN, VAL)
    monkeypatch.chdir(path.parent)
    for name in (path.parent, path, str(path), "log.jsonl", "."):
        assert read_log(name) == ("hr18", [TRAIN], [VAL])


def test_what_is_no_entry_is_skipped_and_the_last_of_an_iteration_counts(tmp_path):
    others = [VAL | {"mIoU": None}, VAL | {"iter": "100"}, VAL | {"iter": True}, {"iter": 5}, [1, 2], 3, {"seed": 0}]
    later = TRAIN | {"iter": 100}
    path = write(tmp_path / "log.jsonl", "\udcff\n", *others, later | {"loss": 7}, TRAIN, later, json.dumps(VAL)[:-9])
    assert read_log(path)[1:] == ([TRAIN, later], [])
    assert read_log(write(path, TRAIN | {"loss": None}, VAL))[1:] == ([], [VAL])
    assert [np.isnan(read_log(write(path, TRAIN | lr)).train[0]["lr"]) for lr in ({}, {"lr": None})] == [False, True]


def test_log_of_mmengine_is_read(tmp_path):
    for file, name in (("a.log", "a"), ("b/20240501_100000/20240501_100000.log", "b"), ("c/2024_1.log", "2024_1")):
        found, train, val = read_log(write(tmp_path / file, MMENGINE))
        expected = [(1, 2.5, 0.01), (50, 1.9, 9.9891e-03), (51, math.inf, 9.9e-03), (52, math.nan, math.nan)]
        expected = [{"split": "train", "iter": i, "loss": loss, "lr": lr} for i, loss, lr in expected]
        np.testing.assert_equal((found, train), (name, expected))
        # a validation is at the iteration of the line before it, also in a part that is repeated
        assert val == [{"split": "val", "iter": 50, "mIoU": 0.615}, {"split": "val", "iter": 51, "mIoU": 0.62}]


def test_log_of_mmsegmentation_0_is_read(tmp_path):
    train = [{"mode": "train", "epoch": 1, "iter": i, "lr": i / 1e3, "loss": 2 / i} for i in (50, 100)]
    val = [{"mode": "val", "epoch": 1, "iter": i, "lr": 0.01, "mIoU": i / 200} for i in (9, 50, 20)]  # 20: images
    for file, name in (("a_033320.log.json", "a_033320"), ("b/20200601_033320.log.json", "b")):
        log = read_log(write(tmp_path / file, {"env": "x", "iter": 3}, val[0], train[0], val[1], train[1], val[2]))
        shown = [(x["iter"], x["loss"], x["lr"]) for x in log.train], [(x["iter"], x["mIoU"]) for x in log.val]
        assert log.name == name and shown == ([(50, 0.04, 0.05), (100, 0.02, 0.1)], [(50, 0.25), (100, 0.1)])


def test_file_that_is_not_a_log_is_named(tmp_path):
    for content in (None, "", "hello\n", "{}\n{\n"):
        with pytest.raises(InputError, match=f"^{tmp_path / 'log.jsonl'}: "):
            read_log(tmp_path if content is None else write(tmp_path / "log.jsonl", content))


@pytest.mark.filterwarnings("error")
def test_a_loss_that_is_not_finite_leaves_a_gap_only():
    found = smooth([1, math.nan, math.nan, 2, 2, math.inf, 3], window=2)
    assert np.array_equal(found, [1, 1, math.nan, 2, 2, 2, 3], equal_nan=True)
    assert smooth([9, 3, 3, 0], window=3).tolist() == [9, 6, 5, 2]
    assert [smoothing_window([0] * n) for n in (1, 14, 15, 29, 30)] == [1, 1, 2, 2, 3]


def test_losses_are_compared_where_both_logs_have_iterations():
    def log(losses):
        return Log("a", [{"iter": i, "loss": loss} for i, loss in losses.items()], [VAL])

    first, second = log({2 * i: i for i in range(1, 13)}), log({2 * i - 1: 10 * i for i in range(1, 12)})
    assert [x.tolist() for x in compare_losses(first, second)] == [[*range(1, 11)], [20, *range(25, 115, 10)]]
    assert [x.tolist() for x in compare_losses(second, first)] == [[*range(20, 120, 10)], [*np.arange(1.5, 10), 10]]
    for other in (log({}), *(log(dict.fromkeys(range(start, 41, 2), 1)) for start in (8, 24, 26))):
        for pair in ((first, other), (other, first)):
            with pytest.raises(InputError, match="^--compare: .* [019] of "):
                compare_losses(*pair)


def test_a_log_is_cut_where_the_checkpoint_stands(tmp_path):
    path = tmp_path / "log.jsonl"
    trim_log(path, 4, 2)
    assert not path.exists()
    kept = [{**TRAIN, "iter": 1}, {**TRAIN, "iter": 2}, {**VAL, "iter": 2}, {**TRAIN, "iter": 4}]
    later = [{**VAL, "iter": 3}, {**TRAIN, "iter": 5}, json.dumps({**TRAIN, "iter": 3})]  # without its newline
    write(path, "{damaged\n", *kept[:2], "\udcff\n", kept[2], '{"loss": 1}\n', kept[3], *later)
    trim_log(path, 4, 2)
    assert path.read_text() == write(tmp_path / "kept.jsonl", *kept, {**TRAIN, "iter": 3}).read_text()
    file = path.stat().st_ino
    trim_log(path, 4, 2)
    assert path.stat().st_ino == file  # not written again


LOSSES, NAN = [3, 1.5, 1, 0.75] * 3, [float("nan")] * 12


def run_of(folder, losses, *more):
    train = [{**TRAIN, "iter": i, "loss": loss} for i, loss in enumerate(losses, 1)]
    return write(folder / "log.jsonl", *train, *more).parent


@pytest.fixture
def logs(tmp_path):
    validations = [{**VAL, "iter": 2, "mIoU": 0.25}, {**VAL, "iter": 4, "mIoU": 0.125}]
    return run_of(tmp_path / "run", LOSSES, *validations), write(tmp_path / "original.log", MMENGINE)


def test_a_run_is_plotted_beside_a_log_of_mmengine(main, logs, tmp_path, capsys):
    main("plot_curve.py", *logs, run_of(tmp_path / "one", [1]), "--output", tmp_path / "all.PNG")
    printed = capsys.readouterr().out
    rows = re.findall(r"^(\w+): (\d+) \D+ (\d+) [^\d\n]+(?:([\d.]+)%)?$", printed, re.MULTILINE)
    assert rows == [("run", "12", "2", "25.00"), ("original", "4", "2", "62.00"), ("one", "1", "0", "")]
    assert str(tmp_path / "all.PNG") in printed and Image.open(tmp_path / "all.PNG").format == "PNG"


@pytest.mark.parametrize("losses, other, passes", [
    ([1.049] * 10, [1] * 10, True), ([1.051] * 10, [1] * 10, False), (NAN, LOSSES, False), (NAN, NAN, False),
    ([0.6] * 10, [1] * 10, False), ([1.2, 0.8] * 5, [1] * 10, False),  # whose signed means pass
    ([1.19e-3] * 10, [1e-3] * 10, True), ([1.21e-3] * 10, [1e-3] * 10, False),
    ([1] * 20 + [math.inf] + [1] * 3, [1] * 24, False),  # the means of two entries are finite
    ([1 / i for i in range(1, 51)], [1 / i for i in range(1, 201)], True),  # its own first part
])  # fmt: skip
def test_losses_are_compared_by_absolute_differences(main, tmp_path, losses, other, passes):
    with contextlib.nullcontext() if passes else pytest.raises(SystemExit, match="^1$"):
        main("plot_curve.py", run_of(tmp_path / "a", losses), run_of(tmp_path / "b", other), "--compare")
    assert not list(tmp_path.rglob("*.png"))


def test_two_logs_are_compared_in_numbers_and_with_a_png_if_asked_for(main, logs, tmp_path, capsys):
    first = run_of(tmp_path / "a", np.multiply(LOSSES, [1.04, 0.98, 1, 0.96] * 3))
    main("plot_curve.py", first, logs[0], "--compare", "--output", tmp_path / "x.png")
    numbers = re.findall(r"\n\d+|[-+]?\d+\.\d+%?", capsys.readouterr().out.partition(str(tmp_path / "x.png"))[2])
    assert numbers == ["\n12", "0.7200", "0.7500", "2.50%", "-0.50%", "0.04500", "0.0002"]
    for args in ((first, "--compare"), (first, *logs, "--compare"), (first, "--output", tmp_path / "curve.svg")):
        with pytest.raises(SystemExit, match="^2$"):
            main("plot_curve.py", *args)


def test_the_figure_is_beside_the_first_log_and_only_own_figures_are_overwritten(main, logs, tmp_path):
    for _ in range(2):
        main("plot_curve.py", *logs)
    assert (logs[0] / "curve.png").exists()
    Image.new("RGB", (3, 3)).save(tmp_path / "curve.png")
    before = (tmp_path / "curve.png").read_bytes()
    with pytest.raises(InputError, match=f"^{tmp_path / 'curve.png'}: "):
        main("plot_curve.py", *reversed(logs))
    assert (tmp_path / "curve.png").read_bytes() == before


def test_logs_of_one_name_are_told_apart_by_their_paths(main, logs, tmp_path, capsys):
    other = shutil.copytree(logs[0], tmp_path / "other/run")
    main("plot_curve.py", logs[0], other, "--compare")
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:2]] == [str(logs[0]), str(other)]
