"""What several tests share: a small generated data set, and running the real scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ocrnet.data.cityscapes import write_missing_train_ids
from ocrnet.data.synthetic import write_dataset

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A prepared data set of 6 training and 5 validation pictures. Do not write there."""
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, {"train": 6, "val": 5})
    write_missing_train_ids(root)
    return root


@pytest.fixture(scope="session")
def script():
    """script("train.py", "--iters", 2, processes=2, ok=False) -> the finished process, its output as text."""

    def call(name, *args, processes=1, ok=True, cwd=None):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / name), *map(str, args)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1" if processes > 1 else "2"}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
        assert (done.returncode == 0) == ok, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call
