"""The solutions of the exercises fit the code and have the effect that the exercises ask for."""

import ast
import json

import pytest
from conftest import RUN, entries, error_of
from exercises.ablation import EXERCISES, FOLDER

CHECK = """
import torch
from {name} import *
from ocrnet.models import OCRHead
torch.manual_seed(0)  # with other weights every ReLU may be off
head = OCRHead(region_in_channels=6, in_channels=6, num_classes=3, channels=8, key_channels=4).eval()
"""


@pytest.fixture
def check(script, tmp_path):
    """check(name, code): the value that ``code`` prints after importing a solution."""

    def call(name, code) -> list:
        path = tmp_path / "check.py"
        path.write_text(f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\n" + CHECK.format(name=name) + code)
        return ast.literal_eval(script(path).stdout)

    return call


def test_detached_regions_get_no_gradient_of_the_final_loss(check):
    code = """
features = torch.randn(2, 6, 4, 4)
head(features, features)[0].square().mean().backward()
print([head.region_head[-1].weight.grad is None, head.pixel_head[0].weight.grad.abs().sum().item()])
"""
    no_gradient, pixel_gradient = check("detach", code)
    assert no_gradient and pixel_gradient > 0


def test_the_gather_takes_the_mean_of_each_true_region(check):
    code = """
gathered = []
head.gather.register_forward_hook(lambda _, inputs, f: gathered.extend([inputs[0], f]))
OCRHead.label = torch.tensor([[[0, 255], [1, 1]]])
head(torch.randn(1, 6, 2, 2), torch.randn(1, 6, 2, 2))
print([x[0].flatten(1).tolist() for x in gathered])
"""
    x, f = check("ground_truth", code)  # (C, N) and (C, K)
    for pixels, regions in zip(x, f):
        means = [pixels[0], (pixels[2] + pixels[3]) / 2, sum(pixels) / 4]  # class 2 does not occur
        assert all(abs(found - mean) < 1e-5 for found, mean in zip(regions, means))


def test_with_the_true_relation_pixels_of_a_class_have_one_context(check):
    code = """
contexts = []
head.attention.register_forward_hook(lambda _, inputs, y: contexts.append(y))
OCRHead.label = torch.tensor([[[0, 2], [1, 1]]])
head(torch.randn(1, 6, 2, 2), torch.randn(1, 6, 2, 2))
y = contexts[0][0]
print([torch.equal(y[:, 1, 0], y[:, 1, 1]), torch.equal(y[:, 0, 0], y[:, 0, 1])])
"""
    assert check("upper_bound", code) == [True, False]


def test_each_image_is_evaluated_with_its_own_label(check, data):
    code = f"""
from pathlib import Path
from ocrnet.data.classes import CITYSCAPES
from ocrnet.data.datasets import EvalDataset, find_samples
from ocrnet.device import Accelerator
import evaluate
forward = lambda image: (torch.nn.functional.one_hot(OCRHead.label.long().clamp(max=18), 19).permute(0, 3, 1, 2),)
samples = EvalDataset(find_samples(Path({str(data)!r}), "val"), CITYSCAPES)
print(evaluate.evaluate(forward, samples, Accelerator("cpu"), 2)[0].pixel_accuracy())
"""
    assert check("ground_truth", code) == 1


@pytest.mark.parametrize("flag", ["--flip", "--images"])
def test_a_label_that_does_not_fit_the_input_is_refused(script, flag):
    done = script(FOLDER / "ground_truth.py", "evaluate", "--ckpt", "x.pt", flag, ok=False)
    assert error_of(done).startswith(f"error: {flag}: ")


def test_another_width_is_a_line(check):
    code = """
from ocrnet.models import build_model
print(list(build_model("hr9t").backbone.transition1[0][0].weight.shape))
"""
    assert check("width", code) == [9, 256, 3, 3]


def test_the_upper_bound_trains_and_is_evaluated(script, tmp_path, data):
    solution, folder = FOLDER / "upper_bound.py", tmp_path / "run"
    script(solution, *RUN, "--max-iters", 2, "--data-path", data, "--output-dir", folder)
    assert len(entries(folder / "log.jsonl")) == 3
    scores = tmp_path / "scores.json"
    script(solution, "evaluate", "--ckpt", folder / "last.pt", "--data-path", data, "--device", "cpu", "--json", scores)
    assert json.loads(scores.read_text())["mIoU"] == entries(folder / "log.jsonl")[-1]["mIoU"]


def test_only_ocr_brings_a_distant_pixel_to_the_local_backbone(check):
    code = """
from ocrnet.models import build_model
changes = []
for head in ("fcn", "ocr"):
    model = build_model("local", num_classes=4, head=head).eval()
    image = torch.randn(1, 3, 96, 160, requires_grad=True)
    model(image)[0][0, :, 48, 120].sum().backward()
    reached = image.grad.abs().sum((0, 1)) > 0  # (H, W)
    changes.append([reached[48, 119].item(), reached[:, :90].any().item()])
print(changes)
"""
    assert check("context", code) == [[True, False], [True, True]]


def test_the_class_of_the_discs_is_that_of_the_lamp(check, tmp_path):
    code = f"""
from pathlib import Path
import context
context.SPLITS = {{"train": 6, "val": 2}}
context.write_discs(Path({str(tmp_path)!r}))
from ocrnet.data.classes import read_classes
from ocrnet.data.datasets import EvalDataset
root, seen = Path({str(tmp_path)!r}), []
for image, label in EvalDataset(find_samples(root, "train"), read_classes(root)):
    red, green, blue = image[:, label == 1].float().mean(1)
    seen.append([(green > red).item(), label.unique().tolist()])
print(seen)
"""
    seen = check("context", code)
    assert all(classes == ([0, 1, 2] if green else [0, 1, 3]) for green, classes in seen)
    assert len({green for green, _ in seen}) == 2


def test_every_solution_is_measured():
    solutions = {path.stem for path in FOLDER.glob("*.py")} - {"ablation", "context", "solution"}
    assert set(EXERCISES) == {"ocr", "fcn", *solutions}  # these two are flags alone
