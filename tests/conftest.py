"""What several tests share: a small generated data set, and running the real scripts."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ocrnet.data.cityscapes import write_missing_train_ids
from ocrnet.data.synthetic import write_dataset
from ocrnet.models.weights import MMSEGMENTATION

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
    """script("train.py", "--iters", 2, processes=2, ok=False) -> the finished process, its output as text.

    With wait=False it is left running: see ``kill``.
    """

    def call(name, *args, processes=1, ok=True, wait=True):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / name), *map(str, args)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1" if processes > 1 else "2"}
        if not wait:
            return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert (done.returncode == 0) == ok, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for a process and all that it started, torchrun's workers too, which are in sessions of their own."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in listing.splitlines())
    doomed = [process.pid]
    for pid in doomed:  # grows while it is walked
        doomed += [child for child, parent in parents.items() if parent == pid]
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def as_theirs(model, table, prefix=""):
    """Our tensors under another project's names, as its file would have them."""
    theirs = {}
    for name, x in model.state_dict().items():
        start, own = max(
            ((start, own) for start, own in table.items() if name.startswith(own)), key=lambda pair: len(pair[1])
        )
        theirs[prefix + start + name[len(own) :]] = x
    return theirs


def as_mmsegmentation(model):
    """Our tensors under mmsegmentation's names."""
    stem = {} if model.config["deep_stem"] else {"backbone.stem.", "backbone.stem.7."}
    table = {theirs: ours for theirs, ours in MMSEGMENTATION.items() if theirs not in stem}
    return as_theirs(model, {**table, "backbone.": "backbone."})
