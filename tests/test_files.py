"""Atomic writes, and the map over a pool of workers."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from ocrnet.files import atomic_write, parallel_map, remove_partial_files


def test_atomic_write_replaces_the_file_only_at_the_end(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with atomic_write(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.png"
    for before in ([], [path]):
        with pytest.raises(KeyboardInterrupt), atomic_write(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == before
        path.write_text("old")
    assert path.read_text() == "old"


def test_only_partial_files_are_removed(tmp_path):
    with atomic_write(tmp_path / "d.png") as part:
        part.write_text("")
        left = tmp_path / "killed" / part.name  # the name that a killed write leaves behind
        left.parent.mkdir()
        os.link(part, left)
    for name in ("a.png.part123", "gtFine.part1.rar", "b.png", "c.part"):
        (tmp_path / name).write_text("")
    remove_partial_files([*tmp_path.glob("*.part*"), left])
    assert {path.name for path in tmp_path.iterdir()} == {"gtFine.part1.rar", "b.png", "c.part", "d.png", "killed"}
    assert not left.exists()


def test_parallel_map_returns_results_in_order_and_raises_the_first_error():
    assert parallel_map(ThreadPoolExecutor(2), lambda x: 2 * x, range(20), "") == list(range(0, 40, 2))
    assert parallel_map(ThreadPoolExecutor(2), str, [], "") == []
    with pytest.raises(ZeroDivisionError):
        parallel_map(ThreadPoolExecutor(2), lambda x: 1 / (x - 3), range(20), "")
