"""What the documentation says is so: examples in docstrings, the README's shapes and folders, every --help."""

import doctest
import importlib
import json
import pkgutil
import re

import pytest
import torch
from conftest import ROOT

import ocrnet
from ocrnet.data import classes
from ocrnet.data.classes import ClassTable
from ocrnet.models import build_model

README = (ROOT / "README.md").read_text()


def test_examples_in_docstrings_give_what_they_say():
    results = {}
    for module in pkgutil.walk_packages(ocrnet.__path__, "ocrnet."):
        results[module.name] = doctest.testmod(importlib.import_module(module.name))
    assert not [name for name, result in results.items() if result.failed]
    assert {name for name, result in results.items() if result.attempted} >= {
        "ocrnet.models.ocr", "ocrnet.metrics", "ocrnet.losses", "ocrnet.data.classes", "ocrnet.data.cityscapes"
    }  # fmt: skip


def test_the_readmes_tree_is_the_repositorys():
    tree = README.split("## What is where")[1].split("```")[1]
    named = set(re.findall(r"(\S+\.py)\b", tree))
    files = [*ROOT.glob("*.py"), *(path for path in (ROOT / "ocrnet").rglob("*.py") if path.name != "__init__.py")]
    files += [path for path in (ROOT / "tests").glob("*.py") if not path.name.startswith(("test_", "conftest"))]
    assert named == {path.name for path in files}


def test_the_class_tables_that_are_shown_are_tables():
    shown = README.split("```json")[1].split("```")[0]
    table = ClassTable.from_rows(json.loads(shown), "README.md")
    assert table.names == ["road", "house"] and len(table.labels) == 4
    rows = re.search(r"^    \[.*?^    \]", classes.__doc__, re.MULTILINE | re.DOTALL)[0]
    assert ClassTable.from_rows(json.loads(rows), "classes.py").labels == table.labels


def test_the_readmes_shapes_are_the_networks():
    shapes = {}
    model = build_model("hr18").eval()
    with torch.inference_mode():
        for name, module in model.named_modules():
            module.register_forward_hook(lambda _, inputs, output, name=name: shapes.update({name: output}))
        model(torch.zeros(1, 3, 512, 1024))
        attention = model.head.attention
        x, f = shapes["head.pixel_head"], shapes["head.gather"]
        w = attention.relation(x, f)
        m = model.head.gather.weights(shapes["head.region_head"])
    found = {
        "logits": shapes[""][0],
        "features": shapes["backbone"][0],
        "M": shapes["head.region_head"],
        "x": x,
        "m": m,
        "f": f,
        "w": w,
        "y": shapes["head.attention"],
    }
    table = README.split("## How to read the code")[1].split("\n## ")[0]
    for name, tensor in found.items():
        assert f"{name} (B, {', '.join(map(str, tensor.shape[1:]))})" in table, name


@pytest.mark.parametrize("name", ["train", "evaluate", "plot_curve", "prepare_cityscapes"])
def test_help_is_one_screen(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        importlib.import_module(name).main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 120
