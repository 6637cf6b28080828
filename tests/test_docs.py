"""Examples in docstrings run, and the READMEs name flags, files and class tables that exist."""

import contextlib
import doctest
import importlib
import io
import json
import pkgutil
import re
import runpy
import sys

import pytest
from conftest import ROOT

import ocrnet
from ocrnet.data import classes
from ocrnet.data.classes import ClassTable
from ocrnet.models import BACKBONES

READMES = [
    ROOT / "README.md",
    *sorted((ROOT / "ocrnet").rglob("README.md")),
    *sorted((ROOT / "tests").rglob("README.md")),
]
WITH_EXAMPLES = {
    "ocrnet.data.classes", "ocrnet.data.datasets", "ocrnet.metrics", "ocrnet.models.ocr", "ocrnet.losses",
    "ocrnet.logs",
}  # fmt: skip
# of torchrun, pip, find, pytest and git
OTHER_FLAGS = {
    "--depth", "--max-restarts", "--master-addr", "--master-port", "--nnodes", "--node-rank", "--nproc_per_node",
    "--rdzv-backend", "--rdzv-conf", "--rdzv-endpoint",
}  # fmt: skip


def test_examples_in_docstrings_give_what_they_show():
    results = {}
    for module in pkgutil.walk_packages(ocrnet.__path__, "ocrnet."):
        results[module.name] = doctest.testmod(importlib.import_module(module.name))
    assert not [name for name, result in results.items() if result.failed]
    assert {name for name, result in results.items() if result.attempted} >= WITH_EXAMPLES


def test_class_tables_shown_are_class_tables():
    shown = {}
    for path in (ROOT / "README.md",):
        if path.exists():
            blocks = re.findall(r"'JSON'\n(.*?)\nJSON", path.read_text(), re.DOTALL)
            shown.update({f"{path}, {i}": block for i, block in enumerate(blocks)})
    assert shown
    shown["classes.py"] = re.search(r"^    \[.*?^    \]", classes.__doc__, re.MULTILINE | re.DOTALL)[0]
    for where, block in shown.items():
        assert len(ClassTable.from_rows(json.loads(block), where)) >= 2


def scripts():
    """Every file with a command line: beside the README, and the tools below tests/."""
    tools = [path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith(("test_", "conftest"))]
    return [path for path in (*ROOT.glob("*.py"), *tools) if "_args()" in path.read_text()]


@pytest.fixture(scope="module")
def flags():
    """The flags that ``--help`` of the scripts lists."""
    found, backbones = set(), dict(BACKBONES)
    for path in scripts():
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
            patch.setattr(sys, "argv", [str(path), "--help"])
            patch.syspath_prepend(path.parent)
            with pytest.raises(SystemExit):
                runpy.run_path(str(path), run_name="__main__")
        found |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", output.getvalue()))
    BACKBONES.clear()  # exercises add to them
    BACKBONES.update(backbones)
    return found


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_mentioned_exist(path, flags):
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", path.read_text()))
    assert not mentioned - flags - OTHER_FLAGS


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_mentioned_exist(path):
    text = path.read_text()
    paths = set(re.findall(r"(?<![\w./-])((?:ocrnet|tests)/[\w./-]*\w)", text))
    assert not {name for name in paths if not (ROOT / name).exists()}
    names = set(re.findall(r"(?<![\w./-])(\w+\.py)\b", text))
    assert not names - {
        file.name for folder in (ROOT, ROOT / "ocrnet", ROOT / "tests") for file in folder.rglob("*.py")
    }
