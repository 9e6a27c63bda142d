import os
import shlex
import subprocess
import sys

import numpy as np
import pytest

from castlora.cli import _underscored, parser
from castlora.publishing.manifest import command_line, peak_accelerator_bytes, peak_memory_bytes, versions

REQUEST = {
    "adapter": "owner/skill", "target": "owner/base", "source": None, "text": None, "prompt_format": None,
    "prompts": None, "recipe": "default", "start": None, "steps": 3, "batch_size": None, "seed": 7, "rank": None,
    "tuning": {"mse_weight": None, "passages": 20, "write_answers": False}, "out": "out",
}  # fmt: skip


@pytest.mark.parametrize(
    "prompt_format", ["Q: {text}\nA:", "### {text}", 'it\'s "{text}" \\ $HOME', "x" * 400 + "{text}"]
)
def test_the_command_repeats_the_run(prompt_format):
    words = shlex.split(command_line(REQUEST | {"prompt_format": prompt_format}))
    assert words[0] == "castlora"
    parsed = parser().parse_args([_underscored(word) for word in words[1:]])
    assert parsed.transfer.prompt_format == prompt_format
    assert (parsed.transfer.adapter, parsed.transfer.seed, parsed.transfer.steps) == ("owner/skill", 7, 3)
    assert (parsed.transfer.tuning.passages, parsed.transfer.tuning.write_answers) == (20, False)
    assert parsed.transfer.tuning.mse_weight is None


def test_several_processes_are_started_as_they_were():
    alone = command_line(REQUEST)
    assert command_line(REQUEST, processes=3) == f"torchrun --nproc-per-node 3 -m -- {alone}"


def test_the_command_hides_where_folders_lie(tmp_path):
    text = tmp_path / "text.txt"
    text.touch()
    command = command_line(REQUEST | {"adapter": str(tmp_path), "text": str(text)})
    assert f"--adapter {tmp_path.name} " in command
    assert "--text text.txt " in command
    assert str(tmp_path.parent) not in command


def test_versions_name_the_libraries_that_decide_results():
    assert versions().keys() >= {"castlora", "torch", "transformers", "peft"}
    assert all(versions().values())


def test_peak_memory_is_in_bytes():
    assert 30 << 20 < peak_memory_bytes() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count from the start of the process")
def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    taken = np.ones(40 << 20)
    code = "from castlora.publishing.manifest import peak_memory_bytes; print(peak_memory_bytes())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(told) < peak_memory_bytes() - taken.nbytes // 2


def test_without_an_accelerator_no_memory_of_one_is_known():
    assert peak_accelerator_bytes() is None
