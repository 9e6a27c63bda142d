import subprocess
import sys

import pytest

from castlora.cli import main
from castlora.config import DEFAULT, PAPER


@pytest.mark.parametrize("arguments", [["--help"], ["transfer", "--help"], ["--version"]])
def test_help_comes_without_the_heavy_libraries(arguments):
    script = (
        "import sys, castlora.cli\n"
        "try:\n    castlora.cli.main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print(*{'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    finished = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert finished.stderr.split() == []
    assert "castlora" in finished.stdout


@pytest.mark.parametrize("command", ["transfer", "teach"])
def test_help_shows_the_number_of_the_recipe_where_none_is_given(command, capsys):
    shown = help_of(command, capsys)
    assert (
        f"kept; fewer are faster (type: int | null, default: {DEFAULT.candidates}; of the paper's recipe: 1)" in shown
    )
    assert f"tokenizer that needs more (type: int | null, default: {DEFAULT.max_length})" in shown
    assert "default: null" in shown
    assert "default: null" not in shown.rpartition("--tuning CONFIG")[2]


def test_help_names_the_steps_of_a_recipe_and_no_start(capsys):
    shown = help_of("transfer", capsys)
    assert f"instead of the recipe's (type: int | null, default: {DEFAULT.batch_size})" in shown
    assert f"(type: float | null, default: {DEFAULT.temperature}; of the paper's recipe: {PAPER.temperature})" in shown
    assert "else ridge (type: Optional[Literal['paper', 'ridge', 'readout', 'fresh']], default: null)" in shown


def help_of(command: str, capsys) -> str:
    """What `castlora COMMAND --help` prints, on one line."""
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    return " ".join(capsys.readouterr().out.split())
