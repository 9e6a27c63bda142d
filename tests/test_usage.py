"""What the command line says about its options."""

from dataclasses import fields

import pytest

from castlora.cli import main
from castlora.config import TextTuning, Tuning


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("", "missing one of transfer,teach,evaluate,inspect,check, ...; see castlora --help."),
        ("inspect", "missing --adapter, --target; see castlora inspect --help."),
        ("report --out x", "missing RUN; see castlora report --help."),
        ("check", "missing FOLDER; see castlora check --help."),
        ("bench", "missing one of quality,speed; see castlora bench --help."),
        ("bench quality --batch-size 2", "missing --out; see castlora bench quality --help."),
        ("evaluate --model a --task b --json", "--json needs a value; see castlora evaluate --help."),
    ],
)
def test_what_is_missing_is_named_as_it_is_typed(typed, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(typed.split())
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"castlora: {expected}\n"


def test_each_setting_is_explained(capsys):
    with pytest.raises(SystemExit):
        main(["transfer", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    for field in fields(Tuning):
        option = f"--tuning.{field.name.replace('_', '-')} "
        explanation = help_text.split(option)[-1].split("(type:")[0]
        assert len(explanation.split()) > 4, option


def test_teaching_offers_what_it_reads_alone(capsys):
    with pytest.raises(SystemExit):
        main(["teach", "--help"])
    offered = {
        word.removeprefix("--tuning.") for word in capsys.readouterr().out.split() if word.startswith("--tuning.")
    }
    assert offered == {field.name.replace("_", "-") for field in fields(TextTuning)}
