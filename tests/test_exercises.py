"""The README's exercises can be solved: the solutions still fit the code, and do what they are for."""

import shutil
import subprocess
import sys

import pytest
from ablation import EXERCISES, ROOT, solve
from conftest import RUN, entries

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="solutions are diffs, which git applies")


def run_there(folder, *command) -> str:
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def test_detached_regions_hear_nothing_of_the_final_loss(tmp_path):
    solve("detach", tmp_path)
    check = """
import torch
from ocrnet.models import OCRHead
head = OCRHead(in_channels=6, region_in_channels=6, region_channels=6, num_classes=3, channels=8, key_channels=4)
features = torch.randn(2, 6, 4, 4)
head(features, features)[0].square().mean().backward()
print(head.region_head[-1].weight.grad, head.pixel_head[0].weight.grad.abs().sum() > 0)
"""
    assert run_there(tmp_path, "-c", check) == "None tensor(True)\n"


def test_true_regions_train_and_the_gather_takes_each_classs_mean(tmp_path, data):
    solve("ground_truth", tmp_path)
    run_there(tmp_path, "train.py", *RUN, "--iters", 2, "--data", data, "--out", tmp_path / "run")
    assert len(entries(tmp_path / "run/log.jsonl")) == 3
    check = """
import torch
from ocrnet.models import OCRHead
head = OCRHead(in_channels=6, region_in_channels=6, region_channels=6, num_classes=3, channels=8, key_channels=4)
x, head.label = torch.randn(1, 8, 2, 2), torch.tensor([[[0, 255], [1, 1]]])
f = head.gather(x, head.true_regions(torch.randn(1, 3, 2, 2)))[0, :, :, 0].T
print(torch.allclose(f[0], x[0, :, 0, 0]), torch.allclose(f[1], x[0, :, 1].mean(1), atol=1e-6))
"""
    assert run_there(tmp_path, "-c", check) == "True True\n"


def test_with_the_true_relation_pixels_of_a_class_have_one_context(tmp_path):
    solve("upper_bound", tmp_path)
    check = """
import torch
from ocrnet.models import OCRHead
head = OCRHead(in_channels=6, region_in_channels=6, region_channels=6, num_classes=3, channels=8, key_channels=4).eval()
x, head.label = torch.randn(1, 8, 2, 2), torch.tensor([[[0, 2], [1, 1]]])
regions = head.true_regions(torch.randn(1, 3, 2, 2))
y = head.attention(x, head.gather(x, regions), regions)[0]
print(torch.allclose(y[:, 1, 0], y[:, 1, 1]), torch.allclose(y[:, 0, 0], y[:, 0, 1]))
"""
    assert run_there(tmp_path, "-c", check) == "True False\n"


def test_another_width_is_a_line(tmp_path):
    solve("width", tmp_path)
    check = "from ocrnet.models import build_model; print(build_model('hr9s').backbone.transition1[0][0].weight.shape)"
    assert run_there(tmp_path, "-c", check) == "torch.Size([9, 256, 3, 3])\n"


def test_what_is_measured_is_what_there_are_solutions_of():
    solutions = {path.stem for path in (ROOT / "tests/exercises").iterdir()}
    assert set(EXERCISES) == {"ocr", "fcn", *solutions}  # these two are flags alone
