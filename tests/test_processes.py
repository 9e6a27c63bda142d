"""Several processes do together what one does; where it matters what a launcher does, torchrun starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from in_processes import parts, write_parts
from preloaded import Started, finish, launched, run_castlora
from safetensors.torch import load_file

from castlora import UserError, pipeline, transfer
from castlora.cli import main
from castlora.config import Tuning
from castlora.execution import launcher, processes
from castlora.execution.launcher import environment_of_its_own, wait_for_turn
from castlora.execution.processes import share_of_batch

TESTS = Path(__file__).parent
STATE = ".castlora"


def torchrun(count: int, *words: object) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*start, *map(str, words)]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_statistics_and_gradients_are_those_of_one_process(base_model, tmp_path, count):
    models = base_model("llama"), base_model("gpt2")
    out = tmp_path / "parts.safetensors"
    finish(launched(tmp_path / "said", count, write_parts, *models, out))
    together, alone = load_file(out), parts(*models)
    assert together.keys() == alone.keys()
    for name, expected in alone.items():
        # Gradients are sums in single precision, statistics in double.
        tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-4
        difference = (together[name] - expected).abs().max()
        assert difference <= tolerance * expected.abs().max(), name
    assert sum(tensor.dtype == torch.float64 for tensor in alone.values()) > 100


@pytest.fixture(scope="module")
def request_words(base_model, adapter, prompts_file):
    """The words of a transfer between tiny models, to some folder."""

    def words(out: Path) -> list[str]:
        places = {"adapter": adapter("llama"), "target": base_model("gpt2"), "prompts": prompts_file, "out": out}
        numbers = {"steps": 40, "batch-size": 6, "tuning.max-length": 60, "tuning.answer-tokens": 6}
        numbers |= {"tuning.rehearsal-passages": 8, "tuning.rehearsal-tokens": 12}
        return ["transfer", *(word for key, value in (places | numbers).items() for word in (f"--{key}", str(value)))]

    return words


@pytest.fixture(scope="module")
def undisturbed(request_words, tmp_path_factory):
    """What three processes print and write."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    started = launched(out.parent / "said", 3, run_castlora, *request_words(out), "--json", "true")
    finish(started)
    return started, out


@pytest.mark.slow
def test_three_processes_train_what_one_trains(
    undisturbed, base_model, adapter, prompts_file, tmp_path, checked_in_process
):
    _, out = undisturbed
    tuning = Tuning(max_length=60, answer_tokens=6, rehearsal_passages=8, rehearsal_tokens=12)
    alone = transfer(
        str(adapter("llama")), str(base_model("gpt2")), str(tmp_path / "alone"),
        prompts=str(prompts_file), steps=40, batch_size=6, tuning=tuning,
    )  # fmt: skip
    together = json.loads((out / "castlora.json").read_text())
    assert (together["processes"], alone.manifest["processes"]) == (3, 1)
    assert together["losses"] == pytest.approx(alone.manifest["losses"], rel=1e-4)
    log = json.loads((out / "report.json").read_text())["log"]
    assert [entry["step"] for entry in log] == [entry["step"] for entry in alone.log]
    for mine, expected in zip(log[1:], alone.log[1:], strict=True):
        for part in ("loss", "kl", "chunk", "grad_norm", "learning_rate"):
            assert mine[part] == pytest.approx(expected[part], rel=1e-4, abs=1e-6), part
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (out, alone.folder)]
    for name, expected in weights[1].items():
        assert (weights[0][name] - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.slow
def test_a_last_layer_that_one_process_solves_is_trained_by_all(request_words, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    options = ["--start", "readout", "--steps", "12"]
    finish([Started(tmp_path / "said alone", run_castlora, *request_words(alone), *options)])
    finish(launched(tmp_path / "said together", 2, run_castlora, *request_words(together), *options))
    expected, found = (json.loads((out / "castlora.json").read_text()) for out in (alone, together))
    assert found["last_layer"]["losses"] == pytest.approx(expected["last_layer"]["losses"], rel=1e-3)
    assert min(expected["last_layer"]["losses"][1:]) < 0.95 * expected["last_layer"]["losses"][0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-2)


@pytest.mark.slow
def test_one_process_speaks_and_writes_for_all(undisturbed):
    started, out = undisturbed
    assert [bool(process.stdout) for process in started] == [True, False, False]
    assert json.loads(started[0].stdout) == json.loads((out / "castlora.json").read_text())
    complaints = "".join(process.stderr for process in started)
    assert complaints.count("Held-out KL to source + LoRA") == complaints.count("Wrote ") == 1
    assert "Traceback" not in complaints
    assert not (out / STATE).exists()


@pytest.mark.slow
def test_a_run_of_which_one_process_was_killed_goes_on_to_the_same_bytes(undisturbed, request_words, tmp_path):
    out = tmp_path / "out"
    command = torchrun(3, "-m", "castlora", *request_words(out))
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while running.poll() is None and not list(out.glob(f"{STATE}/checkpoints/checkpoint-*/sealed.json")):
        time.sleep(0.01)
    (victim,) = [child for child in psutil.Process(running.pid).children() if child.environ().get("RANK") == "1"]
    victim.send_signal(signal.SIGKILL)
    _, complaints = running.communicate()
    assert running.returncode == 1 and "Signal 9 (SIGKILL)" in complaints
    assert "reducer.cpp" not in complaints
    assert [path.name for path in out.iterdir()] == [STATE]

    resumed = launched(tmp_path / "said", 3, run_castlora, *request_words(out), "-v")
    finish(resumed)
    assert "Training goes on from step" in resumed[0].stderr
    names = [sorted(path.name for path in folder.iterdir()) for folder in (out, undisturbed[1])]
    assert names[0] == names[1]
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (out, undisturbed[1])]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_several_targets_are_moved_to_one_after_the_other_by_all(undisturbed, request_words, base_model, tmp_path):
    out = tmp_path / "moved"
    words = [*request_words(out), "--target", str(base_model("mistral")), "--json", "true"]
    started = launched(tmp_path / "said", 3, run_castlora, *words)
    finish(started)
    assert sorted(path.name for path in out.iterdir()) == ["comparison.html", "gpt2", "mistral", "taught.jsonl"]
    written = [json.loads((out / name / "castlora.json").read_text()) for name in ("gpt2", "mistral")]
    assert [manifest["processes"] for manifest in written] == [3, 3]
    assert list(json.loads(started[0].stdout).values()) == written
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (out / "gpt2", undisturbed[1])]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_bad_input_that_one_process_finds_is_said_once_and_ends_all(request_words, tmp_path):
    finished = run(torchrun(2, TESTS / "in_processes.py", *request_words(tmp_path / "out")))
    # torchrun has its own sentences about processes that failed.
    assert [line for line in finished.stderr.splitlines() if line.startswith("castlora: ")] == [
        "castlora: Adapter 'nowhere' is not a folder; give the folder that PEFT saved, or a hub id."
    ]
    # It ends with 1 itself whatever a process ends with, and says which.
    assert finished.returncode == 1 and "exitcode  : 2 " in finished.stderr
    assert "RuntimeError" not in finished.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_bad_input_that_all_processes_find_ends_each(request_words, tmp_path):
    words = request_words(tmp_path / "out")
    words[words.index("--batch-size") + 1] = "5"
    for process in launched(tmp_path / "said", 2, run_castlora, *words):
        assert process.exit_code == 2
        assert "castlora: batch_size is 5, which 2 processes cannot share equally; give a multiple of 2.\n" in (
            process.stderr
        )
    assert not (tmp_path / "out").exists()


@pytest.fixture
def as_process(monkeypatch):
    """Lets this process be one of two, without the other; the list holds the seconds that it waits."""

    def become(index: int) -> list[float]:
        for name, value in {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "WARNING")
        waited: list[float] = []
        monkeypatch.setattr(launcher.time, "sleep", waited.append)
        return waited

    return become


def test_who_has_most_to_say_speaks_first(as_process):
    assert as_process(0) == [] and wait_for_turn(found_bad_input=True) is None
    turns = []
    for index, found_bad_input in ((0, True), (1, True), (0, False), (1, False)):
        waited = as_process(index)
        wait_for_turn(found_bad_input)
        turns.append(sum(waited))
    assert turns[0] == 0 < turns[1] < turns[2] == turns[3]


def test_one_process_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(launcher.time, "sleep", lambda _seconds: pytest.fail("it waited"))
    wait_for_turn(found_bad_input=True)
    wait_for_turn(found_bad_input=False)


def test_a_process_that_is_to_work_alone_does_not_join(as_process):
    as_process(1)
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} & environment_of_its_own().keys()
    assert environment_of_its_own()["PATH"] == os.environ["PATH"]


def test_a_command_that_several_processes_cannot_share_is_refused(as_process, tmp_path, capsys):
    as_process(0)
    with pytest.raises(SystemExit) as caught:
        main(["teach", "--adapter", "any", "--out", str(tmp_path / "taught.jsonl")])
    assert caught.value.code == 2
    complaint = "castlora teach runs in one process; start it without torchrun or accelerate launch, or give --sharded"
    assert complaint in capsys.readouterr().err


def test_an_unknown_option_is_complained_of_by_turns(as_process, capsys):
    waited = as_process(1)
    with pytest.raises(SystemExit):
        main(["transfer", "--adapterr", "any"])
    assert waited == [launcher._TURN]


def test_a_defect_is_shown_when_others_have_had_their_say(as_process, monkeypatch):
    waited = as_process(0)
    monkeypatch.setattr(pipeline, "transfer", lambda *_arguments, **_settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["transfer", "--adapter", "any", "--target", "any", "--out", "any"])
    assert waited == [2 * launcher._TURN]


def test_a_batch_is_shared_equally_or_not_at_all(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(processes, "PartialState", lambda **_settings: pytest.fail("it joined the others"))
    assert share_of_batch(12) == 4
    with pytest.raises(UserError, match="batch_size is 16, which 3 processes cannot share equally; give a multiple"):
        share_of_batch(16)
