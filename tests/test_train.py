"""train.py: what a run writes, what its flags change, and how it ends on errors. For resuming see test_resume.py."""

import ctypes
import itertools
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import RUN, entries, error_of
from PIL import Image

import train
from ocrnet import InputError, plots
from ocrnet.checkpoint import load_checkpoint, load_model, save_checkpoint
from ocrnet.data.classes import CITYSCAPES, balanced_weights
from ocrnet.data.datasets import EvalDataset, InfiniteSampler, find_samples, read_label
from ocrnet.data.synthetic import write_dataset
from ocrnet.device import Accelerator
from ocrnet.inference import make_forward
from ocrnet.losses import ocr_loss, poly_lr
from ocrnet.models import build_model
from ocrnet.script import run_script

DRAWN = {"curve.png", "samples.png", "scores.png"}


def record(monkeypatch, name):
    """The (arguments, options, result) of every call of a function or class that train.py imports."""
    calls, original = [], getattr(train, name)

    def call(*args, **options):
        result = original(*args, **options)
        calls.append((args, options, result))
        return result

    monkeypatch.setattr(train, name, call)
    return calls


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_two_ranks_train_validate_save_and_draw(trained):
    assert {path.name for path in trained.iterdir()} == {"log.jsonl", "last.pt", "best.pt", *DRAWN}
    for name in DRAWN:
        Image.open(trained / name).verify()
    log = entries(trained / "log.jsonl")
    assert [(e["split"], e["iter"]) for e in log] == [
        ("train", 2), ("train", 4), ("val", 4), ("train", 6), ("train", 8), ("val", 8)
    ]  # fmt: skip
    for entry in entries(trained / "log.jsonl", "train"):
        assert entry["loss"] == pytest.approx(entry["loss_final"] + 0.4 * entry["loss_aux"], rel=1e-5)
        assert entry["lr"] == poly_lr(0.01, entry["iter"] - 1, 8)
        assert entry["images_per_s"] > 0 and 0 <= entry["waiting_for_data"] <= 1
    assert log[-2]["lr"] == pytest.approx(1e-4)
    for entry in entries(trained / "log.jsonl", "val"):
        assert 0 <= entry["mIoU"] <= 1 and list(entry["IoU"]) == CITYSCAPES.names


def test_a_checkpoint_holds_tensors_and_plain_values_only(trained):
    state = torch.load(trained / "last.pt", weights_only=True)
    assert state["config"]["name"] == "tiny" and state["config"]["num_classes"] == 19
    assert state["iter"] == state["validated"] == 8
    assert state["best"] == max(entry["mIoU"] for entry in entries(trained / "log.jsonl", "val"))
    assert [row["name"] for row in state["classes"]] == [label.name for label in CITYSCAPES.labels]
    expected = {"model": "tiny", "max_iters": 8, "global_batch": 4, "train_images": 6}
    assert expected.items() <= state["settings"].items()


def test_the_best_checkpoint_is_that_of_the_highest_miou(trained):
    best = max(entries(trained / "log.jsonl", "val"), key=lambda entry: entry["mIoU"])
    state = load_checkpoint(trained / "best.pt")
    assert (state["iter"], state["best"]) == (best["iter"], best["mIoU"])


def test_a_run_prints_its_sizes_and_notes_what_is_unusual(main, data, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "catch_stop_signals", raise_reached)
    flags = [*RUN, "--workers", 0, "--max-iters", 700, "--data-path", data, "--output-dir", tmp_path / "run"]

    def printed(*more):
        with pytest.raises(ReachedError):
            main("train.py", *flags, *more)
        shutil.rmtree(tmp_path / "run")
        return capsys.readouterr().out

    output = printed("--batch-size", 8, "--model", "hr18s")
    for number in ("6,378,496 ", "6 training", "5 validation", "19 classes", "700 iterations", "8 crops of 32x64"):
        assert number in output
    assert "WARNING" in output and "NOTE" not in output
    output = printed("--batch-size", 6, "--weights", trained / "best.pt")
    assert "WARNING" not in output and "NOTE" in output  # the learning rate is for another batch size
    assert "NOTE" not in printed("--batch-size", 6, "--lr", 0.01)
    assert "NOTE: --crop-size" in printed("--batch-size", 8, "--crop-size", 160, 160)  # of images of 128x256
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert "NOTE: 1 of 16 cores" in printed("--batch-size", 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2 * 4 * 32 * 64))
    assert "NOTE: 2 data loader workers" in printed("--batch-size", 1, "--lr", 0.02, "--workers", 3)


# ---- flags -----------------------------------------------------------------------------------------------------------


class ReachedError(Exception):
    """Ends a run where a test has seen enough."""


def raise_reached(*args, **options):
    raise ReachedError


def test_flags_of_the_recipe_reach_the_run(main, data, tmp_path, monkeypatch):
    data_sets, losses, rates = (record(monkeypatch, name) for name in ("TrainDataset", "ocr_loss", "poly_lr"))
    monkeypatch.setattr(train, "evaluate", raise_reached)
    flags = (
        "--workers 0 --max-iters 2 --batch-size 1 --accum-steps 2 --lr 0.02 --weight-decay 0.001 --crop-size 64 32 "
        "--scale-range 0.75 1.5 --no-color-jitter --class-weights auto --seed 3"
    )
    with pytest.raises(ReachedError):  # with the first validation, after the checkpoint
        main("train.py", *RUN, *flags.split(), "--data-path", data, "--output-dir", tmp_path)

    [(*_, data_set)] = data_sets
    assert list(data_set.crop_size) == [64, 32] and list(data_set.scale_range) == [0.75, 1.5]
    assert data_set.color_jitter is False and data_set.seed == 3
    assert [args for args, *_ in rates] == [(0.02, 0, 2), (0.02, 1, 2)]
    labels = [read_label(sample.label, CITYSCAPES) for sample in find_samples(data, "train")]
    pixels = np.bincount(np.concatenate([label.ravel() for label in labels]), minlength=256)[:19]
    expected = torch.tensor(balanced_weights(pixels.tolist()))
    assert len(losses) == 4  # two batches for each of two steps
    for (outputs, label), options, _ in losses:
        assert all(x.dtype == torch.float32 for x in outputs) and label.shape == (1, 64, 32)
        assert torch.equal(options["class_weights"], expected)
    state = load_checkpoint(tmp_path / "last.pt")
    assert {"amp": None, "global_batch": 2, "accum_steps": 2, "seed": 3}.items() <= state["settings"].items()
    [group] = state["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"], group["lr"]) == (0.9, 0.001, 1e-4)
    for entry, steps in zip(entries(tmp_path / "log.jsonl"), (losses[:2], losses[2:]), strict=True):
        assert entry["loss"] == pytest.approx(sum(loss.item() for *_, (loss, _) in steps) / 2)  # of the step's batches


@pytest.mark.parametrize("name, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_mixed_precision_reaches_the_model(main, data, tmp_path, monkeypatch, name, dtype):
    def stop(outputs, *args, **options):
        assert all(x.dtype == dtype for x in outputs)
        raise ReachedError

    monkeypatch.setattr(train, "ocr_loss", stop)
    flags = ["--amp", "--amp-dtype", name, "--batch-size", 1, "--crop-size", 64, 32, "--workers", 0]
    with pytest.raises(ReachedError):
        main("train.py", *RUN, *flags, "--data-path", data, "--output-dir", tmp_path)


def test_defaults_are_those_of_the_recipe(monkeypatch):
    """Of mmsegmentation's ocrnet_hr18_4xb2-40k_cityscapes-512x1024."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = train.parse_args()
    assert (args.model, args.head, args.max_iters, args.batch_size, args.accum_steps) == ("hr18", "ocr", 40_000, 2, 1)
    assert (args.lr, args.weight_decay) == (0.01, 5e-4) and not args.class_weights
    assert (args.crop_size, args.scale_range, args.color_jitter) == ([512, 1024], [0.5, 2.0], True)


def test_training_starts_from_the_weights_and_ends_with_the_score_and_the_files(main, data, trained, tmp_path, capsys):
    flags = ["--weights", trained / "last.pt", "--workers", 0, "--max-iters", 1, "--lr", 0]
    main("train.py", *RUN, *flags, "--data-path", data, "--output-dir", tmp_path)
    first, last = (load_checkpoint(folder / "last.pt") for folder in (trained, tmp_path))
    assert last["iter"] == 1
    for name, _ in build_model("tiny").named_parameters():
        assert torch.equal(first["model"][name], last["model"][name])
    printed = capsys.readouterr().out.splitlines()[-1]
    assert f"{last['best']:.2%}" in printed and all(path.name in printed for path in tmp_path.iterdir())


def test_figures_are_drawn_with_each_validation_before_the_checkpoint_knows_it(main, data, tmp_path, monkeypatch):
    drawn = []

    def draw(folder, forward, dataset, confusion):
        drawn.append(
            (load_checkpoint(folder / "last.pt")["validated"], entries(folder / "log.jsonl", "val")[-1]["iter"])
        )

    monkeypatch.setattr(plots, "draw_run", draw)
    flags = ["--workers", 0, "--max-iters", 2, "--val-every", 1, "--data-path", data, "--output-dir", tmp_path]
    main("train.py", *RUN, *flags)
    assert drawn == [(0, 1), (1, 2)]


def test_the_loss_of_validation_is_that_of_whole_images(trained, data):
    model, _ = load_model(trained / "last.pt")
    losses = []
    for image, label in EvalDataset(find_samples(data, "val"), CITYSCAPES):
        outputs = make_forward(model, Accelerator("cpu"))(image[None])
        losses.append(ocr_loss(outputs, label[None].long())[0].item())
    last = entries(trained / "log.jsonl", "val")[-1]
    assert last["loss"] == pytest.approx(sum(losses) / 5, rel=1e-6)


def test_flags_override_the_demo_which_generates_its_data(main, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "write_dataset", lambda root: write_dataset(root, {"train": 2, "val": 1}))
    monkeypatch.setattr(train, "catch_stop_signals", raise_reached)
    flags = ["--data-path", tmp_path / "data", "--max-iters", 7, "--device", "cpu", "--workers", 0]
    with pytest.raises(ReachedError):
        main("train.py", "--demo", *flags, "--output-dir", tmp_path / "run")
    output = capsys.readouterr().out
    assert "7 iterations of 4 crops of 96x192" in output and "2 training and 1 validation" in output


OUT_OF_RANGE = (
    "--max-iters 0, --batch-size 0, --accum-steps 0, --val-every 0, --save-every 0, --log-every 0, --scale-range 2 1, "
    "--scale-range 0 1, --crop-size 16 64, --workers -1, --lr nan, --lr -1, --weight-decay inf, "
    "--seed 99999999999999999999, --batch-size x"
)


@pytest.mark.parametrize("flags", OUT_OF_RANGE.split(", "))
def test_flags_out_of_range_are_refused_by_name(main, flags, capsys):
    with pytest.raises(SystemExit) as error:
        main("train.py", *flags.split())
    error_line = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and re.search(rf"error: (argument )?{flags.split()[0]}: ", error_line)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_training_without_data_is_an_error_of_every_rank(script, tmp_path):
    flags = ["--data-path", tmp_path, "--output-dir", tmp_path / "run"]
    done = script("train.py", *RUN, *flags, processes=2, ok=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and all(f"{tmp_path}/leftImg8bit/train: " in line for line in errors)
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("place, what", [(0, "a truncated image"), (2, "an unknown label value")])
def test_a_bad_file_in_the_first_or_second_batch_is_one_line(script, data, tmp_path, place, what):
    shutil.copytree(data, tmp_path / "data")
    index = list(itertools.islice(InfiniteSampler(6, seed=0), 3))[place][1]
    sample = find_samples(tmp_path / "data", "train")[index]
    victim = sample.image if "image" in what else sample.label
    if "image" in what:
        victim.write_bytes(victim.read_bytes()[:3000])
    else:
        Image.fromarray(np.full((128, 256), 40, np.uint8)).save(victim)
    flags = ["--max-iters", 9, "--data-path", tmp_path / "data", "--output-dir", tmp_path / "run"]
    assert error_of(script("train.py", *RUN, *flags, ok=False)).startswith(f"error: {victim}: ")


@pytest.mark.parametrize("flag", ["--weights", "--resume"])
def test_training_does_not_start_from_a_file_that_is_no_checkpoint(main, data, tmp_path, flag):
    file = tmp_path / "last.pt"
    file.write_text("not a checkpoint")
    start = [flag, file, "--output-dir", tmp_path / "run"] if flag == "--weights" else [flag, "--output-dir", tmp_path]
    with pytest.raises(InputError, match=f"^{file}: "):
        main("train.py", *RUN, "--max-iters", 3, "--data-path", data, *start)
    assert file.read_text() == "not a checkpoint" and not (tmp_path / "run").exists()


def test_flipped_bits_of_a_checkpoint_are_found(main, trained, data, tmp_path):
    content = bytearray((trained / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1  # in a tensor
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(InputError, match=f"^{tmp_path / 'last.pt'}: .*damaged"):
        main("train.py", *RUN, "--resume", "--output-dir", tmp_path, "--data-path", data)


def fail_with(error):
    raise error


@pytest.mark.parametrize(
    "run",
    [
        lambda: fail_with(MemoryError()),
        lambda: fail_with(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")),
        lambda: torch.empty(2**50),
    ],
)
def test_a_lack_of_memory_is_one_line_with_the_flags_that_help(run):
    with pytest.raises(SystemExit, match="^error: out of memory.*--batch-size"):
        run_script(run)


def test_an_error_without_text_is_one_line():
    with pytest.raises(SystemExit, match="^error: TimeoutError"):
        run_script(lambda: fail_with(TimeoutError()))


def test_ctrl_c_has_its_exit_status_and_an_error_of_the_code_its_traceback():
    with pytest.raises(SystemExit) as error:
        run_script(lambda: fail_with(KeyboardInterrupt()))
    assert error.value.code == 130
    with pytest.raises(RuntimeError, match="size"):
        run_script(lambda: torch.ones(2) + torch.ones(3))


def test_a_model_without_a_run_is_not_resumed(main, data, tmp_path):
    model = build_model("tiny")
    save_checkpoint(tmp_path / "last.pt", {"model": model.state_dict(), "config": model.config})
    with pytest.raises(InputError, match=f"^{tmp_path / 'last.pt'}: "):
        main("train.py", *RUN, "--resume", "--output-dir", tmp_path, "--data-path", data)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(main, data, tmp_path):
    flags = ["--lr", 1e30, "--max-iters", 5, "--workers", 0, "--data-path", data, "--output-dir", tmp_path]
    with pytest.raises(InputError, match="^--lr 1e"):
        main("train.py", *RUN, *flags)
    assert not list(tmp_path.glob("*.pt"))


# ---- long runs -------------------------------------------------------------------------------------------------------

LONG = """
import ctypes, gc, json, os, sys
samples = sys.argv.pop(1)
import train
from ocrnet import plots
poly_lr, measured = train.poly_lr, []
mallinfo2 = ctypes.CDLL(None).mallinfo2  # arena, ordblks, smblks, hblks, hblkhd, usmblks, fsmblks, uordblks, ...
mallinfo2.restype = type("Info", (ctypes.Structure,), {"_fields_": [("x", ctypes.c_size_t * 10)]})


def resident(pid):
    return int(open(f"/proc/{pid}/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(lr, t, *rest):
    gc.collect()
    info = mallinfo2().x
    workers = [pid for task in os.listdir("/proc/self/task")
               for pid in open(f"/proc/self/task/{task}/children").read().split()]
    in_use, of_workers = (info[4] + info[7]) / 2**20, sum(map(resident, workers))
    measured.append([in_use, of_workers, len(os.listdir("/proc/self/fd"))])
    return poly_lr(lr, t, *rest)


train.poly_lr = measure
plots.draw_run = lambda *args: None
train.main()
json.dump(measured, open(samples, "w"))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_memory_and_open_files_do_not_grow(script, data, tmp_path):
    intervals = ["--val-every", 10, "--save-every", 5, "--log-every", 10]
    flags = [*RUN, "--crop-size", 32, 32, "--max-iters", 25, *intervals]
    (tmp_path / "long.py").write_text(LONG)
    paths = ["--data-path", data, "--output-dir", tmp_path / "run"]
    script(tmp_path / "long.py", tmp_path / "samples", *flags, *paths)
    samples = np.array(json.loads((tmp_path / "samples").read_text()))  # before each iteration
    first, last = samples[10:20].min(0), samples[20:].min(0)
    assert last[0] - first[0] < 0.25, "MiB that malloc has in use"
    assert last[1] - first[1] < 3, "MiB of the data loader worker"
    assert last[2] <= first[2], "open files"
