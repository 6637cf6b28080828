"""torch.export: the README's example, which also shows that the graph has no breaks; TorchScript."""

import os
import subprocess
import sys
import warnings

import torch

from ocrnet.models import build_model


def test_an_exported_program_runs_at_other_sizes_without_this_repository(tmp_path):
    torch.manual_seed(0)
    model = build_model("tiny", num_classes=5).eval()
    rows, columns = (32 * torch.export.Dim(name, min=2, max=64) for name in ("rows", "columns"))
    shapes = ({0: torch.export.Dim("batch"), 2: rows, 3: columns},)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    images = [torch.randn(1, 3, 64, 96), torch.randn(3, 3, 96, 160)]
    with torch.no_grad():
        torch.save([(x, model(x)) for x in images], tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "program = torch.export.load('model.pt2').module()\n"
        "for x, expected in torch.load('expected.pt'):\n"
        "    for y, z in zip(program(x), expected, strict=True):\n"
        "        torch.testing.assert_close(y, z)\n"
        "assert 'ocrnet' not in sys.modules"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_traced_model_has_the_same_logits_at_other_sizes():
    torch.manual_seed(0)
    model = build_model("tiny", num_classes=5).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch 2.14 recommends torch.export instead
        traced = torch.jit.trace(model, torch.randn(2, 3, 64, 96))
        for shape in ((2, 3, 64, 96), (1, 3, 96, 160)):  # multiples of 32
            image = torch.randn(shape)
            for found, expected in zip(traced(image), model(image), strict=True):
                assert torch.equal(found, expected)
