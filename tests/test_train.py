"""train.py: what a run writes, what its flags change, and how it ends on errors. For resuming see test_resume.py."""

import ctypes
import gc
import itertools
import os
import re
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import RUN, ReachedError, entries, raise_reached
from PIL import Image
from torch.utils.data import default_collate

import train
from ocrnet import InputError, plots
from ocrnet.checkpoint import load_checkpoint, load_model
from ocrnet.data.classes import CITYSCAPES, balanced_weights
from ocrnet.data.datasets import EvalDataset, InfiniteSampler, TrainDataset, find_samples, read_label
from ocrnet.data.synthetic import write_dataset
from ocrnet.data.transforms import preprocess
from ocrnet.device import Accelerator
from ocrnet.inference import make_forward
from ocrnet.losses import ocr_loss, poly_lr
from ocrnet.metrics import ConfusionMatrix
from ocrnet.models import build_model
from ocrnet.script import run_script


def class_weights(data):
    """Those of --class-weights auto, (19,)."""
    labels = [read_label(sample.label, CITYSCAPES) for sample in find_samples(data, "train")]
    pixels = np.bincount(np.concatenate([label.ravel() for label in labels]), minlength=256)[:19]
    return torch.tensor(balanced_weights(pixels.tolist()))


def train_by_hand(data, count, batch, accum=1, seed=0, lr=0.01, weight_decay=5e-4, **crops):
    """The first of eight iterations of the recipe in one process -> the model, and the losses (count, 3)."""
    torch.manual_seed(seed)
    memory_format = Accelerator("cpu").memory_format
    model, weights = build_model("tiny").to(memory_format=memory_format), class_weights(data)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
    dataset = TrainDataset(find_samples(data, "train"), CITYSCAPES, seed=seed, **crops)
    keys, losses = iter(InfiniteSampler(len(dataset), seed)), torch.zeros(count, 3)
    for t in range(count):
        optimizer.param_groups[0]["lr"] = poly_lr(lr, t, 8)
        optimizer.zero_grad()
        for _ in range(accum):
            image, label, photometric = default_collate([dataset[key] for key in itertools.islice(keys, batch)])
            image = preprocess(image, photometric).contiguous(memory_format=memory_format)
            loss, parts = ocr_loss(model(image), label.long(), weights)
            (loss / accum).backward()
            losses[t] += torch.tensor([loss.item(), *parts]) / accum
        optimizer.step()
    return model, losses


def test_two_ranks_train_validate_save_and_draw(trained, data):
    drawn = {"curve.png", "samples.png", "scores.png"}
    assert {path.name for path in trained.iterdir()} == {"log.jsonl", "last.pt", "best.pt", *drawn}
    for name in drawn:
        Image.open(trained / name).verify()
    log = entries(trained / "log.jsonl")
    assert " ".join(f"{e['split']} {e['iter']}" for e in log) == "train 2 train 4 val 4 train 6 train 8 val 8"
    for entry in entries(trained / "log.jsonl", "train"):
        assert entry["loss"] == pytest.approx(entry["loss_final"] + 0.4 * entry["loss_aux"], rel=1e-5)
        assert entry["lr"] == pytest.approx(poly_lr(0.01, entry["iter"] - 1, 8))
        assert entry["images_per_s"] > 0 and 0 <= entry["waiting_for_data"] <= 1
    assert all(list(entry["IoU"]) == CITYSCAPES.names for entry in entries(trained / "log.jsonl", "val"))
    _, losses = train_by_hand(data, 4, batch=4, crop_size=(32, 64))
    for entry, expected, tolerance in zip(log, losses.split(2), (1e-3, 0.03)):  # steps amplify rounding
        found = [entry[name] for name in ("loss", "loss_final", "loss_aux")]
        assert found == pytest.approx(expected.mean(0).tolist(), rel=tolerance)


def test_a_checkpoint_holds_tensors_and_plain_values_only(trained):
    state = torch.load(trained / "last.pt", weights_only=True)
    assert state["config"]["name"] == "tiny" and state["config"]["num_classes"] == 19
    assert state["iter"] == state["validated"] == state["model"]["backbone.bn1.num_batches_tracked"] == 8
    assert [row["name"] for row in state["classes"]] == [label.name for label in CITYSCAPES.labels]
    assert state["size"] == [128, 256] and load_model(trained / "last.pt")[0].long_side == 256
    expected = {"model": "tiny", "max_iters": 8, "global_batch": 4, "train_images": 6, "seed": 0, "amp": None}
    assert expected.items() <= state["settings"].items()


def scored(right):
    """What a validation with this share of right pixels returns: an IoU of as much, and a class of IoU 0."""
    confusion = ConfusionMatrix(19)
    confusion.update(torch.zeros(10).long(), (torch.arange(10) >= 10 * right).long())
    return confusion, 1.5


def test_the_best_checkpoint_is_the_first_of_the_highest_miou_and_figures_come_first(main, data, tmp_path, monkeypatch):
    def draw(folder, *args):
        last_entry = entries(folder / "log.jsonl", "val")[-1]
        drawn.append((load_checkpoint(folder / "last.pt")["validated"], last_entry["iter"]))

    scores, drawn = iter([0.3, 0.5, 0.5, 0.4]), []
    monkeypatch.setattr(train, "evaluate", lambda *args: scored(next(scores)))
    monkeypatch.setattr(plots, "draw_run", draw)
    flags = [*RUN, "--max-iters", 4, "--workers", 0, "--val-every", 1, "--data-path", data]
    main("train.py", *flags, "--output-dir", tmp_path / "new/run")
    for name, expected in (("best.pt", (2, 2, 0.25)), ("last.pt", (4, 4, 0.25))):
        state = load_checkpoint(tmp_path / "new/run" / name)
        assert (state["iter"], state["validated"], state["best"]) == expected
    log = entries(tmp_path / "new/run/log.jsonl", "val")
    assert [(entry["mIoU"], entry["loss"]) for entry in log] == [(x, 1.5) for x in (0.15, 0.25, 0.25, 0.2)]
    assert drawn == [(0, 1), (1, 2), (2, 3), (3, 4)]  # after the entry, and before the checkpoint knows it


def test_intervals_and_a_speed_of_steps_and_waiting_for_data(train_here, tmp_path, monkeypatch, capsys):
    def spend(seconds, function):
        def call(*args):
            clock.append(clock[-1] + seconds)
            return function(*args)

        return call

    def look(*_):
        found.append((last.exists() and load_checkpoint(last)["iter"], log.exists() and len(entries(log))))

    clock, found, last, log = [0.0], [], tmp_path / "last.pt", tmp_path / "log.jsonl"
    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    monkeypatch.setattr(TrainDataset, "__getitem__", spend(0.25, TrainDataset.__getitem__))
    monkeypatch.setattr(train, "evaluate", spend(100, lambda *args: scored(0.5)))
    flags = ["--val-every", 4, "--log-every", 3, "--save-every", 2, "--max-iters", 7]
    train_here(*flags, before_loss=spend(1, look))
    assert found == [(0, 0), (0, 0), (2, 0), (2, 1), (4, 2), (4, 2), (6, 3)]  # last.pt, and entries of the log
    entry = entries(log, "train")[1]  # of three steps of 1 s and three batches of two samples
    assert entry["images_per_s"] == pytest.approx(4 / 3) and entry["waiting_for_data"] == pytest.approx(1 / 3)
    score, left = r"iter 4: .*\(2 of 19 classes", f"6/7 .*{timedelta(seconds=2)} left"  # a step of 1.5 s
    assert re.search(f"{score}.*{left}", capsys.readouterr().out, re.DOTALL)


@pytest.fixture
def printed(train_here, capsys):
    """printed("--max-iters", 2): what train.py prints before its first loss."""
    return lambda *flags: (train_here(*flags, before_loss=raise_reached), capsys.readouterr().out)[1]


def test_a_run_prints_its_sizes_and_notes_what_is_unusual(printed, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    output = printed("--batch-size", 8, "--crop-size", 128, 256, "--max-iters", 700)
    count = sum(p.numel() for p in build_model("tiny").parameters())
    for number in (f"{count:,} ", "6 training", "5 validation", "19 classes", "700 iter", "8 crops of 128x256"):
        assert number in output
    assert "WARNING" in output and "NOTE" not in output
    output = printed("--batch-size", 6, "--weights", trained / "best.pt")
    assert "WARNING" not in output and "NOTE" in output  # the learning rate is for another batch size
    assert "NOTE" not in printed("--lr", 0.01) + printed("--lr=0.02")
    for size in ((160, 64), (64, 288)):  # of images of 128x256
        assert "NOTE: --crop-size" in printed("--crop-size", *size)
    monkeypatch.setattr(train, "write_dataset", lambda root: write_dataset(root, {"train": 1, "val": 1}))
    output = printed("--demo", "--data-path", tmp_path / "data")
    for text in ("1 training and 1 validation", "lr 0.2", "NOTE: no pixel is wall, bus, motorcycle in 1 of 1"):
        assert text in output
    assert "--lr" not in output and "WARNING" not in output
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert "NOTE: 1 of 4 cores" in printed()


def test_data_loader_workers_fit_into_shared_memory(printed, monkeypatch):
    for free, ranks, workers in ((2, 1, []), (3, 2, ["1"]), (1.99, 1, ["1"]), (0, 1, ["0"])):
        free_bytes = int(free * 3 * 4 * 2 * 3 * 32 * 64)  # for three batches of a worker
        monkeypatch.setattr(shutil, "disk_usage", lambda path, x=free_bytes: SimpleNamespace(free=x))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))  # which share it
        output = printed("--workers", 2, "--batch-size", 2, "--accum-steps", 3)
        assert re.findall(r"NOTE: (\d+) data loader", output) == workers


def test_each_seed_rank_and_iteration_has_its_dropout_and_one_rank_writes(train_here, tmp_path, monkeypatch, capsys):
    seeds = []
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *args, **options: None)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(torch.distributed.HashStore(), 0, 1)]))
    for rank, seed in ((0, 0), (0, 3), (1, 0)):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 1}.items():
            monkeypatch.setenv(name, str(value))
        folder = tmp_path / f"{rank}{seed}"
        flags, options = ("--max-iters", 2, "--seed", seed), dict(folder=folder, validate=False)
        train_here(*flags, **options, before_loss=lambda *_: seeds.append(torch.initial_seed()))
        assert folder.exists() == bool(capsys.readouterr().out) == (rank == 0)
    assert len(set(seeds)) == len(seeds) == 6


def test_a_run_is_these_steps_of_sgd(train_here, data, tmp_path):
    flags = (
        "--max-iters 8 --val-every 3 --batch-size 1 --accum-steps 2 --lr 0.02 --weight-decay 0.001 --crop-size 64 32 "
        "--scale-range 0.75 1.5 --no-color-jitter --class-weights auto --seed 3"
    )
    state = train_here(*flags.split(), validate=False)["model"]
    crops = dict(crop_size=(64, 32), scale_range=(0.75, 1.5), color_jitter=False)
    model, losses = train_by_hand(data, 3, batch=1, accum=2, seed=3, lr=0.02, weight_decay=0.001, **crops)
    found = [entry["loss"] for entry in entries(tmp_path / "log.jsonl")]
    assert found == pytest.approx(losses[:, 0].tolist(), rel=1e-3)
    torch.manual_seed(3)
    start = build_model("tiny").state_dict()
    for name, x in model.named_parameters():
        assert (state[name] - x).norm() <= 0.01 * (x - start[name]).norm() + 1e-7, name


@pytest.mark.parametrize("name, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16), (None, torch.float32)])
def test_precision_and_compilation_reach_the_model(train_here, monkeypatch, name, dtype):
    def stop(n, outputs, label, class_weights):
        seen.extend([outputs[0].dtype, outputs[1].dtype, class_weights])
        raise ReachedError

    seen = []
    monkeypatch.setattr(torch, "compile", lambda model, backend: seen.append(backend) or model)
    train_here(*(["--amp", "--amp-dtype", name, "--compile"] if name else []), before_loss=stop)
    assert seen == [*(["inductor"] if name else []), dtype, dtype, None]


RECIPE = dict(  # mmsegmentation's ocrnet_hr18_4xb2-40k_cityscapes-512x1024, and intervals
    demo=False, data_path=Path("data/cityscapes"), output_dir=Path("runs/hr18"), model="hr18", head="ocr", weights=None,
    resume=False, max_iters=40_000, batch_size=2, accum_steps=1, lr=0.01, weight_decay=5e-4, crop_size=[512, 1024],
    scale_range=[0.5, 2.0], color_jitter=True, class_weights=None, seed=0, device=None, amp=None, amp_dtype=None,
    compile=False, workers=3, val_every=4000, save_every=500, log_every=50,
)  # fmt: skip
DEMO = dict(
    demo=True, data_path=Path("data/synthetic"), output_dir=Path("runs/demo"), model="hr18t", max_iters=1000, lr=0.2,
    batch_size=4, weight_decay=2e-3, crop_size=[96, 192], scale_range=[1.0, 1.0], color_jitter=False, workers=1,
    val_every=500, save_every=500, log_every=25, resume=True,
)  # fmt: skip
FCN = dict(model="r50", head="fcn", amp=False, output_dir=Path("runs/r50-fcn"))
OUT_OF_RANGE = (
    "--max-iters 0, --batch-size 0, --accum-steps 0, --val-every 0, --save-every 0, --log-every 0, --scale-range 2 1, "
    "--scale-range 0 1, --crop-size 31 64, --workers -1, --lr nan, --lr -1, --weight-decay -1, --weight-decay inf, "
    "--seed -1, --seed 9223372036854775808, --batch-size x, --model x, --head x, --class-weights x, --device x, "
    "--amp-dtype x"
)


@pytest.mark.parametrize("flags, changed", [("", {}), ("--demo", DEMO), ("--model r50 --head fcn --no-amp", FCN)])
def test_defaults_are_those_of_the_recipe(monkeypatch, flags, changed):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    for cores, workers in ((3, 3), (64, 4), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert vars(train.parse_args()) == RECIPE | {"workers": workers} | changed


@pytest.mark.parametrize("flags", OUT_OF_RANGE.split(", "))
def test_flags_out_of_range_are_refused_by_name(main, flags, capsys):
    with pytest.raises(SystemExit) as error:
        main("train.py", *flags.split())
    usage, error_line = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and re.search(rf"error: (argument )?{flags.split()[0]}: ", error_line)


def test_help_shows_the_description_and_the_defaults(main, capsys):
    with pytest.raises(SystemExit):
        main("train.py", "--help")
    assert re.search(f"{re.escape(train.__doc__.strip())}.*40000", capsys.readouterr().out, re.DOTALL)


def test_training_starts_from_the_weights_and_ends_with_the_score_and_the_files(train_here, trained, tmp_path, capsys):
    state = train_here("--weights", trained / "last.pt", "--max-iters", 1, "--lr", 0, "--seed", 2**63 - 1)
    for name, x in load_model(trained / "last.pt")[0].named_parameters():
        assert torch.equal(state["model"][name], x)
    *lines, printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{trained / 'last.pt'}: ") for line in lines) and "iter 1: mIoU" in lines[-1]
    assert f"{state['best']:.2%}" in printed and all(path.name in printed for path in tmp_path.iterdir())


def test_the_loss_of_validation_is_that_of_whole_images(trained, data):
    forward = make_forward(load_model(trained / "last.pt")[0], Accelerator("cpu"))
    samples, weights = EvalDataset(find_samples(data, "val"), CITYSCAPES), class_weights(data)
    losses = [ocr_loss(forward(image[None]), label[None].long(), weights)[0].item() for image, label in samples]
    assert entries(trained / "log.jsonl", "val")[-1]["loss"] == pytest.approx(sum(losses) / 5, rel=1e-6)


def test_training_does_not_start_from_a_file_that_is_no_checkpoint_of_a_run(train_here, trained, tmp_path):
    damaged, model = bytearray((trained / "last.pt").read_bytes()), tmp_path / "model.pt"
    damaged[len(damaged) // 2] ^= 1  # in a tensor
    torch.save({name: load_checkpoint(trained / "last.pt")[name] for name in ("model", "config")}, model)
    file = tmp_path / "last.pt"
    for content, found in ((b"not a checkpoint", ""), (damaged, ".*damaged"), (model.read_bytes(), "")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=f"^{file}: {found}"):
            train_here("--resume")
        assert file.read_bytes() == content
    file.rename(tmp_path / "x.pt").write_text("text")
    with pytest.raises(InputError, match=f"^{tmp_path / 'x.pt'}: "):
        train_here("--weights", tmp_path / "x.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"x.pt", "model.pt"}


@pytest.mark.parametrize("error, status", [
    (MemoryError(), "^error: out of memory.*--batch-size"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "^error: out of memory.*--batch-size"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "^error: out of memory"),
    (TimeoutError(), r"^error: TimeoutError\(\)$"), (KeyboardInterrupt(), "^130$"),
    (InputError("a\nb\nocrnet.InputError: c\n"), "^error: c$"),  # of a data loader worker
    (RuntimeError("of the code"), "^of the code$"),  # with its traceback
])  # fmt: skip
def test_an_error_is_one_line_and_ctrl_c_a_status(error, status):
    def main():
        raise error

    with pytest.raises((SystemExit, RuntimeError), match=status):
        run_script(main)


def test_a_lack_of_memory_while_a_graph_is_recorded_is_one_line():
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(SystemExit, match="^error: out of memory"):
        run_script(lambda: (_ for _ in ()).throw(error))


def test_an_error_after_a_stop_signal_is_said_and_has_the_signals_status(monkeypatch, capsys):
    def main():
        raise InputError("last.pt: cannot be written")

    monkeypatch.setattr("ocrnet.script.received", [signal.SIGTERM])
    with pytest.raises(SystemExit) as exit:
        run_script(main)
    assert exit.value.code == 143 and capsys.readouterr().err == "error: last.pt: cannot be written\n"


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(train_here, tmp_path):
    with pytest.raises(InputError, match="^--lr 1e"):
        train_here("--lr", 1e30, "--max-iters", 5)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_memory_and_open_files_do_not_grow(train_here):
    def measure(n, *_):
        gc.collect()
        info = mallinfo2().x
        used.append([(info[4] + info[7]) / 2**20, len(os.listdir("/proc/self/fd"))])  # hblkhd + uordblks
        if n == 22:
            raise ReachedError

    mallinfo2, used = ctypes.CDLL(None).mallinfo2, []
    mallinfo2.restype = type("Info", (ctypes.Structure,), {"_fields_": [("x", ctypes.c_size_t * 10)]})
    gc.freeze()  # what is there does not slow down collect()
    train_here("--max-iters", 99, "--val-every", 8, "--save-every", 4, "--log-every", 8, before_loss=measure)
    (memory, files), (last_memory, last_files) = (np.array(used[i : i + 6]).min(0) for i in (8, 16))
    assert last_memory - memory < 0.25 and last_files <= files  # MiB
