"""Shared by the tests: a small generated data set, and the real scripts.

As a script, ``conftest.py SCRIPT ARGUMENTS`` runs another script with the backbone "tiny" and without figures.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for torch, here and in the scripts: threads wait without spinning

import contextlib
import importlib
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
from ocrnet.data.synthetic import write_dataset
from ocrnet.device import DEVICES
from ocrnet.models import BACKBONES, HRNet

ROOT = Path(__file__).resolve().parents[1]
BACKBONES["tiny"] = partial(HRNet, width=2, num_modules=(1, 1, 1), num_blocks=1)  # for --model, also in ``script``
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


# ---- running scripts -------------------------------------------------------------------------------------------------

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
        skip_figures()
    sys.argv = [path, *args]
    sys.path.insert(0, os.path.dirname(path))
    runpy.run_path(path, run_name="__main__")


def skip_figures() -> None:
    """Make train.py draw nothing, because that takes seconds."""
    plots.draw_run = lambda *args: None


class Running:
    """A running script: a process for each rank. ``stdout`` and ``stderr`` are those of all ranks."""

    def __init__(self, path: Path, args: Sequence[str], processes: int, output: Path, figures: bool):
        self.outputs = [f"{output}{rank}" for rank in range(processes)]
        self.processes = []
        size = str(processes)
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        address |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        for rank, file in enumerate(self.outputs):
            place = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            rank_args = (str(path), list(args), {**os.environ, **place}, file, figures)
            self.processes.append(FORKSERVER.Process(target=run_script_file, args=rank_args))
            self.processes[-1].start()

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all ranks and their descendants, as terminals and schedulers do."""
        for process in self.processes:
            if process.is_alive():
                send_to_family(process.pid, number)

    def wait(self, seconds: float = 240) -> int:
        """Wait for all ranks. Return the first exit status that is not 0, else 0."""
        until(lambda: not self.is_alive(), seconds)
        return next((process.exitcode for process in self.processes if process.exitcode), 0)

    @property
    def returncode(self) -> int:
        return self.wait()

    @property
    def stdout(self) -> str:
        return self.read("stdout")

    @property
    def stderr(self) -> str:
        return self.read("stderr")

    def read(self, name: str) -> str:
        """What all ranks have written so far."""
        paths = [Path(f"{file}.{name}") for file in self.outputs]
        return "".join(path.read_text() for path in paths if path.exists())


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    """script("train.py", "--max-iters", 2, processes=2) runs a script as torchrun does, on this host -> ``Running``.

    The processes are forked from one that has imported torch, because that takes seconds. For torchrun itself see the
    fixture ``torchrun``.

    Args:
        name: of a script in the repository, or a path.
        processes: ranks of a process group. 1: without a process group.
        ok: whether exit status 0 is expected. None for either.
        wait: False to return while it is running.
        figures: whether train.py draws its figures.
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


@pytest.fixture
def torchrun():
    """torchrun("train.py", "--max-iters", 2, launcher=["--nproc_per_node=2"]) starts torchrun -> its process."""
    started = []

    def call(name, *args, launcher):
        command = [sys.executable, "-m", "torch.distributed.run", *launcher, __file__, ROOT / name, *args]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started.append(subprocess.Popen([str(arg) for arg in command], env=environment, **quiet))
        return started[-1]

    yield call
    for process in started:  # where a test failed
        if process.poll() is None:
            send_to_family(process.pid, signal.SIGKILL)
            process.wait()


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
    assert done.returncode == 1 and errors == lines[-1:] and "Traceback" not in done.stderr, done.stderr
    return errors[0]


def until(condition: Callable[[], bool], seconds: float = 240) -> None:
    """Wait until ``condition()`` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def processes_of(root: int) -> list[tuple[int, int, str]]:
    """(id, parent's id, command) of a process and its descendants, including torchrun's workers in other sessions."""
    listing = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = {
        int(pid): (int(parent), command) for pid, parent, command in (x.split(None, 2) for x in listing.splitlines())
    }
    family = [root]
    for pid in family:  # grows during the loop
        family += [child for child, (parent, _) in rows.items() if parent == pid]
    return [(pid, *rows[pid]) for pid in family if pid in rows]


def send_to_family(root: int, number: signal.Signals) -> None:
    """Send a signal to a process and its descendants."""
    for pid, _, _ in processes_of(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# ---- runs of train.py ------------------------------------------------------------------------------------------------

RUN = [
    "--model", "tiny", "--crop-size", 32, 64, "--batch-size", 2, "--workers", 1, "--log-every", 1, "--device", "cpu",
]  # fmt: skip
EIGHT_ITERATIONS = [*RUN, "--max-iters", 8, "--val-every", 4, "--save-every", 3, "--log-every", 2]


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
    one, two = (first / "log.jsonl", second / "log.jsonl")
    first_scores, second_scores = ([{**x, "images_per_s": None} for x in entries(log, "val")] for log in (one, two))
    assert first_scores == second_scores
    for log in (one, two):
        iterations = [entry["iter"] for entry in entries(log, "train")]
        assert iterations == sorted(set(iterations))
    for name in ("last.pt", "best.pt"):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (first, second))
        assert one["model"].keys() == two["model"].keys()
        assert all(torch.equal(x, two["model"][key]) for key, x in one["model"].items())
        momentum = [[x["momentum_buffer"] for x in state["optimizer"]["state"].values()] for state in (one, two)]
        assert all(torch.equal(x, y) for x, y in zip(*momentum, strict=True))
        assert all(one[key] == two[key] for key in ("iter", "best", "validated"))


if __name__ == "__main__":
    skip_figures()
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
