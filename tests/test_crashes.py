"""A run is stopped, killed, starved or doubled, and loses nothing."""

import argparse
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, RUN, entries, kill, processes_of, same_run

import train
from ocrnet.checkpoint import RunFolder, load_checkpoint, save_checkpoint
from ocrnet.errors import InputError

RHYTHM = ["--iters", 8, "--val-every", 4, "--save-every", 3, "--log-every", 2, "--dropout", 0.2]


@pytest.fixture(scope="module")
def undisturbed(script, data, tmp_path_factory):
    """A run of eight iterations on two processes."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    script("train.py", *RUN, *RHYTHM, "--data", data, "--out", out, processes=2)
    return out


def until(condition, seconds=60):
    """Wait for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def in_its_loop(out):
    """Whether a run has written its first entry of the log."""
    return (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size > 0


# ---- kill, stop, resume ----


def test_a_run_killed_at_random_moments_resumes_to_the_same_weights_and_log(script, undisturbed, data, tmp_path):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    print(f"the kills of seed {seed}")
    flags = [*RUN, *RHYTHM, "--data", data, "--out", tmp_path / "run", "--resume"]
    for number in (signal.SIGKILL, signal.SIGTERM):
        running = script("train.py", *flags, processes=2, wait=False)
        until(lambda: in_its_loop(tmp_path / "run") or running.poll() is not None)  # noqa: B023
        time.sleep(rng.uniform(0, 3))
        if number == signal.SIGKILL:
            kill(running)
        else:
            running.terminate()
            running.wait(60)
    script("train.py", *flags, processes=2)
    same_run(undisturbed, tmp_path / "run")


def test_torchrun_starts_a_run_again_whose_process_was_killed(script, undisturbed, data, tmp_path):
    flags = [*RUN, *RHYTHM, "--data", data, "--out", tmp_path / "run", "--resume"]
    running = script("train.py", *flags, processes=2, launcher=["--max-restarts=3"], wait=False)
    until(lambda: (tmp_path / "run/last.pt").exists())
    victims = [pid for pid, parent, _ in processes_of(running.pid) if parent == running.pid]
    os.kill(random.choice(victims), signal.SIGKILL)
    assert running.wait(120) == 0
    same_run(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_and_leaves(script, data, tmp_path, number):
    flags = [*RUN, "--iters", 1000, "--data", data, "--out", tmp_path / "run"]
    with open(tmp_path / "output", "w") as output:
        running = script("train.py", *flags, wait=False, stdout=output, stderr=output)
        until(lambda: in_its_loop(tmp_path / "run"))
        for pid, _, _ in processes_of(running.pid):  # the loader's process too, as schedulers do
            os.kill(pid, number)
        assert running.wait(60) == 128 + number
    state = load_checkpoint(tmp_path / "run/last.pt")
    output = (tmp_path / "output").read_text()
    assert f"stopped by {number.name} after iteration {state['iter']}, which" in output and "Traceback" not in output


def test_a_kill_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from ocrnet.checkpoint import save_checkpoint\n"
        "for i in range(10**6):\n"
        "    save_checkpoint(Path(sys.argv[1]), {'model': {'x': torch.full((10**6,), i)}, 'config': i})"
    )
    path = tmp_path / "last.pt"
    for _ in range(2):
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
        until(path.exists)
        time.sleep(random.uniform(0, 0.2))
        writer.kill()
        writer.wait()
        state = load_checkpoint(path)
        assert (state["model"]["x"] == state["config"]).all()
        path.unlink()
    RunFolder(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]  # nothing half-written stays


# ---- the folder of a run ----


def test_the_log_is_cut_where_the_checkpoint_stands(tmp_path):
    lines = [{"split": split, "iter": i} for split, i in (("train", 2), ("train", 4), ("val", 4), ("train", 6))]
    written = "".join(json.dumps(line) + "\n" for line in lines)
    for iteration, validated, kept in ((4, 4, 3), (4, 0, 2), (3, 0, 1), (6, 4, 4), (0, 0, 0)):
        (tmp_path / "log.jsonl").write_text(written + '{"split": "train", "it')
        folder = RunFolder(tmp_path, iteration, validated)
        assert entries(tmp_path / "log.jsonl") == lines[:kept]
        folder.log({"split": "train", "iter": 7})
        assert len(entries(tmp_path / "log.jsonl")) == kept + 1


def test_a_second_run_into_a_folder_is_refused(script, data, tmp_path):
    flags = [*RUN, "--iters", 1000, "--data", data, "--out", tmp_path / "run", "--resume"]
    running = script("train.py", *flags, wait=False)
    until(lambda: in_its_loop(tmp_path / "run"))
    refused = script("train.py", *flags, ok=False)
    assert refused.stderr.splitlines()[-1].endswith("another run is writing there: choose another folder with --out")
    running.terminate()
    assert running.wait(60) == 128 + signal.SIGTERM


def test_a_disk_without_room_leaves_the_last_checkpoint(script, undisturbed, tmp_path, data):
    path = tmp_path / "run/last.pt"
    path.parent.mkdir()
    save_checkpoint(path, load_checkpoint(undisturbed / "last.pt") | {"iter": 8, "validated": 6})
    before = path.read_bytes()
    flags = [*RUN, *RHYTHM, "--data", data, "--out", path.parent, "--resume", "--batch-size", 4]
    limit = len(before) // 2
    done = script(
        "train.py", *flags, ok=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert re.search(
        r"error: .*last.pt: this checkpoint could not be written, the one before is whole \(.*File too large",
        done.stderr,
    )
    assert path.read_bytes() == before and {file.name for file in path.parent.iterdir()} == {"last.pt", "log.jsonl"}


ARGS = dict(
    model="hr18s", head="ocr", align_corners=False, dropout=None, iters=9, seed=0,
    lr=0.01, min_lr=1e-4, crop=[32, 64], scales=[0.5, 2.0], colour=True, class_weights=False, ohem=None, accumulate=1,
)  # fmt: skip
WHERE = {
    "classes": "road, house", "global batch": 4, "training pictures": 6,
    "processes": 2, "mixed precision": False, "device": "cpu",
}  # fmt: skip


def compare(args, where):
    """``check_resumable`` of a run that differs by these from the checkpoint's."""
    state = {"args": ARGS, "conditions": WHERE, "optimizer": {}}
    return train.check_resumable(state, argparse.Namespace(**(ARGS | args)), WHERE | where, Path("last.pt"))


@pytest.mark.parametrize(
    ("args", "where", "message"),
    [
        ({"model": "hr18"}, {}, "--model hr18: the run of last.pt has hr18s"),
        ({"iters": 10}, {}, "--iters 10: the run of last.pt has 9"),
        ({"seed": 1}, {}, "--seed 1: the run of last.pt has 0"),
        ({"head": "fcn"}, {}, "--head fcn: the run of last.pt has ocr"),
        ({"align_corners": True}, {}, "--align-corners True: the run of last.pt has False"),
        ({}, {"classes": "road"}, "classes road: the run of last.pt has road, house"),
        ({}, {"global batch": 6}, "global batch 6: the run of last.pt has 4"),
        ({}, {"training pictures": 7}, "training pictures 7: the run of last.pt has 6"),
    ],
)
def test_what_would_make_another_run_is_refused_with_both_values(args, where, message):
    with pytest.raises(InputError, match=message):
        compare(args, where)


def test_a_checkpoint_without_a_run_is_not_gone_on_with():
    with pytest.raises(InputError, match="holds a model but no run"):
        train.check_resumable({"model": {}, "config": {}}, argparse.Namespace(**ARGS), WHERE, Path("last.pt"))


def test_what_may_change_in_a_run_is_said():
    assert compare({}, {}) == []
    assert compare({"lr": 0.02}, {"device": "cuda"}) == ["--lr is 0.02, it was 0.01", "device: cuda, before cpu"]


def test_a_run_goes_on_with_other_processes_where_the_global_batch_stays(script, undisturbed, data, tmp_path):
    state = load_checkpoint(undisturbed / "last.pt")
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run/last.pt", state | {"iter": 7, "logged": 6})
    flags = [*RUN, *RHYTHM, "--data", data, "--out", tmp_path / "run", "--resume", "--batch-size", 2, "--accumulate", 2]
    done = script("train.py", *flags)
    assert "NOTE: processes: 1, before 2" in done.stdout and "NOTE: --accumulate is 2, it was 1" in done.stdout
    assert [entry["split"] for entry in entries(tmp_path / "run/log.jsonl")] == ["train", "val"]


# ---- several machines ----


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_two_hosts_train_what_one_host_with_as_many_processes_does(script, undisturbed, data, tmp_path):
    rendezvous = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=1"]
    flags = [*RUN, *RHYTHM, "--data", data]
    # the second host sees another disk
    hosts = [
        script("train.py", *flags, "--out", tmp_path / name, launcher=rendezvous, wait=False) for name in ("a", "b")
    ]
    assert [host.wait(120) for host in hosts] == [0, 0]
    same_run(undisturbed, next(path for path in tmp_path.iterdir() if (path / "last.pt").exists()))


def test_a_process_that_no_longer_answers_ends_the_others_within_the_timeout(data, tmp_path):
    flags = [*RUN, "--iters", 1000, "--log-every", 1, "--data", data, "--out", tmp_path / "run", "--timeout", 3]
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **address, "RANK": str(r)}, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    until(lambda: in_its_loop(tmp_path / "run"))
    os.kill(ranks[1].pid, signal.SIGSTOP)  # a host that vanished: its connections stay open
    try:
        _, errors = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode == 1
        assert errors.splitlines()[-1].startswith("error: another process of this run has ended, or did not answer")
    finally:
        kill(ranks[0])
        kill(ranks[1])


# ---- long runs ----

LONG = """
import json, os, sys
sys.path.insert(0, sys.argv.pop(1))
samples = sys.argv.pop(1)
import train
import ocrnet.models.ocrnet as variants

variants.HRNETS["hr18s"] = dict(width=2, num_modules=(1, 1, 1), num_blocks=1)
poly_lr, measured = train.poly_lr, []


def resident(pid):
    return int(open(f"/proc/{pid}/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(lr, t, *rest):
    if t % 100 == 0:
        loaders = [pid for task in os.listdir("/proc/self/task")
                   for pid in open(f"/proc/self/task/{task}/children").read().split()]
        measured.append([resident("self"), sum(map(resident, loaders)), len(os.listdir("/proc/self/fd"))])
    return poly_lr(lr, t, *rest)


train.poly_lr = measure
train.main()
json.dump(measured, open(samples, "w"))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_memory_and_open_files_stay_where_they_are(data, tmp_path):
    flags = [*RUN, "--crop", 32, 32, "--iters", 201, "--val-every", 80, "--save-every", 40, "--log-every", 50]
    command = [sys.executable, "-c", LONG, str(ROOT), str(tmp_path / "samples"), *map(str, flags)]
    subprocess.run([*command, "--data", str(data), "--out", str(tmp_path / "run")], check=True, capture_output=True)
    _, first, *_, last = json.loads((tmp_path / "samples").read_text())  # after 100 iterations, after 200
    assert last[0] - first[0] < 20 and last[1] - first[1] < 10, "MiB of the process and of its loader"
    assert last[2] <= first[2], "open files"


def test_a_failed_write_of_the_log_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.file.close()
    folder.file = open("/dev/full", "ab") if os.path.exists("/dev/full") else pytest.skip("no /dev/full here")  # noqa: SIM115
    with pytest.raises(InputError, match="log.jsonl: cannot be written"):
        folder.log({"split": "train", "iter": 1})
