"""What several tests share: a small generated data set, and running the real scripts."""

import contextlib
import importlib
import json
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

    With wait=False it is left running: see ``kill``. ``launcher`` holds further flags of torchrun, which starts it if
    there are any; ``options`` are those of subprocess.
    """

    def call(name, *args, processes=1, launcher=(), ok=True, wait=True, **options):
        command = [sys.executable]
        if processes > 1 or launcher:
            standalone = [] if any("rdzv" in flag for flag in launcher) else ["--standalone"]
            command += ["-m", "torch.distributed.run", *standalone, f"--nproc_per_node={processes}", *launcher]
        command += [str(ROOT / name), *map(str, args)]
        options["env"] = {**os.environ, "OMP_NUM_THREADS": "1" if processes > 1 or launcher else "2"}
        if not wait:
            return subprocess.Popen(command, **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **options})
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, **options)
        assert (done.returncode == 0) == ok, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.fixture
def main(monkeypatch):
    """main("train.py", "--iters", 2) runs a script in this process, as far as to its first error, which it raises.

    Quicker than ``script``, for what ends before a process group or a loop is there.
    """

    def call(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        importlib.import_module(name.removesuffix(".py")).main()

    return call


def processes_of(root: int) -> list[tuple[int, int, str]]:
    """A process and all that descend from it, torchrun's workers too, which are in sessions of their own.

    -> (id, parent's id, command) of each.
    """
    listing = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = {
        int(pid): (int(parent), command) for pid, parent, command in (x.split(None, 2) for x in listing.splitlines())
    }
    family = [root]
    for pid in family:  # grows while it is walked
        family += [child for child, (parent, _) in rows.items() if parent == pid]
    return [(pid, *rows[pid]) for pid in family if pid in rows]


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for a process and all that descend from it."""
    for pid, _, _ in processes_of(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


# ---- runs of train.py ----

RUN = ["--model", "hr18s", "--crop", 32, 64, "--batch-size", 2, "--workers", 1, "--log-every", 1, "--device", "cpu"]


def entries(log: Path) -> list[dict]:
    """The lines of a log.jsonl."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def same_run(first: Path, second: Path) -> None:
    """Two runs' folders hold the same weights, momentum, best score and, but for the speed, the same log."""

    def without_speed(folder):
        timed = {"images_per_s", "waiting_for_data"}
        return [{k: v for k, v in entry.items() if k not in timed} for entry in entries(folder / "log.jsonl")]

    assert without_speed(first) == without_speed(second)
    for name in ("last.pt", "best.pt"):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (first, second))
        assert all(torch.equal(x, two["model"][key]) for key, x in one["model"].items())
        buffers = [[x["momentum_buffer"] for x in state["optimizer"]["state"].values()] for state in (one, two)]
        assert all(torch.equal(x, y) for x, y in zip(*buffers, strict=True))
        assert (one["iter"], one["best"], one["validated"]) == (two["iter"], two["best"], two["validated"])


# ---- other people's names ----


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
