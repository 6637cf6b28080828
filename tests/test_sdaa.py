"""The scripts on --device sdaa, where Tecorigin's torch_sdaa, or a stand-in for it, can be imported."""

import importlib.util
import os
import re
import signal

import pytest
import torch
from conftest import RUN, entries, until

from ocrnet.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch_sdaa") is None, reason="needs torch_sdaa")
# what DeepSpeed's accelerator for SDAA uses of torch.sdaa
FEW = (
    "is_available device set_device current_device device_count synchronize manual_seed manual_seed_all initial_seed "
    "get_rng_state set_rng_state Stream Event stream current_stream empty_cache memory_allocated max_memory_allocated "
    "get_device_properties is_bf16_supported"
)
SDAA = [*RUN, "--batch-size", 1, "--device", "sdaa", "--max-iters", 4, "--val-every", 4, "--save-every", 2]


@pytest.fixture(scope="module")
def sdaa_run(script, data, tmp_path_factory):
    """The folder of a run of four iterations in fp16 on two cards, and what it printed."""
    folder = tmp_path_factory.mktemp("sdaa") / "run"
    done = script("train.py", *SDAA, "--data-path", data, "--output-dir", folder, processes=2)
    return folder, done.stdout


def test_two_cards_train_in_fp16_validate_and_save(sdaa_run):
    folder, output = sdaa_run
    assert re.search(r" 2 x sdaa .*float16", output)
    assert [entry["split"] for entry in entries(folder / "log.jsonl")] == ["train"] * 4 + ["val"]
    state = torch.load(folder / "last.pt", weights_only=True)
    assert all(x.device.type == "cpu" for x in state["model"].values())
    assert state["scaler"]["scale"] > 1  # the loss was scaled
    assert "2 x sdaa" in state["settings"]["device"] and "float16" in state["settings"]["device"]


def test_a_run_on_sdaa_resumes_to_the_same_losses(script, sdaa_run, data, tmp_path):
    code = (
        "import signal, train; ocr_loss, steps = train.ocr_loss, []\n"
        "def stop(*args, **options):\n"
        "    steps.append(1)\n"
        "    if len(steps) == 2: signal.raise_signal(signal.SIGTERM)\n"
        "    return ocr_loss(*args, **options)\n"
        "train.ocr_loss = stop; train.main()"
    )
    (tmp_path / "stopping.py").write_text(code)
    flags = [*SDAA, "--data-path", data, "--output-dir", tmp_path / "run"]
    script(tmp_path / "stopping.py", *flags, processes=2, ok=False)
    assert load_checkpoint(tmp_path / "run/last.pt")["iter"] in (2, 3)
    script("train.py", *flags, "--resume", processes=2)
    logs = [entries(folder / "log.jsonl", "train") for folder in (tmp_path / "run", sdaa_run[0])]
    losses, expected = ([entry["loss"] for entry in log] for log in logs)
    assert losses == pytest.approx(expected, rel=0.01)


def test_a_checkpoint_of_sdaa_is_scored_and_resumed_on_another_device_and_back(script, sdaa_run, data, tmp_path):
    for device in ("sdaa", "cpu"):
        script("evaluate.py", "--ckpt", sdaa_run[0] / "last.pt", "--data-path", data, "--device", device)
    path = tmp_path / "run/last.pt"
    path.parent.mkdir()
    save_checkpoint(path, load_checkpoint(sdaa_run[0] / "last.pt"))
    flags = [*SDAA, "--batch-size", 2, "--data-path", data, "--output-dir", path.parent, "--resume"]
    for device, before in (("cpu", "sdaa"), ("sdaa", "cpu")):
        save_checkpoint(path, load_checkpoint(path) | {"iter": 2, "validated": 0})
        output = script("train.py", *flags, "--device", device).stdout
        assert re.search(rf"^NOTE: .*\bdevice .*\b{device}\b.*\b{before}\b", output, re.MULTILINE)
        assert load_checkpoint(path)["iter"] == 4


def test_only_visible_cards_are_used(script, data, tmp_path, monkeypatch):
    monkeypatch.setenv("SDAA_VISIBLE_DEVICES", "0")
    flags = [*SDAA, "--data-path", data, "--output-dir", tmp_path]
    running = script("train.py", *flags, processes=2, wait=False)
    expected = re.compile(r"^error: --device sdaa: .*\b1\b", re.MULTILINE)
    until(lambda: expected.search(running.stderr), 60)
    running.send(signal.SIGKILL)  # rank 0, which waits for the other; torchrun would end it


def test_a_package_with_few_functions_trains_resumes_and_evaluates(script, data, tmp_path, monkeypatch):
    package = tmp_path / "few/torch_sdaa"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        f"import sys; sys.path.remove({str(package.parent)!r}); del sys.modules['torch_sdaa']\n"
        f"import torch, torch_sdaa\n"
        f"for name in {{*vars(torch.sdaa)}} - {{*{FEW!r}.split()}}:\n"
        f"    if not name.startswith('__'): delattr(torch.sdaa, name)"
    )
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    flags = [*SDAA, "--no-amp", "--data-path", data, "--output-dir", tmp_path / "run"]
    script("train.py", *flags, processes=2)
    state = load_checkpoint(tmp_path / "run/last.pt")
    save_checkpoint(tmp_path / "run/last.pt", state | {"iter": 2, "validated": 0})
    output = script("train.py", *flags, "--resume", processes=2).stdout
    assert "2 x sdaa" in output and load_checkpoint(tmp_path / "run/last.pt")["iter"] == 4
    script("evaluate.py", "--ckpt", tmp_path / "run/last.pt", "--data-path", data, "--device", "sdaa", "--no-amp")
