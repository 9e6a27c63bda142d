"""What commands say: results on standard output, all else on standard error, as much of it as is asked for."""

import json
import logging
import os
from functools import partial

import pytest
from huggingface_hub import ModelCard

from castlora import commands
from castlora.cli import main
from castlora.config import Tuning
from castlora.demonstration import story


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What a command lets through, whose work is to say one thing of each importance."""
    heard: list[str] = []

    def talk(json: bool = False) -> None:
        """Talks."""
        logger = logging.getLogger("castlora")
        levels = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}
        heard.extend(name for name, level in levels.items() if logger.isEnabledFor(level))

    for name in ("TQDM_DISABLE", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "before")
    monkeypatch.setitem(commands.COMMANDS, "talk", talk)
    return heard


@pytest.fixture(autouse=True)
def level_afterwards():
    logger = logging.getLogger("castlora")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["talk"], ["info", "warning"]),
        (["-q", "talk"], ["warning"]),
        (["talk", "--quiet"], ["warning"]),
        (["--verbose", "talk"], ["debug", "info", "warning"]),
        (["talk", "-v", "--json", "true"], ["debug", "info", "warning"]),
        (["-v", "talk", "-v"], ["debug", "info", "warning"]),
    ],
)
def test_as_much_is_said_as_is_asked_for(said, arguments, expected):
    main(arguments)
    assert said == expected
    assert (os.environ["TQDM_DISABLE"] == "1") == ("-q" in arguments or "--quiet" in arguments)
    assert (os.environ["TRANSFORMERS_VERBOSITY"] == "info") == ("debug" in expected)


@pytest.mark.parametrize("arguments", [["-q", "-v", "talk"], ["-q", "talk", "--verbose"], ["talk", "-vq"]])
def test_quiet_and_verbose_contradict_each_other(said, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and said == []
    assert capsys.readouterr().err.startswith("castlora: --quiet and --verbose contradict each other;")


def test_a_file_of_settings_may_ask_for_quiet(said, tmp_path):
    (tmp_path / "quiet.yaml").write_text("quiet: true\n")
    main(["talk", "--config", str(tmp_path / "quiet.yaml")])
    assert said == ["warning"]


@pytest.mark.slow
def test_the_demo_prints_what_it_wrote(monkeypatch, capsys, tmp_path, checked_in_process, short_demo_skill):
    monkeypatch.setattr(story, "_STEPS", 2)
    monkeypatch.setattr(story, "demo_skill", lambda: short_demo_skill)
    monkeypatch.setattr(story, "Tuning", partial(Tuning, rehearsal_passages=8, rehearsal_tokens=12))
    main(["demo", "--out", str(tmp_path / "demo"), "--json", "true"])
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "demo" / "results.json").read_text())
    card = ModelCard.load(tmp_path / "demo" / "adapter" / "README.md")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["lift"] == record["lift"]["value"] and values["agreement"] > 0
    assert record["scores"]["retrained"]["score"] > 0.9 and record["transfer"]["recipe"]["steps"] == 2
