"""The repository's own promises: documented commands, pinned versions, clean files."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import castlora

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "castlora"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME_REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]
REQUIREMENTS = RUNTIME_REQUIREMENTS + [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]

DEMO_COMMAND = "pip install -c constraints.txt -e . && castlora demo"
TEST_COMMAND = "pip install -c constraints.txt -e '.[dev]' && pytest"
MAX_LINES = 400

MACHINE_PATH = re.compile(r"(?<![\w.\-*}])/(?:work|root|tmp)\b")
REGISTRY_HOST = re.compile(r"\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|conda\.anaconda\.org)\b")


def python_files() -> Iterator[Path]:
    for folder in ("src", "benchmarks", "examples", "tests"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def tracked_texts() -> dict[str, str]:
    """Text of every file that git tracks or would add, by path."""
    listing = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    texts = {}
    for name in filter(None, listing.stdout.split("\0")):
        try:
            texts[name] = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
    return texts


def pinned_versions() -> dict[str, Version]:
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    return {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in pins}


def test_readme_starts_with_the_demo_and_the_test_command():
    blocks = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks[:2] == [f"{DEMO_COMMAND}\n", f"{TEST_COMMAND}\n"]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_constraints_pin_every_requirement_within_its_bounds(requirement: Requirement):
    assert requirement.specifier.contains(pinned_versions()[canonicalize_name(requirement.name)])


def test_requirements_set_floors_and_no_caps():
    assert [str(r) for r in REQUIREMENTS if not all(s.operator == ">=" for s in r.specifier) or not r.specifier] == []


def test_package_imports_only_declared_requirements():
    distributions = packages_distributions()
    declared = {canonicalize_name(requirement.name) for requirement in RUNTIME_REQUIREMENTS}
    undeclared = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in PACKAGE.rglob("*.py")
        for module in imported_top_level_modules(path)
        if module not in sys.stdlib_module_names | {"castlora"}
        and (declared | extras_of(path)).isdisjoint(canonicalize_name(name) for name in distributions[module])
    }
    assert undeclared == set()


def extras_of(path: Path) -> set[str]:
    """What a file may import that the user installs on request."""
    extras = {"bench/harness.py": "lm-eval", "models/loading.py": "quantized"}
    extra = extras.get(path.relative_to(PACKAGE).as_posix())
    lines = PROJECT["optional-dependencies"][extra] if extra else []
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imported_top_level_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_HOST], ids=["machine path", "registry host"])
def test_no_file_names_a_machine_path_or_a_registry_host(pattern: re.Pattern[str]):
    texts = tracked_texts()
    assert "pyproject.toml" in texts
    found = {
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in texts.items()
        if name != "tests/test_project.py"
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    }
    assert found == set()


@pytest.mark.parametrize("line", ["see /tmp/x", 'Path("/root")', "--out=/work/a", "file:///tmp"])
def test_machine_path_pattern_matches(line: str):
    assert MACHINE_PATH.search(line)


@pytest.mark.parametrize("line", ["src/tmp/x", "https://a.example/work", "$scratch/root", "/rooted", "network/x"])
def test_machine_path_pattern_leaves_other_paths_alone(line: str):
    assert not MACHINE_PATH.search(line)


def test_source_files_stay_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    assert {name: lines for name, lines in lengths.items() if lines >= MAX_LINES} == {}


def test_importing_the_command_line_leaves_the_heavy_libraries_alone():
    script = "import sys, castlora.cli; print(*{'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == []


def test_version_is_the_same_everywhere():
    latest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert latest is not None
    assert (latest.group(1), citation["version"]) == (castlora.__version__, castlora.__version__)
