"""What commands leave on the machine beside what they were asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOKEN = "hf_" + "Secret" * 6


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def machine(base_model, adapter, prompts_file, tmp_path):
    """A place where everything lies that commands may read or write, and a way to run them there in turn."""
    for name, path in (("target", base_model("gpt2")), ("source", base_model("llama")), ("adapter", adapter("llama"))):
        (tmp_path / name).mkdir()
        for file in path.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "prompts.txt").write_bytes(prompts_file.read_bytes())
    (tmp_path / "temporary").mkdir()
    places = {"HOME": "home", "TMPDIR": "temporary", "HF_HOME": "home/huggingface", "XDG_CACHE_HOME": "home/cache"}
    settings = {
        **os.environ, **{name: str(tmp_path / place) for name, place in places.items()},
        "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip

    def run(*commands: str) -> str:
        script = "import sys, castlora.cli\nfor words in sys.argv[1:]:\n    castlora.cli.main(words.split())"
        typed = [sys.executable, "-c", script, *commands]
        done = subprocess.run(typed, cwd=tmp_path, env=settings, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    return tmp_path, run


@pytest.mark.slow
def test_nothing_is_written_beside_out_and_the_token_nowhere(machine):
    folder, run = machine
    before = contents(folder)
    said = run(
        "transfer --adapter adapter --source source --target target --prompts prompts.txt --steps 3 "
        "--batch-size 4 --tuning.max-length 60 --tuning.answer-tokens 6 --tuning.rehearsal-passages 8 "
        "--tuning.rehearsal-tokens 12 --out moved --verbose",
        "convert --adapter adapter --base source --to merged --out merged",
        "inspect --adapter adapter --source source --target target",
    )
    after = contents(folder)
    written = {name for name in after if after[name] != before.get(name)}
    assert {name.partition(os.sep)[0] for name in written} == {"moved", "merged"}
    assert before.keys() <= after.keys()
    assert TOKEN not in said
    assert not any(TOKEN.encode() in content for content in after.values())
