"""What the documentation shows is so: its examples run, and its reference is the help of the commands."""

import doctest
import importlib.util
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from castlora.bench.commands import BENCHMARKS
from castlora.commands import COMMANDS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "module",
    "adapters.portable distillation.objective evaluation.similarity inspection lift maps.cast_layer maps.solvers "
    "publishing.licences".split(),
)
def test_the_examples_of_docstrings_run(module):
    failed, attempted = doctest.testmod(import_module(f"castlora.{module}"))
    assert failed == 0 and attempted > 0


@pytest.fixture
def hooks(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (path,) = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["hooks"]
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_holds_the_help_of_every_command(hooks, capsys):
    pages = {name: SimpleNamespace(file=SimpleNamespace(src_uri=name)) for name in (hooks.PAGE, "index.md")}
    reference = hooks.on_page_markdown("# Commands", page=pages[hooks.PAGE])
    assert hooks.on_page_markdown("# Home", page=pages["index.md"]) == "# Home"
    headings = [line for line in reference.splitlines() if line.startswith("## ")]
    assert headings == [f"## castlora {name}" for name in (*COMMANDS, *(f"bench {name}" for name in BENCHMARKS))]
    assert "--prompt-format" in reference and "--tuning.kl-weight" in reference
    assert reference.count("usage: castlora [options] ") == len(headings)
    assert (ROOT / "docs" / hooks.PAGE).is_file() and capsys.readouterr().out == ""
