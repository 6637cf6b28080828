"""Several machines, and processes that are lost."""

import os
import random
import signal
import socket
import subprocess
import sys

from conftest import EIGHT_ITERATIONS, ROOT, RUN, kill, processes_of, same_run, until

from ocrnet.checkpoint import load_checkpoint


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def workers_of(torchrun):
    return [pid for pid, parent, _ in processes_of(torchrun.pid) if parent == torchrun.pid]


def test_two_hosts_train_as_one_host_with_as_many_processes(script, trained, data, tmp_path):
    rendezvous = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=1"]
    flags = [*EIGHT_ITERATIONS, "--data-path", data]
    hosts = [  # each with its own disk
        script("train.py", *flags, "--output-dir", tmp_path / name, launcher=rendezvous, wait=False)
        for name in ("a", "b")
    ]
    assert [host.wait(240) for host in hosts] == [0, 0]
    [folder] = tmp_path.iterdir()  # that of the host of rank 0
    same_run(trained, folder)


def test_torchrun_restarts_a_run_whose_process_was_killed(script, trained, data, tmp_path):
    flags = [*EIGHT_ITERATIONS, "--data-path", data, "--output-dir", tmp_path / "run", "--resume"]
    running = script("train.py", *flags, processes=2, launcher=["--max-restarts=3"], wait=False)
    until((tmp_path / "run/last.pt").exists)
    os.kill(random.choice(workers_of(running)), signal.SIGKILL)
    assert running.wait(240) == 0
    same_run(trained, tmp_path / "run")


def test_a_process_that_no_longer_answers_ends_the_others_with_an_error(data, tmp_path):
    flags = [*RUN, "--max-iters", 1000, "--timeout", 3, "--data-path", data, "--output-dir", tmp_path / "run"]
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **address, "RANK": str(r)}, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    try:
        until(lambda: (tmp_path / "run/log.jsonl").exists() and (tmp_path / "run/log.jsonl").stat().st_size > 0)
        os.kill(ranks[1].pid, signal.SIGSTOP)  # as a host that vanished: its connections stay open
        _, errors = ranks[0].communicate(timeout=240)  # less than the default of --timeout
        assert ranks[0].returncode == 1 and errors.splitlines()[-1].startswith("error: ")
        assert "--timeout" in errors.splitlines()[-1]
    finally:
        kill(ranks[0])
        kill(ranks[1])


def test_processes_whose_torchrun_was_killed_save_and_leave(script, data, tmp_path):
    flags = [*RUN, "--max-iters", 1000, "--data-path", data, "--output-dir", tmp_path / "run"]
    running = script("train.py", *flags, processes=1, launcher=["--max-restarts=0"], wait=False)
    until(lambda: (tmp_path / "run/log.jsonl").exists() and (tmp_path / "run/log.jsonl").stat().st_size > 0)
    [worker] = workers_of(running)
    running.kill()
    running.wait()
    until(lambda: not os.path.exists(f"/proc/{worker}"))
    assert load_checkpoint(tmp_path / "run/last.pt")["iter"] < 1000
