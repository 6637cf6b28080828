"""A run is stopped, killed and resumed, and loses nothing."""

import itertools
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import EIGHT_ITERATIONS, RUN, entries, free_port, processes_of, same_run, until
from torch.utils.data import DataLoader

import train
from ocrnet import InputError, plots
from ocrnet.checkpoint import MUST_MATCH, check_resumable, load_checkpoint, save_checkpoint

TWO_AS_ONE = ["--workers", 0, "--accum-steps", 2]  # one process with the global batch of two


@pytest.fixture
def no_figures(monkeypatch):
    """Skips the figures of a run, which take seconds."""
    monkeypatch.setattr(plots, "draw_run", lambda *args: None)


def is_training(folder):
    """Whether the first entry of its log is written."""
    return (folder / "log.jsonl").exists() and (folder / "log.jsonl").stat().st_size > 0


def copy_at(trained, folder, **progress):
    """Copy last.pt of a run with other progress, so that resuming it repeats the iterations after that."""
    folder.mkdir()
    save_checkpoint(folder / "last.pt", load_checkpoint(trained / "last.pt") | progress)
    return folder


# ---- kill, stop, resume ----------------------------------------------------------------------------------------------


def test_a_run_killed_and_stopped_at_random_moments_ends_as_an_undisturbed_one(script, trained, data, tmp_path):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    print(f"seed of the interruptions: {seed}")
    flags = [*EIGHT_ITERATIONS, "--data-path", data, "--output-dir", tmp_path / "run", "--resume"]
    for number in (signal.SIGKILL, signal.SIGTERM):
        running = script("train.py", *flags, processes=2, wait=False)
        until(lambda running=running: is_training(tmp_path / "run") or not running.is_alive())
        time.sleep(rng.uniform(0, 2))
        running.send(number)
        running.wait()
    script("train.py", *flags, processes=2)
    same_run(trained, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_all_processes_saves_and_leaves(script, data, tmp_path, number):
    flags = [*RUN, "--max-iters", 1000, "--data-path", data, "--output-dir", tmp_path / "run"]
    running = script("train.py", *flags, wait=False)
    until(lambda: is_training(tmp_path / "run"))
    running.send(number)  # also to the loader worker
    assert running.wait() == 128 + number, running.stderr
    iteration = load_checkpoint(tmp_path / "run/last.pt")["iter"]
    assert iteration == entries(tmp_path / "run/log.jsonl")[-1]["iter"] < 1000
    assert f" {iteration}" in running.stdout.splitlines()[-1] and "Traceback" not in running.stderr


def test_a_killed_data_loader_worker_ends_the_run_of_all_ranks_with_its_state_saved(script, data, tmp_path):
    flags = [*RUN, "--max-iters", 1000, "--data-path", data, "--output-dir", tmp_path / "run"]
    running = script("train.py", *flags, processes=2, wait=False)
    until(lambda: is_training(tmp_path / "run"))
    victim = running.processes[1].pid
    os.kill(next(pid for pid, parent, _ in processes_of(victim) if parent == victim), signal.SIGKILL)
    assert running.wait() != 0
    assert load_checkpoint(tmp_path / "run/last.pt")["iter"] == entries(tmp_path / "run/log.jsonl")[-1]["iter"]
    [error] = [line for line in running.stderr.splitlines() if line.startswith("error: ")]
    assert "worker" in error and "--resume" in error


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), EOFError()], ids=repr)
def test_a_connection_that_a_killed_worker_leaves_ends_the_run_saved(main, data, tmp_path, monkeypatch, error):
    class Broken(DataLoader):
        def __iter__(self):
            yield from itertools.islice(super().__iter__(), 2)
            raise error

    monkeypatch.setattr(train, "DataLoader", Broken)
    flags = [*RUN, "--workers", 0, "--max-iters", 9, "--log-every", 9, "--data-path", data, "--output-dir", tmp_path]
    with pytest.raises(InputError, match="(reset by peer|EOFError).*--resume"):
        main("train.py", *flags)
    assert load_checkpoint(tmp_path / "last.pt")["iter"] == 2
    assert [entry["iter"] for entry in entries(tmp_path / "log.jsonl")] == [2]  # what the next entry does not cover


def test_a_signal_that_also_ends_a_worker_during_validation_has_its_exit_status(main, data, tmp_path, monkeypatch):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker exited unexpectedly")

    monkeypatch.setattr(train, "evaluate", interrupted)
    with pytest.raises(SystemExit) as exit:
        main("train.py", *RUN, "--workers", 0, "--max-iters", 1, "--data-path", data, "--output-dir", tmp_path)
    assert exit.value.code == 128 + signal.SIGTERM and load_checkpoint(tmp_path / "last.pt")["iter"] == 1


def test_a_batch_that_is_not_needed_is_not_loaded(main, data, tmp_path, monkeypatch, no_figures):
    class Two(DataLoader):
        def __iter__(self):
            yield from itertools.islice(super().__iter__(), 2)
            raise InputError("the third batch")

    monkeypatch.setattr(train, "DataLoader", Two)
    main("train.py", *RUN, "--workers", 0, "--max-iters", 2, "--data-path", data, "--output-dir", tmp_path)
    assert load_checkpoint(tmp_path / "best.pt")["iter"] == 2


def test_processes_whose_torchrun_is_killed_save_and_leave(torchrun, data, tmp_path):
    flags = [*RUN, "--workers", 0, "--max-iters", 10**6, "--data-path", data, "--output-dir", tmp_path / "run"]
    launcher = torchrun("train.py", *flags, launcher=["--nproc_per_node=1", "--master-port", str(free_port())])
    until(lambda: is_training(tmp_path / "run"))
    ranks = [pid for pid, _, _ in processes_of(launcher.pid) if pid != launcher.pid]
    launcher.kill()
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in ranks), 60)
    assert load_checkpoint(tmp_path / "run/last.pt")["iter"] > 0


def test_a_kill_during_the_writing_of_a_checkpoint_leaves_a_complete_one(script, tmp_path):
    (tmp_path / "writer.py").write_text(
        "import sys, torch; from pathlib import Path; from ocrnet.checkpoint import save_checkpoint\n"
        "for i in range(10**6):\n"
        "    save_checkpoint(Path(sys.argv[1]), {'model': {'x': torch.full((10**6,), i)}, 'config': i, 'optimizer': 0})"
    )
    folder = tmp_path / "run"
    folder.mkdir()
    for _ in range(2):
        writer = script(tmp_path / "writer.py", folder / "last.pt", wait=False)
        until((folder / "last.pt").exists)
        time.sleep(random.uniform(0, 0.2))
        writer.send(signal.SIGKILL)
        writer.wait()
        state = load_checkpoint(folder / "last.pt")
        assert (state["model"]["x"] == state["config"]).all()
        (folder / "last.pt").unlink()


def test_a_run_stopped_before_a_validation_starts_with_it(main, trained, data, tmp_path, no_figures):
    folder = copy_at(trained, tmp_path / "run", validated=4)
    lines = (trained / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(lines[:-1]))
    main("train.py", *EIGHT_ITERATIONS, *TWO_AS_ONE, "--data-path", data, "--output-dir", folder, "--resume")
    logs = [entries(path / "log.jsonl") for path in (folder, trained)]
    last, expected = (log.pop() for log in logs)
    assert logs[0] == logs[1]
    assert all(last[key] == expected[key] for key in ("iter", "mIoU", "IoU"))
    assert last["loss"] == pytest.approx(expected["loss"], rel=1e-12)  # its sum is that of two processes
    assert load_checkpoint(folder / "last.pt")["validated"] == 8


def test_a_run_continues_with_other_processes_and_flags_where_the_global_batch_stays(
    main, trained, data, tmp_path, no_figures, capsys
):
    folder = copy_at(trained, tmp_path / "run", iter=7, validated=4)
    flags = ["--data-path", data, "--output-dir", folder, "--resume", "--lr", 0.02, "--weight-decay", 0.25]
    main("train.py", *EIGHT_ITERATIONS, *TWO_AS_ONE, *flags)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOTE: ")]
    for name, values in {"device": "12", "accum_steps": "21", "lr": ("0.02", "0.01")}.items():
        assert any(f" {name} " in note and all(value in note for value in values) for note in notes), name
    assert [(entry["split"], entry["iter"]) for entry in entries(folder / "log.jsonl")] == [("train", 8), ("val", 8)]
    [group] = load_checkpoint(folder / "last.pt")["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.25


def test_another_run_is_not_resumed(main, trained, data, tmp_path):
    folder = copy_at(trained, tmp_path / "run")
    before = (folder / "last.pt").read_bytes()
    for flags in (["--max-iters", 9], ["--batch-size", 3]):
        with pytest.raises(InputError, match="^--resume: "):
            main("train.py", *EIGHT_ITERATIONS, *flags, "--data-path", data, "--output-dir", folder, "--resume")
    assert (folder / "last.pt").read_bytes() == before and len(list(folder.iterdir())) == 1


# ---- settings --------------------------------------------------------------------------------------------------------

SETTINGS = dict(
    model="hr18s", head="ocr", max_iters=9, seed=0, classes="road, house", global_batch=4, train_images=6, lr=0.01,
)  # fmt: skip


def notes_of(**changed):
    """The notes of a run that resumes a checkpoint with ``SETTINGS``, with these changed."""
    return check_resumable({"settings": SETTINGS}, SETTINGS | changed, Path("last.pt"))


@pytest.mark.parametrize("name", ["model", "head", "max_iters", "seed", "classes", "global_batch", "train_images"])
def test_a_setting_that_must_match_is_refused_with_both_values(name):
    assert name in MUST_MATCH
    with pytest.raises(InputError, match=f"^--resume: .*{name} {SETTINGS[name]} .*last.pt.* other"):
        notes_of(**{name: "other"})


def test_other_settings_are_noted_with_both_values():
    assert notes_of() == []
    [note] = notes_of(lr=0.02)
    assert all(part in note for part in ("lr", "0.01", "0.02"))


# ---- the folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "log.jsonl"])
def test_a_folder_with_a_part_of_a_run_is_refused_before_data_is_read(main, trained, tmp_path, name):
    shutil.copy(trained / name, tmp_path)
    flags = [*RUN, "--data-path", tmp_path / "missing", "--output-dir", tmp_path]
    with pytest.raises(InputError, match=f"^--output-dir {tmp_path}: "):
        main("train.py", *flags)
    if name == "best.pt":  # resuming would start again, and overwrite it
        with pytest.raises(InputError, match="^--resume: "):
            main("train.py", *flags, "--resume")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_full_disk_leaves_the_last_checkpoint(main, trained, tmp_path, data, no_figures):
    folder = copy_at(trained, tmp_path / "run", validated=4)  # resuming validates and saves
    before = (folder / "last.pt").read_bytes()
    flags = [*EIGHT_ITERATIONS, *TWO_AS_ONE, "--data-path", data, "--output-dir", folder, "--resume"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(InputError, match=f"^{folder / 'last.pt'}: "):
            main("train.py", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / "last.pt").read_bytes() == before
    assert {file.name for file in folder.iterdir()} == {"last.pt", "log.jsonl"}


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {"model": {"x": torch.ones(1)}})
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(InputError, match=f"^{tmp_path / 'last.pt'} "):
        save_checkpoint(tmp_path / "last.pt", {"model": {"x": torch.tensor([1, torch.inf])}})
    assert (tmp_path / "last.pt").read_bytes() == before
