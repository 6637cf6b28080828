"""plot_curve.py: curves of this project's logs and of mmengine's."""

import json
import re
import shutil

import pytest
from PIL import Image

from ocrnet import InputError

LOSSES = [3, 1.5, 1, 0.75]
VAL = [{"split": "val", "iter": 2, "mIoU": 0.25}, {"split": "val", "iter": 4, "mIoU": 0.125}]
MMENGINE = (
    "05/01 09:59:00 - mmengine - \x1b[4m\x1b[32mINFO\x1b[0m - Iter(train) [ 1/40000]  lr: 1e-02  loss: 2.5\n"
    "2024/05/01 10:00:00 - mmengine - INFO - Iter(train) [ 50/40000]  lr: 9.9891e-03  eta: 5:23:11  loss: 1.9000\n"
    "2024/05/01 10:09:00 - mmengine - INFO - Iter(val) [500/500]    aAcc: 90.0000  mIoU: 61.5000  mAcc: 70.0000\n"
)


def run_of(folder, losses, more=()):
    """The folder of a run with these training losses."""
    folder.mkdir()
    train = [{"split": "train", "iter": i, "loss": loss, "lr": 0.01 / i} for i, loss in enumerate(losses, 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in (*train, *more)))
    return folder


@pytest.fixture
def logs(tmp_path):
    """The folder of a run, and a log of mmengine."""
    (tmp_path / "original.log").write_text(MMENGINE)
    return run_of(tmp_path / "run", LOSSES, VAL), tmp_path / "original.log"


def test_a_run_is_plotted_beside_a_log_of_mmengine(main, logs, tmp_path, capsys):
    main("plot_curve.py", *logs, "--output", tmp_path / "both.png")
    rows = re.findall(r"^(\w+): (\d+) .* (\d+) .* ([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)
    assert rows == [("run", "4", "2", "25.00"), ("original", "2", "1", "61.50")]
    Image.open(tmp_path / "both.png").verify()


def test_losses_are_compared_by_absolute_differences(main, logs, tmp_path, capsys):
    def scaled(name, *factors):
        return run_of(tmp_path / name, [loss * factor for loss, factor in zip(LOSSES, factors, strict=True)])

    main("plot_curve.py", scaled("close", 1.04, 0.98, 1.01, 0.97), logs[0], "--compare")
    assert "2.50%" in capsys.readouterr().out and not list(tmp_path.rglob("*.png"))
    for name, factors in (("lower", [0.6] * 4), ("crossing", [1.2, 0.8, 1.2, 0.8])):  # whose signed means pass
        with pytest.raises(SystemExit) as error:
            main("plot_curve.py", scaled(name, *factors), logs[0], "--compare")
        assert error.value.code == 1
    small = scaled("small", 1e-3, 1e-3, 1e-3, 1e-3)
    main("plot_curve.py", scaled("tiny", 1.1e-3, 1e-3, 1e-3, 1e-3), small, "--compare")  # 0.000075 apart


def test_a_run_equals_its_own_first_part(main, tmp_path, capsys):
    losses = [1 / i for i in range(1, 201)]
    part, whole = run_of(tmp_path / "part", losses[:50]), run_of(tmp_path / "whole", losses)
    main("plot_curve.py", part, whole, "--compare")
    assert " 0.00%" in capsys.readouterr().out


def test_a_loss_that_is_not_a_number_is_not_equal(main, logs, tmp_path):
    nan = run_of(tmp_path / "nan", [float("nan")] * 4)
    for pair in ((nan, logs[0]), (nan, nan)):
        with pytest.raises(SystemExit) as error:
            main("plot_curve.py", *pair, "--compare")
        assert error.value.code == 1


def test_logs_to_compare_are_two_of_the_same_iterations(main, logs, tmp_path):
    for flags in (["--compare"], ["--output", tmp_path / "curve.svg"]):
        with pytest.raises(SystemExit) as error:
            main("plot_curve.py", logs[0], *flags)
        assert error.value.code == 2
    (tmp_path / "late.log").write_text(MMENGINE.replace("[ 1/", "[ 40/"))
    with pytest.raises(InputError, match="^--compare: "):
        main("plot_curve.py", logs[0], tmp_path / "late.log", "--compare")


def test_the_figure_is_beside_the_first_log_by_default(main, logs):
    main("plot_curve.py", *logs)
    Image.open(logs[0] / "curve.png").verify()
    main("plot_curve.py", *reversed(logs))
    Image.open(logs[1].parent / "curve.png").verify()


def test_logs_of_one_name_are_told_apart_by_their_paths(main, logs, tmp_path, capsys):
    shutil.copytree(logs[0], tmp_path / "other/run")
    paths = [logs[0], tmp_path / "other/run"]
    main("plot_curve.py", *paths, "--output", tmp_path / "both.png")
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:2]] == list(map(str, paths))


def test_only_own_figures_are_overwritten(main, logs, tmp_path):
    for _ in range(2):
        main("plot_curve.py", *logs, "--output", tmp_path / "curve.png")
    Image.new("RGB", (3, 3)).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("mine")
    for name in ("photo.png", "text.png"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(InputError, match=f"^{tmp_path / name}: "):
            main("plot_curve.py", *logs, "--output", tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
