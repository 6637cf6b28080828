"""Shared by the tests: a small generated data set, the real scripts, and runs of train.py."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for torch, here and in the scripts: threads wait without spinning

import contextlib
import importlib
import itertools
import json
import multiprocessing
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ocrnet import plots
from ocrnet.checkpoint import load_checkpoint
from ocrnet.data.synthetic import write_dataset
from ocrnet.device import DEVICES
from ocrnet.losses import ocr_loss
from ocrnet.models import BACKBONES, HRNet

ROOT = Path(__file__).resolve().parents[1]
BACKBONES["tiny"] = partial(HRNet, width=2, num_modules=(1, 1, 1), num_blocks=1, head_channels=(16, 8))  # for --model
DEVICES["cpu"] = DEVICES["cpu"]._replace(amp=False)  # the same precision on every CPU


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # as in ``script``: on CPUs with AVX-512 another number rounds differently


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data set of 6 training and 5 validation images of 128x256. Read-only."""
    root = tmp_path_factory.mktemp("data") / "synthetic"
    write_dataset(root, {"train": 6, "val": 5})
    return root


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["train", "evaluate", "torch._dynamo"])  # imported once, for all processes


def run_script_file(path: str, args: list[str], environment: dict[str, str], output: str, figures: bool) -> None:
    """What a process of ``script`` does: ``python path args`` in one thread."""
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT), number)
    for number in (signal.SIGINT, signal.SIGHUP):  # which nohup and background jobs of a shell ignore
        signal.signal(number, signal.SIG_DFL)
    multiprocessing.set_start_method(None, force=True)  # of data loader workers: the default again
    torch.set_num_threads(1)
    if not figures:
        plots.draw_run = lambda *args: None
    sys.argv = [path, *args]
    sys.path.insert(0, os.path.dirname(path))
    runpy.run_path(path, run_name="__main__")


class Running:
    """A running script: a process for each rank. ``stdout`` and ``stderr`` are those of all ranks."""

    def __init__(self, path: Path, args: Sequence[str], processes: int, output: Path, figures: bool):
        self.outputs = [f"{output}{rank}" for rank in range(processes)]
        self.processes = []
        with socket.create_server(("localhost", 0)) as free:
            port = str(free.getsockname()[1])
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        address["LOCAL_WORLD_SIZE"] = address["WORLD_SIZE"]
        for rank, file in enumerate(self.outputs):
            place = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            rank_args = (str(path), list(args), {**os.environ, **place}, file, figures)
            self.processes.append(FORKSERVER.Process(target=run_script_file, args=rank_args))
            self.processes[-1].start()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all ranks and their descendants, as terminals and schedulers do."""
        for pid in [pid for process in self.processes if process.is_alive() for pid in family(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds: float = 240) -> int:
        """Wait for all ranks. Return the first exit status that is not 0, else 0."""
        until(lambda: not any(process.is_alive() for process in self.processes), seconds)
        return next((process.exitcode for process in self.processes if process.exitcode), 0)

    def read(self, name: str) -> str:
        """What all ranks have written so far."""
        paths = [Path(f"{file}.{name}") for file in self.outputs]
        return "".join(path.read_text() for path in paths if path.exists())

    stdout = property(lambda self: self.read("stdout"))
    stderr = property(lambda self: self.read("stderr"))


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    """script("train.py", "--max-iters", 2, processes=2) runs a script as torchrun does, on this host -> ``Running``.

    The processes are forked from one that has imported torch, because that takes seconds.

    Args:
        name: of a script in the repository, or a path.
        processes: ranks of a process group. 1: without a process group.
        ok: whether exit status 0 is expected. None for either.
        wait: False to return while it is running.
        figures: whether train.py draws its figures, which takes seconds.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        forkserver.ensure_running()
    started = []

    def call(name, *args, processes=1, ok=True, wait=True, figures=False):
        output = tmp_path_factory.mktemp("output") / "rank"
        run = Running(ROOT / name, [str(arg) for arg in args], processes, output, figures)
        started.append(run)
        if wait:
            status = run.wait()
            assert ok is None or (status == 0) == ok, f"{name} {args} ended with {status}\n{run.stdout}\n{run.stderr}"
        return run

    yield call
    for run in started:  # where a test failed
        run.send(signal.SIGKILL)


@pytest.fixture(scope="session")
def main():
    """main("train.py", "--max-iters", 2) runs a script in this process and lets its exceptions through.

    Faster than ``script``, for what needs no process group and no exit status.
    """

    def call(name, *args):
        handlers = {number: signal.getsignal(number) for number in map(signal.Signals, range(1, 18)) if number != 9}
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [name, *map(str, args)])
                importlib.import_module(name.removesuffix(".py")).main()
        finally:
            for number, handler in handlers.items():  # train.py sets its own
                signal.signal(number, handler)

    return call


def error_of(done: Running) -> str:
    """The error of a script in one process: exit status 1, no traceback, and one line at the end of stderr."""
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert done.wait() == 1 and errors == lines[-1:] and "Traceback" not in done.stderr, done.stderr
    return errors[0]


def until(condition: Callable[[], bool], seconds: float = 240) -> None:
    """Wait until ``condition()`` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [pid, *(descendant for child in children for descendant in family(int(child)))]


RUN = ["--model=tiny", "--crop-size", "32", "64", "--batch-size=2", "--workers=1", "--log-every=1", "--device=cpu"]
EIGHT_ITERATIONS = [*RUN, "--max-iters=8", "--val-every=4", "--save-every=3", "--log-every=2", "--class-weights=auto"]


@pytest.fixture(scope="session")
def trained(script, data, tmp_path_factory) -> Path:
    """The folder of a run of eight iterations on two processes. Read-only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    script("train.py", *EIGHT_ITERATIONS, "--data-path", data, "--output-dir", folder, processes=2, figures=True)
    return folder


def entries(log: Path, split: str | None = None) -> list[dict]:
    """The lines of a log.jsonl, of one split if it is given."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if split in (None, line["split"])]


def same_run(first: Path, second: Path) -> None:
    """Assert that two runs' folders hold bit-identical checkpoints and validations.

    Training entries are means since the entry before, and a resumed run begins a new mean: their numbers may differ.
    """
    assert entries(first / "log.jsonl", "val") == entries(second / "log.jsonl", "val")
    for name in ("last.pt", "best.pt"):
        same_state(*(load_checkpoint(folder / name) for folder in (first, second)))


def same_state(first: dict, second: dict) -> None:
    """Assert that two checkpoints are bit-identical in what training changes."""
    names = ("model", "optimizer", "scaler", "iter", "validated", "best")
    states = [{name: state[name] for name in names} for state in (first, second)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


class ReachedError(Exception):
    """Ends a run where a test has seen enough."""


def raise_reached(*args):
    raise ReachedError


@pytest.fixture
def train_here(main, monkeypatch, data, tmp_path):
    """train_here("--max-iters", 2) runs train.py in this process without figures -> last.pt, or None.

    Args:
        folder: --output-dir.
        validate: False to end with the first validation, before which last.pt is saved.
        before_loss: called as before_loss(n, outputs, label, class_weights) before the n-th loss, from 1.
    """

    def call(*flags, folder=tmp_path, validate=True, before_loss=lambda *args: None):
        def loss(outputs, label, class_weights=None):
            before_loss(next(numbers), outputs, label, class_weights)
            return ocr_loss(outputs, label, class_weights)

        numbers, args = itertools.count(1), [*RUN, "--workers", 0, "--data-path", data, "--output-dir", folder, *flags]
        with monkeypatch.context() as patch, contextlib.suppress(ReachedError):
            patch.setattr("train.ocr_loss", loss)
            patch.setattr(plots, "draw_run", lambda *args: None)
            if not validate:
                patch.setattr("train.evaluate", raise_reached)
            main("train.py", *args)
        return load_checkpoint(folder / "last.pt") if (folder / "last.pt").exists() else None

    return call
