"""plot_curve.py: curves of this project's logs and of mmengine's."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image
from test_logs import MMENGINE, TRAIN, VAL, write

from ocrnet import InputError, plots

LOSSES = [3, 1.5, 1, 0.75]


def run_of(folder, losses, *more):
    """The folder of a run with these training losses."""
    return write(
        folder / "log.jsonl", *({**TRAIN, "iter": i, "loss": x} for i, x in enumerate(losses, 1)), *more
    ).parent


@pytest.fixture
def logs(tmp_path):
    """The folder of a run, and a log of mmengine."""
    validations = [{**VAL, "iter": 2, "mIoU": 0.25}, {**VAL, "iter": 4, "mIoU": 0.125}]
    return run_of(tmp_path / "run", LOSSES, *validations), write(tmp_path / "original.log", MMENGINE)


def status(main, *args):
    """The exit status of the script."""
    try:
        main("plot_curve.py", *args)
    except SystemExit as error:
        return error.code
    return 0


def test_a_run_is_plotted_beside_a_log_of_mmengine(main, logs, tmp_path, capsys):
    main("plot_curve.py", *logs, run_of(tmp_path / "one", [1]), "--output", tmp_path / "all.PNG")
    printed = capsys.readouterr().out
    rows = re.findall(r"^(\w+): (\d+) \D+ (\d+) [^\d\n]+(?:([\d.]+)%)?$", printed, re.MULTILINE)
    assert rows == [("run", "4", "2", "25.00"), ("original", "4", "2", "62.00"), ("one", "1", "0", "")]
    assert str(tmp_path / "all.PNG") in printed
    Image.open(tmp_path / "all.PNG").verify()


@pytest.mark.parametrize(
    "scale, factors, expected",
    [
        (1, [1.04, 0.98, 1, 0.96], 0), (1, [1.049] * 4, 0), (1, [1.051] * 4, 1), (1, [float("nan")] * 4, 1),
        (1, [0.6] * 4, 1), (1, [1.2, 0.8, 1.2, 0.8], 1),  # whose signed means pass
        (1e-3, [1.12] * 4, 0), (1e-3, [1.14] * 4, 1),  # 0.00019 and 0.00022 apart
    ],
)  # fmt: skip
def test_losses_are_compared_by_absolute_differences(main, tmp_path, scale, factors, expected):
    losses = scale * np.array(LOSSES)
    first, second = run_of(tmp_path / "a", losses * factors), run_of(tmp_path / "b", losses)
    assert status(main, first, second, "--compare") == expected
    assert not list(tmp_path.rglob("*.png"))


def test_the_differences_are_printed_and_a_figure_is_written_if_asked_for(main, logs, tmp_path, capsys):
    first = run_of(tmp_path / "a", np.multiply(LOSSES, [1.04, 0.98, 1, 0.96]))
    main("plot_curve.py", first, logs[0], "--compare", "--output", tmp_path / "x.png")
    numbers = re.findall(r"[-+]?\d+\.\d+%?", capsys.readouterr().out.partition(str(tmp_path / "x.png"))[2])
    assert numbers == ["0.7200", "0.7500", "2.50%", "-0.50%", "0.04500", "0.0002"]
    assert (tmp_path / "x.png").exists()


def test_a_run_equals_its_own_first_part(main, tmp_path, capsys):
    losses = [1 / i for i in range(1, 201)]
    main("plot_curve.py", run_of(tmp_path / "part", losses[:50]), run_of(tmp_path / "whole", losses), "--compare")
    assert " 0.00%" in capsys.readouterr().out


def test_two_logs_are_compared_and_a_figure_is_a_png(main, logs, tmp_path):
    for args in ((logs[0], "--compare"), (*logs, logs[0], "--compare"), (logs[0], "--output", tmp_path / "curve.svg")):
        assert status(main, *args) == 2


def test_the_figure_is_beside_the_first_log_by_default(main, logs, monkeypatch):
    paths = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: paths.append(path))
    main("plot_curve.py", *logs)
    main("plot_curve.py", *reversed(logs))
    assert paths == [logs[0] / "curve.png", logs[1].parent / "curve.png"]


def test_logs_of_one_name_are_told_apart_by_their_paths(main, logs, tmp_path, capsys):
    other = shutil.copytree(logs[0], tmp_path / "other/run")
    assert status(main, logs[0], other, "--compare") == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:2]] == [str(logs[0]), str(other)]


def test_only_own_figures_are_overwritten(main, logs, tmp_path):
    for _ in range(2):
        main("plot_curve.py", logs[0])
    Image.new("RGB", (3, 3)).save(tmp_path / "photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    with pytest.raises(InputError, match=f"^{tmp_path / 'photo.png'}: "):
        main("plot_curve.py", *logs, "--output", tmp_path / "photo.png")
    assert (tmp_path / "photo.png").read_bytes() == before
