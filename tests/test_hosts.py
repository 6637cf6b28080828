"""Several machines, and processes that are lost."""

import contextlib
import os
import random
import signal
import time

import pytest
from conftest import EIGHT_ITERATIONS, FORKSERVER, TINY_RUN, free_port, processes_of, same_run, until

from ocrnet.signals import ignore_signals_in_worker


def test_two_hosts_train_as_one_host_with_as_many_processes(torchrun, trained, data, tmp_path):
    rendezvous = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=1"]
    flags = [*EIGHT_ITERATIONS, "--data-path", data]
    hosts = [  # each with its own disk
        torchrun("train.py", *flags, "--output-dir", tmp_path / name, launcher=rendezvous) for name in ("a", "b")
    ]
    assert [host.wait(240) for host in hosts] == [0, 0]
    [folder] = tmp_path.iterdir()  # that of the host of rank 0
    same_run(trained, folder)


def test_torchrun_restarts_a_run_whose_process_was_killed(torchrun, trained, data, tmp_path):
    flags = [*EIGHT_ITERATIONS, "--data-path", data, "--output-dir", tmp_path / "run", "--resume"]
    running = torchrun("train.py", *flags, launcher=["--standalone", "--nproc_per_node=2", "--max-restarts=3"])
    until((tmp_path / "run/last.pt").exists)
    workers = [pid for pid, parent, _ in processes_of(running.pid) if parent == running.pid]
    os.kill(random.choice(workers), signal.SIGKILL)
    assert running.wait(240) == 0
    same_run(trained, tmp_path / "run")


def start_worker(connection):
    """Start a worker that inherits ``connection`` and sends its id. Then wait to be killed."""
    if os.fork() == 0:
        ignore_signals_in_worker(0)
        connection.send(os.getpid())
    time.sleep(600)


def test_a_worker_ends_with_its_killed_parent_and_closes_the_connections_it_has_inherited():
    connection, inherited = FORKSERVER.Pipe(duplex=False)
    parent = FORKSERVER.Process(target=start_worker, args=[inherited])
    parent.start()
    inherited.close()
    worker = connection.recv()
    try:
        parent.kill()
        assert connection.poll(60)
        with pytest.raises(EOFError):  # no process holds the other end
            connection.recv()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def test_a_process_that_no_longer_answers_ends_the_others_with_an_error(script, data, tmp_path):
    flags = [*TINY_RUN, "--max-iters", 1000, "--timeout", 3, "--data-path", data, "--output-dir", tmp_path / "run"]
    running = script("train.py", *flags, processes=2, wait=False)
    until(lambda: (tmp_path / "run/log.jsonl").exists() and (tmp_path / "run/log.jsonl").stat().st_size > 0)
    os.kill(running.processes[1].pid, signal.SIGSTOP)  # as a host that vanished: its connections stay open
    running.processes[0].join(240)  # less than the default of --timeout
    assert running.processes[0].exitcode == 1
    [error] = [line for line in running.stderr.splitlines() if line.startswith("error: ")]
    assert "--timeout" in error
    running.send(signal.SIGKILL)
