"""A run is stopped, killed and resumed, and loses nothing; its folder is held by one run at a time."""

import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import EIGHT_ITERATIONS, TINY_RUN, entries, same_run, until

import train
from ocrnet.checkpoint import load_checkpoint, save_checkpoint
from ocrnet.device import Accelerator
from ocrnet.errors import InputError
from ocrnet.run import MAY_DIFFER, MUST_MATCH, RunFolder, check_resumable

TWO_AS_ONE = ["--workers", 0, "--accum-steps", 2]  # one process with the global batch of two


@pytest.fixture
def no_figures(monkeypatch):
    """Skips the figures at the end of a run, which take seconds."""
    monkeypatch.setattr(train, "draw_run", lambda *args: None)


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
        time.sleep(rng.uniform(0, 3))
        running.send(number)
        running.wait()
    script("train.py", *flags, processes=2)
    same_run(trained, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_and_leaves(script, data, tmp_path, number):
    flags = [*TINY_RUN, "--max-iters", 1000, "--data-path", data, "--output-dir", tmp_path / "run"]
    running = script("train.py", *flags, wait=False)
    until(lambda: is_training(tmp_path / "run"))
    running.send(number)  # also to the loader worker
    assert running.wait() == 128 + number
    iteration = load_checkpoint(tmp_path / "run/last.pt")["iter"]
    assert iteration == entries(tmp_path / "run/log.jsonl")[-1]["iter"] < 1000
    assert f" {iteration}" in running.stdout.splitlines()[-1] and "Traceback" not in running.stderr


def test_a_process_whose_torchrun_is_gone_saves_and_leaves(main, data, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_orphan", lambda self: True)
    flags = ["--workers", 0, "--max-iters", 1000, "--data-path", data, "--output-dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as error:
        main("train.py", *TINY_RUN, *flags)
    assert error.value.code == 128 + signal.SIGTERM and load_checkpoint(tmp_path / "run/last.pt")["iter"] == 1


def test_a_kill_during_the_writing_of_a_checkpoint_leaves_a_complete_one(script, tmp_path):
    (tmp_path / "writer.py").write_text(
        "import sys, torch; from pathlib import Path; from ocrnet.checkpoint import save_checkpoint\n"
        "for i in range(10**6):\n"
        "    save_checkpoint(Path(sys.argv[1]), {'model': {'x': torch.full((10**6,), i)}, 'config': i})"
    )
    folder = tmp_path / "run"
    folder.mkdir()
    for _ in range(3):
        writer = script(tmp_path / "writer.py", folder / "last.pt", wait=False)
        until((folder / "last.pt").exists)
        time.sleep(random.uniform(0, 0.2))
        writer.send(signal.SIGKILL)
        writer.wait()
        state = load_checkpoint(folder / "last.pt")
        assert (state["model"]["x"] == state["config"]).all()
        (folder / "last.pt").unlink()
    (folder / "last.pt.part1").write_bytes(b"half")
    RunFolder(folder, is_main=True)
    assert [file.name for file in folder.iterdir()] == ["log.jsonl"]  # no partial file stays


def test_a_run_stopped_before_a_validation_starts_with_it(main, trained, data, tmp_path, no_figures):
    folder = copy_at(trained, tmp_path / "run", validated=4)
    (folder / "log.jsonl").write_text((trained / "log.jsonl").read_text())
    main("train.py", *EIGHT_ITERATIONS, *TWO_AS_ONE, "--data-path", data, "--output-dir", folder, "--resume")
    logs = [entries(path / "log.jsonl") for path in (folder, trained)]
    last, expected = (log.pop() for log in logs)
    assert logs[0] == logs[1]
    assert all(last[key] == expected[key] for key in ("iter", "mIoU", "IoU"))
    assert last["loss"] == pytest.approx(expected["loss"], rel=1e-12)  # its sum is that of two processes
    assert load_checkpoint(folder / "last.pt")["validated"] == 8


def test_a_run_continues_with_other_processes_where_the_global_batch_stays(
    main, trained, data, tmp_path, no_figures, capsys
):
    folder = copy_at(trained, tmp_path / "run", iter=7, validated=4)
    flags = ["--data-path", data, "--output-dir", folder, "--resume", "--lr", 0.02]
    main("train.py", *EIGHT_ITERATIONS, *TWO_AS_ONE, *flags)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOTE: ")]
    for name, values in {"world_size": "12", "accum_steps": "21", "lr": ("0.02", "0.01")}.items():
        assert any(f" {name} " in note and all(value in note for value in values) for note in notes), name
    assert [(entry["split"], entry["iter"]) for entry in entries(folder / "log.jsonl")] == [("train", 8), ("val", 8)]


def test_another_run_is_not_resumed(main, trained, data, tmp_path):
    folder = copy_at(trained, tmp_path / "run")
    before = (folder / "last.pt").read_bytes()
    for flags in (["--max-iters", 9], ["--batch-size", 3]):
        with pytest.raises(InputError, match="^--resume: "):
            main("train.py", *EIGHT_ITERATIONS, *flags, "--data-path", data, "--output-dir", folder, "--resume")
    assert (folder / "last.pt").read_bytes() == before and len(list(folder.iterdir())) == 1


# ---- settings --------------------------------------------------------------------------------------------------------

SETTINGS = dict(
    model="hr18s", head="ocr", align_corners=False, dropout=None, max_iters=9, seed=0, classes="road, house",
    global_batch=4, train_images=6,
    lr=0.01, min_lr=1e-4, momentum=0.9, weight_decay=5e-4, crop_size=[32, 64], scale_range=[0.5, 2.0],
    scale_step=0, cat_max_ratio=0.75, avg_non_ignore=False,
    color_jitter=True, class_weights=False, ohem=None, accum_steps=1, world_size=2, device="cpu", amp=False,
    amp_dtype="torch.bfloat16", workers=1, output_dir="run",
)  # fmt: skip
OTHERS = dict(
    model="hr18", head="fcn", align_corners=True, dropout=0.1, max_iters=10, seed=1, classes="road", global_batch=6,
    train_images=7,
    lr=0.02, min_lr=0.0, momentum=0.8, weight_decay=1e-4, crop_size=[64, 64], scale_range=[0.5, 2.1],
    scale_step=0.1, cat_max_ratio=1, avg_non_ignore=True,
    color_jitter=False, class_weights=True, ohem="authors", accum_steps=2, world_size=1, device="cuda", amp=True,
    amp_dtype="torch.float16", workers=4, output_dir="copy",
)  # fmt: skip


def notes_of(**changed):
    """The notes of a run that resumes a checkpoint with ``SETTINGS``, with these changed."""
    return check_resumable({"settings": SETTINGS}, SETTINGS | changed, Path("last.pt"))


@pytest.mark.parametrize("name", MUST_MATCH)
def test_a_setting_that_must_match_is_refused_with_both_values(name):
    with pytest.raises(InputError, match="^--resume: ") as error:
        notes_of(**{name: OTHERS[name]})
    assert all(str(part) in str(error.value) for part in (name, SETTINGS[name], OTHERS[name], "last.pt"))


@pytest.mark.parametrize("name", MAY_DIFFER)
def test_a_setting_that_may_differ_is_noted_with_both_values(name):
    [note] = notes_of(**{name: OTHERS[name]})
    assert all(str(part) in note for part in (name, SETTINGS[name], OTHERS[name]))


def test_equal_settings_and_those_that_change_no_result_need_no_note():
    assert notes_of() == notes_of(workers=4, output_dir="copy") == []


def test_what_determines_a_run_must_match():
    """Each is a promise to users, whatever run.py lists."""
    assert {"model", "head", "max_iters", "seed", "classes", "global_batch", "train_images"} <= set(MUST_MATCH)
    assert {"lr", "crop_size", "world_size", "device", "amp"} <= set(MAY_DIFFER)


OLD_CHECKPOINT = {  # what version 1 stored instead of settings
    "args": {
        "model": "hr18s", "head": "ocr", "crop": [32, 64], "scales": [0.5, 2.0], "batch_size": 2, "accumulate": 1,
        "iters": 9, "lr": 0.01, "min_lr": 1e-4, "colour": True, "class_weights": False, "ohem": None,
        "align_corners": False, "dropout": None, "seed": 0, "device": None, "amp": None,
    },
    "conditions": {
        "classes": "road, house", "global batch": 4, "training pictures": 6, "processes": 2, "mixed precision": False,
        "device": "cpu",
    },
}  # fmt: skip


def test_a_checkpoint_with_older_names_gives_one_note_of_what_it_does_not_say():
    [note] = check_resumable(OLD_CHECKPOINT, SETTINGS, Path("last.pt"))
    named = {name for name in MUST_MATCH + MAY_DIFFER if name in note.replace(",", "").split()}
    assert {"max_iters", "global_batch", "train_images", "crop_size", "momentum", "world_size"} <= named
    assert not named & {"model", "head", "seed", "lr", "classes", "device"}
    with pytest.raises(InputError, match="^--resume: "):
        check_resumable(OLD_CHECKPOINT, SETTINGS | {"seed": 1}, Path("last.pt"))


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_the_log_is_cut_where_the_checkpoint_stands(tmp_path):
    lines = [{"split": split, "iter": i} for split, i in (("train", 2), ("train", 4), ("val", 4), ("train", 6))]
    written = "".join(json.dumps(line) + "\n" for line in lines)
    for iteration, validated, kept in ((4, 4, 3), (4, 0, 2), (3, 0, 1), (6, 4, 4), (0, 0, 0)):
        (tmp_path / "log.jsonl").write_text(written + '{"split": "train", "it')
        folder = RunFolder(tmp_path, is_main=True, iteration=iteration, validated=validated)
        assert entries(tmp_path / "log.jsonl") == lines[:kept]
        folder.log({"split": "train", "iter": 7})
        assert len(entries(tmp_path / "log.jsonl")) == kept + 1


def test_only_rank_0_writes_and_adds_its_entries_to_every_checkpoint(tmp_path):
    for is_main in (False, True):
        folder = RunFolder(tmp_path / "run", is_main, {"classes": ["road"]})
        folder.log({"split": "train", "iter": 1})
        folder.save("last.pt", {"model": {}, "config": {}})
        assert (tmp_path / "run").exists() == is_main
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert state == {"model": {}, "config": {}, "classes": ["road"]}
    assert entries(tmp_path / "run/log.jsonl") == [{"split": "train", "iter": 1}]


def test_a_second_run_into_a_folder_is_refused(script, main, data, tmp_path):
    (tmp_path / "first.py").write_text(
        "import sys, time; from ocrnet.run import RunFolder; folder = RunFolder(sys.argv[1], is_main=True)\n"
        "folder.log({'split': 'train', 'iter': 1}); time.sleep(600)"
    )
    first = script(tmp_path / "first.py", tmp_path / "run", wait=False)
    until(lambda: is_training(tmp_path / "run"))
    flags = [*TINY_RUN, "--max-iters", 1, "--data-path", data, "--output-dir", tmp_path / "run", "--resume"]
    with pytest.raises(InputError, match=f"^--output-dir {tmp_path / 'run'}: "):
        main("train.py", *flags)
    assert len(entries(tmp_path / "run/log.jsonl")) == 1  # nothing was cut
    first.send(signal.SIGKILL)
    first.wait()
    RunFolder(tmp_path / "run", is_main=True)  # free again


def test_a_full_disk_leaves_the_last_checkpoint(main, trained, tmp_path, data):
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_failed_write_of_the_log_is_named(tmp_path):
    folder = RunFolder(tmp_path, is_main=True)
    folder.file.close()
    folder.file = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(InputError, match=f"^{tmp_path / 'log.jsonl'}: "):
        folder.log({"split": "train", "iter": 1})
