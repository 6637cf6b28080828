"""A run is stopped, killed and resumed, and loses nothing."""

import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from conftest import EIGHT_ITERATIONS, RUN, entries, family, same_run, same_state, until
from names import as_mmsegmentation

import train
from ocrnet import InputError
from ocrnet.checkpoint import load_checkpoint, load_model, save_checkpoint
from ocrnet.data.classes import CITYSCAPES
from ocrnet.data.datasets import TrainDataset
from ocrnet.models import BACKBONES, HRNet, build_model
from ocrnet.script import run_script

# one process with the global batch of two
TWO_AS_ONE = [*EIGHT_ITERATIONS, "--accum-steps=2", "--workers=0", "--resume"]
NAMES = CITYSCAPES.names


def copy_at(trained, folder, **progress):
    """Copy last.pt of a run with other progress, so that resuming it repeats the iterations after that."""
    save_checkpoint(folder / "last.pt", load_checkpoint(trained / "last.pt") | progress)
    return (folder / "last.pt").read_bytes()


@pytest.mark.parametrize("flags", [[], ["--amp", "--amp-dtype", "fp16"]], ids=["fp32", "fp16"])
def test_eight_iterations_are_four_and_a_resume_of_four(train_here, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(HRNet, "dropout", 0.5)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--max-iters", 8, "--save-every", 8, *flags]
    expected = train_here(*flags, folder=whole, validate=False)
    with pytest.raises(SystemExit):
        train_here(*flags, folder=parts, before_loss=lambda n, *_: n == 4 and signal.raise_signal(signal.SIGTERM))
    assert load_checkpoint(parts / "last.pt")["iter"] == 4
    same_state(expected, train_here(*flags, "--resume", folder=parts, validate=False))
    losses = [[entry["loss"] for entry in entries(folder / "log.jsonl")] for folder in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_a_step_that_overflows_is_left_out_and_halves_the_scale(train_here, tmp_path):
    flags = ["--amp", "--amp-dtype", "fp16", "--max-iters", 2]
    state = train_here(*flags, validate=False)
    save_checkpoint(tmp_path / "last.pt", state | {"iter": 1, "scaler": state["scaler"] | {"scale": 2.0**100}})
    again = train_here(*flags, "--resume", validate=False)
    assert again["scaler"]["scale"] == 2.0**99
    for name, _ in build_model("tiny").named_parameters():
        assert torch.equal(again["model"][name], state["model"][name])


def test_a_run_killed_at_a_random_moment_ends_as_an_undisturbed_one(script, trained, data, tmp_path):
    flags = [*EIGHT_ITERATIONS, "--data-path", data, "--output-dir", tmp_path / "run", "--resume"]
    running = script("train.py", *flags, processes=2, wait=False)
    until((tmp_path / "run/log.jsonl").exists)
    time.sleep(random.uniform(0, 1))
    running.send(signal.SIGKILL)
    running.wait()
    script("train.py", *flags, processes=2)
    same_run(trained, tmp_path / "run")


@pytest.mark.parametrize("number, processes", [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_to_all_processes_saves_and_leaves(script, data, tmp_path, number, processes):
    flags = [*RUN, "--max-iters", 1000, "--data-path", data, "--output-dir", tmp_path]
    running = script("train.py", *flags, wait=False, processes=processes)
    until((tmp_path / "log.jsonl").exists)
    running.send(number)  # also to the loader worker
    assert running.wait() == 128 + number, running.stderr
    iteration = load_checkpoint(tmp_path / "last.pt")["iter"]
    assert iteration == entries(tmp_path / "log.jsonl")[-1]["iter"] < 1000
    assert f" {iteration}" in running.stdout.splitlines()[-1] and "Traceback" not in running.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGQUIT"])
@pytest.mark.parametrize("handler, iterations", [(signal.SIG_DFL, 1), (signal.SIG_IGN, 2)], ids=["", "ignored"])
def test_a_stop_signal_saves_unless_it_is_ignored_as_under_nohup(train_here, tmp_path, name, handler, iterations):
    number, status = getattr(signal, name), 0
    before = signal.signal(number, handler)
    try:
        train_here("--max-iters", 2, validate=False, before_loss=lambda n, *_: n == 1 and signal.raise_signal(number))
    except SystemExit as exit:
        status = exit.code
    finally:
        signal.signal(number, before)
    assert load_checkpoint(tmp_path / "last.pt")["iter"] == iterations and status == (128 + number) * (iterations == 1)


def test_a_killed_data_loader_worker_ends_the_run_of_all_ranks_with_its_state_saved(script, data, tmp_path):
    flags = [*RUN, "--max-iters", 1000, "--data-path", data, "--output-dir", tmp_path]
    running = script("train.py", *flags, processes=2, wait=False)
    until((tmp_path / "log.jsonl").exists)
    os.kill(family(running.processes[1].pid)[1], signal.SIGKILL)
    running.wait()
    assert [process.exitcode for process in running.processes] == [128 + signal.SIGTERM, 1]
    assert load_checkpoint(tmp_path / "last.pt")["iter"] == entries(tmp_path / "log.jsonl")[-1]["iter"]
    [error] = [line for line in running.stderr.splitlines() if line.startswith("error: ")]
    assert "--resume" in error  # of a worker that is gone, or of its connection


@pytest.mark.parametrize("error", [OSError(104, "reset by peer"), EOFError(), RuntimeError("a\nworker\n")], ids=repr)
def test_a_batch_that_cannot_be_loaded_ends_the_run_saved(train_here, tmp_path, monkeypatch, error):
    def load(dataset, key):
        keys.append(key)
        if len(keys) > 4:  # in the third batch
            raise error
        return original(dataset, key)

    keys, original = [], TrainDataset.__getitem__
    monkeypatch.setattr(TrainDataset, "__getitem__", load)
    train_here("--max-iters", 2, folder=tmp_path / "two", validate=False)  # which does not need it
    keys.clear()
    with pytest.raises(InputError, match=r"^(.Errno 104. reset by peer|EOFError\(\)|worker) .*--resume"):
        train_here("--max-iters", 9, "--log-every", 9)
    assert load_checkpoint(tmp_path / "last.pt")["iter"] == 2
    assert [entry["iter"] for entry in entries(tmp_path / "log.jsonl")] == [2]  # what the next entry does not cover


@pytest.mark.parametrize("number", [signal.SIGTERM, None])
def test_a_validation_that_fails_has_the_status_of_a_signal_if_there_is_one(train_here, tmp_path, monkeypatch, number):
    def interrupted(*args):
        if number:  # which also ended a data loader worker
            signal.raise_signal(number)
        raise RuntimeError("DataLoader worker exited unexpectedly")

    monkeypatch.setattr(train, "evaluate", interrupted)
    with pytest.raises(SystemExit if number else RuntimeError, match="143" if number else "worker"):
        run_script(lambda: train_here("--max-iters", 1))
    assert load_checkpoint(tmp_path / "last.pt")["iter"] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_processes_end_with_the_one_that_started_them(script, data, tmp_path, monkeypatch, workers):
    code = (
        "import os, runpy, signal, sys\nos.fork() and signal.pause()\nrunpy.run_path(sys.argv.pop(1), {}, '__main__')"
    )
    (tmp_path / "launcher.py").write_text(code)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as torchrun sets it")
    log = tmp_path / "log.jsonl"
    flags = [*RUN, "--workers", workers, "--max-iters", 9999, "--data-path", data, "--output-dir", tmp_path]
    launcher = script(tmp_path / "launcher.py", train.__file__, *flags, wait=False).processes[0].pid
    until(log.exists)
    launcher, rank, *of_rank = family(launcher)
    if workers:  # and the rank, too: its worker ends, even if it is asleep
        [worker], written = of_rank, len(log.read_text())
        os.kill(worker, signal.SIGHUP)  # for the rank to handle
        until(lambda: len(log.read_text()) > written + 4000, 60)  # some 20 entries
        os.kill(worker, signal.SIGSTOP)
        os.kill(rank, signal.SIGKILL)
        until(lambda: not os.path.exists(f"/proc/{worker}"), 60)
    os.kill(launcher, signal.SIGKILL)
    until(lambda: not os.path.exists(f"/proc/{rank}"), 60)
    assert workers or 0 < load_checkpoint(tmp_path / "last.pt")["iter"] < 9999


def test_a_run_stopped_before_a_validation_starts_with_it(train_here, trained, tmp_path):
    copy_at(trained, tmp_path, validated=4)
    lines = (trained / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(lines[:-1]))
    assert train_here(*TWO_AS_ONE)["validated"] == 8
    (*log, last), (*expected_log, expected) = (entries(path / "log.jsonl") for path in (tmp_path, trained))
    assert log == expected_log and all(last[key] == expected[key] for key in ("iter", "mIoU", "IoU"))
    assert last["loss"] == pytest.approx(expected["loss"], rel=1e-12)  # its sum is that of two processes


def test_a_run_continues_with_other_processes_and_flags(train_here, trained, tmp_path, capsys):
    copy_at(trained, tmp_path, iter=7, validated=4)
    state = train_here(*TWO_AS_ONE, "--lr", 0.02, "--weight-decay", 0.25)
    output = capsys.readouterr().out
    notes = {line.split()[1]: line for line in output.splitlines() if line.startswith("NOTE: ")}
    expected = {"accum_steps": "21", "lr": ("0.02", "0.01"), "weight_decay": ("0.25", "0.0005"), "device": "12"}
    assert notes.keys() == {*expected, "output_dir", "workers"}
    assert all(value in notes[name] for name, values in expected.items() for value in values)
    assert "8 iterations after 7 of 4 crops" in output and "WARNING" not in output
    assert [(entry["split"], entry["iter"]) for entry in entries(tmp_path / "log.jsonl")] == [("train", 8), ("val", 8)]
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.25


@pytest.mark.parametrize("name", ["model", "head", "max_iters", "seed", "classes", "global_batch", "train_images"])
def test_a_setting_that_must_match_is_refused_with_both_values(train_here, trained, tmp_path, name):
    settings = load_checkpoint(trained / "last.pt")["settings"]
    before = copy_at(trained, tmp_path, settings=settings | {name: "other"})
    with pytest.raises(InputError, match=f"^--resume: .*{name} other .*last.pt.* {settings[name]}$"):
        train_here(*TWO_AS_ONE)
    assert (tmp_path / "last.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "log.jsonl"])
def test_a_folder_with_a_part_of_a_run_is_refused_before_data_is_read(train_here, trained, tmp_path, name):
    shutil.copy(trained / name, tmp_path)
    with pytest.raises(InputError, match=f"^--output-dir {tmp_path}: "):
        train_here("--data-path", tmp_path / "missing")
    if name == "best.pt":  # resuming would start again, and overwrite it
        with pytest.raises(InputError, match="^--resume: "):
            train_here("--data-path", tmp_path / "missing", "--resume")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_full_disk_leaves_the_last_checkpoint(train_here, trained, tmp_path):
    before = copy_at(trained, tmp_path, validated=4)  # resuming validates and saves
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(InputError, match=f"^{tmp_path / 'last.pt'}: "):
            train_here(*TWO_AS_ONE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"last.pt", "log.jsonl"}


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_is_finite(tmp_path, monkeypatch):
    path, calls, fsync, replace = tmp_path / "last.pt", [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda part, to: calls.append((to, path.exists())) or replace(part, to))
    state = dict(model={"x": torch.ones(9)}, config={}, optimizer=[1, {"y": torch.ones(2)}], iter=1, settings={})
    save_checkpoint(path, state)
    assert calls == [path.stat().st_size, (path, False)] and [*tmp_path.iterdir()] == [path]
    torch.testing.assert_close(load_checkpoint(path), state, rtol=0, atol=0)
    for bad, x in ((path / "last.pt", 1), (path, torch.inf), (path, torch.nan)):
        with pytest.raises(InputError, match=f"^{bad}"):
            save_checkpoint(bad, state | {"model": {"x": torch.tensor([1, x])}})
    assert (load_checkpoint(path)["model"]["x"] == 1).all()


@pytest.mark.parametrize("K, names, side", [(19, None, 2048), (19, NAMES, 2048), (19, NAMES[::-1], 0), (3, None, 0)])
def test_photos_have_the_size_of_cityscapes_for_weights_of_its_classes(tmp_path, monkeypatch, K, names, side):
    for name in {*BACKBONES} - {"tiny"}:  # of which building takes time
        monkeypatch.delitem(BACKBONES, name)
    path, model = tmp_path / "x.pth", build_model("tiny", K)
    meta = {"CLASSES": names, "PALETTE": [[k, k, k] for k in range(19)]}
    for state, expected in (
        ({"state_dict": as_mmsegmentation(model), "meta": meta}, (side, "", False, names)),
        ({"model": model.state_dict(), "config": model.config, "about": "a model"}, (0, "a model", False, None)),
    ):
        torch.save(state, path)
        loaded, table = load_model(path)
        assert (loaded.long_side, loaded.about, loaded.training, table and table.names) == expected
