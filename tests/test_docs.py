"""Examples in docstrings run, and the READMEs name flags and files that exist."""

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

READMES = [ROOT / "README.md", *sorted((ROOT / "tests").rglob("README.md"))]
WITH_EXAMPLES = {"data.classes", "data.datasets", "metrics", "models.ocr", "losses", "logs"}
OTHER_FLAGS = {"--depth", "--master-addr", "--max-restarts", "--nnodes", "--node-rank", "--nproc_per_node"}
TOOLS = ("benchmark/bench.py", "exercises/ablation.py", "exercises/context.py", "mmsegmentation/make_reference.py")
SCRIPTS = [*ROOT.glob("*.py"), *(ROOT / "tests" / name for name in TOOLS)]


def test_examples_in_docstrings_give_what_they_show():
    names = [module.name for module in pkgutil.walk_packages(ocrnet.__path__, "ocrnet.")]
    results = {name.removeprefix("ocrnet."): doctest.testmod(importlib.import_module(name)) for name in names}
    assert not [name for name, result in results.items() if result.failed]
    assert {name for name, result in results.items() if result.attempted} >= WITH_EXAMPLES


def test_class_tables_shown_are_class_tables():
    readme = re.search(r"'JSON'\n(.*?)\nJSON", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    docstring = re.search(r"^    \[.*?^    \]", classes.__doc__, re.MULTILINE | re.DOTALL)[0]
    for shown in (readme, docstring):
        assert len(ClassTable.from_rows(json.loads(shown), "shown")) >= 2


@pytest.fixture(scope="module")
def flags():
    """The flags that ``--help`` of the scripts lists."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for path in SCRIPTS:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
                patch.setattr(sys, "argv", [str(path), "--help"])
                patch.syspath_prepend(path.parent)
                patch.setitem(BACKBONES, "local", None)  # context.py adds it; it goes with the patch
                runpy.run_path(str(path), run_name="__main__")
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", output.getvalue()))


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_and_files_mentioned_exist(path, flags):
    text = path.read_text()
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - flags - OTHER_FLAGS  # of git and torchrun
    paths = re.findall(r"(?<![\w./-])((?:ocrnet|tests)/[\w./-]*\w)", text)
    assert not [name for name in paths if not (ROOT / name).exists()]
    scripts = set(re.findall(r"(?<![\w./-])(\w+\.py)\b", text))
    files = [*ROOT.glob("*.py"), *ROOT.glob("ocrnet/**/*.py"), *ROOT.glob("tests/**/*.py")]
    assert not scripts - {file.name for file in files}
