"""The order of the package: what each part may import, from the ground up."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "castlora"
LAYERS = """
    errors
    config finite
    execution
    text
    alignment
    models
    adapters
    plan
    model_pair
    teaching
    distillation
    maps
    lift
    report
    evaluation
    baselines
    publishing
    scoring stages
    reading inspection steering bridge
    pipeline
    several
    demonstration
    bench
    commands
    cli
    __main__
""".split("\n")[1:-1]
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer.split()}
PARTS = sorted(path.stem for path in PACKAGE.iterdir() if path.name not in {"__init__.py", "__pycache__", "py.typed"})


def imported_parts(part: str) -> set[str]:
    """Parts of the package that the files of one of them import, inside functions too."""
    place = PACKAGE / part
    imported: list[str] = []
    for path in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported += [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} imports relatively"
                imported += [f"{node.module}.{name.name}" for name in node.names]
    return {name.split(".")[1] for name in imported if name.startswith("castlora.")} & set(PARTS) - {part}


def test_every_part_has_its_layer():
    assert sorted(HEIGHT) == PARTS


@pytest.mark.parametrize("part", PARTS)
def test_no_part_imports_what_stands_above_it_or_beside_it(part):
    assert {name for name in imported_parts(part) if HEIGHT[name] >= HEIGHT[part]} == set()
