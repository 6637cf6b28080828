"""The scripts on --device sdaa, where Tecorigin's torch_sdaa, or something that stands in for it, can be imported."""

import importlib.util

import pytest
import torch
from conftest import ROOT, RUN, entries, same_run

from ocrnet.checkpoint import load_checkpoint

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_sdaa") is None, reason="there is no torch_sdaa here, so nothing runs on sdaa"
)
SDAA = [*RUN, "--batch-size", 1, "--device", "sdaa", "--iters", 4, "--val-every", 4, "--save-every", 2]


@pytest.fixture(scope="module")
def trained(script, data, tmp_path_factory):
    """A run of four iterations in fp16 on two cards."""
    out = tmp_path_factory.mktemp("sdaa") / "run"
    return out, script("train.py", *SDAA, "--data", data, "--out", out, processes=2)


def test_two_cards_train_in_mixed_precision_validate_and_save(trained):
    out, done = trained
    assert "on sdaa (" in done.stdout and "2 processes, mixed precision" in done.stdout
    assert [entry["split"] for entry in entries(out / "log.jsonl")] == ["train"] * 4 + ["val"]
    state = load_checkpoint(out / "last.pt")
    assert state["scaler"]["scale"] > 1  # loss scaling was at work
    assert all(x.device.type == "cpu" for x in torch.load(out / "last.pt", weights_only=True)["model"].values())


def test_a_run_on_sdaa_resumes_to_the_same_weights(script, trained, data, tmp_path):
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv.pop(1)); import train; poly_lr = train.poly_lr\n"
        "def stop(lr, t, *rest):\n"
        "    if t == 1: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return poly_lr(lr, t, *rest)\n"
        "train.poly_lr = stop; train.main()"
    )
    (tmp_path / "stopping.py").write_text(code)
    flags = [*SDAA, "--data", data, "--out", tmp_path / "run"]
    script(tmp_path / "stopping.py", ROOT, *flags, processes=2, ok=False)
    assert load_checkpoint(tmp_path / "run/last.pt")["iter"] in (2, 3)
    script("train.py", *flags, "--resume", processes=2)
    same_run(trained[0], tmp_path / "run")


def test_a_checkpoint_of_sdaa_scores_and_goes_on_elsewhere(script, trained, data, tmp_path):
    for device in ("sdaa", "cpu"):
        flags = ["--ckpt", trained[0] / "last.pt", "--data", data, "--device", device]
        assert "mIoU" in script("evaluate.py", *flags).stdout
    path = tmp_path / "run/last.pt"
    path.parent.mkdir()
    path.write_bytes((trained[0] / "last.pt").read_bytes())
    state = load_checkpoint(path)
    torch.save(state | {"iter": 2, "logged": 2}, path)
    flags = [*SDAA, "--device", "cpu", "--batch-size", 2, "--data", data, "--out", path.parent, "--resume"]
    done = script("train.py", *flags)
    assert "NOTE: device: cpu, before sdaa" in done.stdout
    torch.save(load_checkpoint(path) | {"iter": 2, "logged": 2}, path)
    flags = [*SDAA, "--batch-size", 2, "--data", data, "--out", path.parent, "--resume"]
    assert "NOTE: device: sdaa, before cpu" in script("train.py", *flags).stdout


def test_only_the_cards_that_are_visible_are_used(script, data, tmp_path, monkeypatch):
    monkeypatch.setenv("SDAA_VISIBLE_DEVICES", "0")
    done = script("train.py", *SDAA, "--data", data, "--out", tmp_path, processes=2, ok=False)
    assert "--device sdaa: process 1 of this host has no card: there are 1" in done.stderr
