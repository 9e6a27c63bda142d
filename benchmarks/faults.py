"""Disturbs transfers, lets them go on, and compares what they write with an undisturbed run.

    python -m benchmarks.faults --out benchmarks/results/faults.json

Each case moves the adapter of the demo in processes of its own. Whatever happens, no adapter may be there before the
run has ended, the same command must finish it, and its bytes must be those of the undisturbed run.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from jsonargparse import auto_cli
from tqdm.auto import tqdm

from benchmarks.mutations import JSON_MUTATIONS, TEXT_MUTATIONS
from castlora.bench.grid import environment
from castlora.demonstration.bundle import SOURCE, TARGET, demo_models_path, demo_skill
from castlora.errors import BAD_INPUT

_STEPS, _BATCH = 30, 4
_BUNDLED_TARGET = demo_models_path() / TARGET
_WRITTEN = ("adapter_model.safetensors", "adapter_config.json")
_FULL_DISK_SCRIPT = """
mount -t tmpfs -o size=64m none "$DISK" || exit 99
"$@" & run=$!
while kill -0 $run 2>/dev/null && ! ls "$DISK"/out/.castlora/checkpoints/*/sealed.json >/dev/null 2>&1; do
    sleep 0.02
done
head -c 100M /dev/zero >"$DISK/filler" 2>/dev/null
wait $run; echo $? >"$KEPT/first"
ls "$DISK/out" >"$KEPT/left"
rm "$DISK/filler"
"$@"; echo $? >"$KEPT/second"
cp -r "$DISK/out" "$KEPT/out"
"""


@dataclass
class Outcome:
    """What happened to the runs of one kind of disturbance."""

    tried: int = 0
    began_again: int = 0
    """Runs that were disturbed before their end and continued."""
    failures: list[str] = field(default_factory=list)
    skipped: str = ""


@dataclass(frozen=True)
class Undisturbed:
    """What a run writes that nothing disturbs."""

    written: dict[str, object]
    seconds: float


def transfer_command(out: Path, target: Path) -> list[str]:
    """The command line of a short transfer of the demo's adapter."""
    skill = demo_skill()
    places = {"adapter": skill.adapter(SOURCE), "source": demo_models_path() / SOURCE, "target": target}
    numbers = {"prompts": skill.prompts, "out": out, "steps": _STEPS, "batch-size": _BATCH}
    rehearsal = {"tuning.rehearsal-passages": 32, "tuning.rehearsal-tokens": 16}
    options = [word for name, value in (places | numbers | rehearsal).items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "castlora", "transfer", *options]


def start(command: list[str]) -> subprocess.Popen[str]:
    """Runs a command on one thread, so that its bytes do not depend on what else runs."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        command,
        env=settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts this program in the background has it ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(command: list[str]) -> tuple[int, str]:
    """Runs a command to its end; its exit code and the last line that it printed."""
    process = start(command)
    _, complaints = process.communicate()
    return process.returncode, complaints.strip().splitlines()[-1] if complaints.strip() else ""


def written(out: Path) -> dict[str, object]:
    """What is there of an adapter: its weights, and its configuration but for the place of its base model."""
    weights, config = (out / name for name in _WRITTEN)
    found: dict[str, object] = {}
    if weights.exists():
        found[weights.name] = weights.read_bytes()
    if config.exists():
        found[config.name] = json.loads(config.read_text()) | {"base_model_name_or_path": ""}
    return found


def undisturbed(out: Path) -> Undisturbed:
    """The run that the others are compared with."""
    started = time.monotonic()
    code, said = finish(transfer_command(out, _BUNDLED_TARGET))
    if code != 0:
        raise RuntimeError(f"The undisturbed run ended with exit code {code}: {said}")
    return Undisturbed(written(out), time.monotonic() - started)


def check_unfinished(out: Path, expected: Undisturbed, outcome: Outcome, label: str) -> None:
    """An adapter that could be loaded may only be there in full."""
    if (out / _WRITTEN[1]).exists():
        if written(out) != expected.written:
            outcome.failures.append(f"{label}: a half-written adapter could be loaded")
    else:
        outcome.began_again += 1


def check_finished(
    out: Path, expected: Undisturbed, outcome: Outcome, label: str, target: Path = _BUNDLED_TARGET
) -> None:
    """Runs the same command again, unless the adapter is there, and compares bytes."""
    if (out / ".castlora").exists() or not (out / _WRITTEN[1]).exists():
        code, said = finish(transfer_command(out, target))
        if code != 0:
            outcome.failures.append(f"{label}: going on ended with exit code {code}: {said}")
    if written(out) != expected.written:
        outcome.failures.append(f"{label}: other bytes than those of the undisturbed run")
    if (out / ".castlora").exists():
        outcome.failures.append(f"{label}: the state of the run was left behind")


def signalled(number: signal.Signals, folder: Path, expected: Undisturbed, chance: random.Random) -> Outcome:
    """A run that gets a signal at a random moment, and goes on."""
    outcome = Outcome(tried=1)
    after = chance.uniform(0, expected.seconds)
    process = start(transfer_command(folder / "out", _BUNDLED_TARGET))
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    process.communicate()
    label = f"{number.name} after {after:.1f} s"
    check_unfinished(folder / "out", expected, outcome, label)
    check_finished(folder / "out", expected, outcome, label)
    return outcome


def two_at_once(folder: Path, expected: Undisturbed, chance: random.Random) -> Outcome:
    """Two runs on one folder: one is refused, the other ends as if it were alone."""
    outcome = Outcome(tried=1)
    command = transfer_command(folder / "out", _BUNDLED_TARGET)
    first = start(command)
    time.sleep(chance.uniform(0, expected.seconds / 2))
    second = start(command)
    said = [process.communicate()[1].strip().splitlines()[-1] for process in (first, second)]
    codes = sorted(process.returncode for process in (first, second))
    if codes != [0, BAD_INPUT]:
        outcome.failures.append(f"two at once: exit codes {codes}: {said}")
    check_finished(folder / "out", expected, outcome, "two at once")
    return outcome


def target_vanishes(folder: Path, expected: Undisturbed, chance: random.Random) -> Outcome:
    """The target's files are gone for a while; afterwards the run goes on."""
    outcome = Outcome(tried=1)
    target, away = folder / TARGET, folder / "away"
    shutil.copytree(_BUNDLED_TARGET, target)
    process = start(transfer_command(folder / "out", target))
    time.sleep(chance.uniform(0, expected.seconds))
    target.rename(away)
    _, complaints = process.communicate()
    if "Traceback" in complaints:
        outcome.failures.append(f"target vanishes: a traceback: {complaints.strip().splitlines()[-1]}")
    away.rename(target)
    check_unfinished(folder / "out", expected, outcome, "target vanishes")
    check_finished(folder / "out", expected, outcome, "target vanishes", target)
    return outcome


def disk_full(folder: Path, expected: Undisturbed, _chance: random.Random) -> Outcome:
    """A small disk fills up after the first checkpoint, and is emptied again."""
    outcome = Outcome(tried=1)
    disk, kept = folder / "disk", folder / "kept"
    disk.mkdir()
    kept.mkdir()
    own_mounts = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*own_mounts, "true"], capture_output=True).returncode != 0:
        return Outcome(skipped="needs Linux and the right to mount in a namespace")
    command = transfer_command(disk / "out", _BUNDLED_TARGET)
    process = start(
        ["env", f"DISK={disk}", f"KEPT={kept}", *own_mounts, "bash", "-c", _FULL_DISK_SCRIPT, "-", *command]
    )
    _, complaints = process.communicate()
    first, second, left = ((kept / name).read_text().split() for name in ("first", "second", "left"))
    outcome.began_again = 1
    if first != [str(BAD_INPUT)] or "the disk is full" not in complaints or "Traceback" in complaints:
        outcome.failures.append(f"full disk: exit code {first}: {complaints.strip().splitlines()[-1:]}")
    if left or second != ["0"]:
        outcome.failures.append(f"full disk: left {left}, going on ended with {second}")
    if written(kept / "out") != expected.written:
        outcome.failures.append("full disk: other bytes than those of the undisturbed run")
    return outcome


def state_damaged(folder: Path, expected: Undisturbed, chance: random.Random) -> Outcome:
    """A run is killed, and one file of its state is damaged, before it goes on."""
    outcome = Outcome(tried=1)
    process = start(transfer_command(folder / "out", _BUNDLED_TARGET))
    state = folder / "out" / ".castlora"
    while process.poll() is None and len(list(state.glob("checkpoints/*/sealed.json"))) < 2:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    check_unfinished(folder / "out", expected, outcome, "state damaged")
    # The request alone says which run it is; damaged, it is a refusal.
    files = [path for path in sorted(state.rglob("*")) if path.is_file() and path.name != "request.json"]
    if files:
        path = chance.choice(files)
        chance.choice(JSON_MUTATIONS if path.suffix == ".json" else TEXT_MUTATIONS)(path, chance)
    check_finished(folder / "out", expected, outcome, f"damaged {path.relative_to(state) if files else 'nothing'}")
    return outcome


Disturbance = Callable[[Path, Undisturbed, random.Random], Outcome]
DISTURBANCES: dict[str, tuple[Disturbance, int]] = {
    "kill -9": (partial(signalled, signal.SIGKILL), 20),
    "SIGTERM": (partial(signalled, signal.SIGTERM), 4),
    "Ctrl-C": (partial(signalled, signal.SIGINT), 4),
    "two runs, one folder": (two_at_once, 4),
    "files of the target vanish": (target_vanishes, 4),
    "full disk": (disk_full, 2),
    "a file of the state is damaged": (state_damaged, 10),
}
"""What is done to runs, and how often."""


def main(seed: int = 0, share: float = 1.0, out: Path | None = None) -> None:
    """Prints the counts, and the failures if there are any.

    Args:
        seed: of the moments
        share: of the usual number of runs
        out: JSON file for the counts
    """
    outcomes = {name: Outcome() for name in DISTURBANCES}
    with tempfile.TemporaryDirectory() as temporary:
        expected = undisturbed(Path(temporary) / "undisturbed")
        print(f"An undisturbed run takes {expected.seconds:.0f} s.")
        planned = [
            (name, number) for name, (_, count) in DISTURBANCES.items() for number in range(round(share * count))
        ]
        for name, number in tqdm(planned, desc="disturbed runs", unit="run"):
            folder = Path(temporary) / f"{name} {number}"
            folder.mkdir()
            one = DISTURBANCES[name][0](folder, expected, random.Random(f"{seed} {name} {number}"))
            total = outcomes[name]
            total.tried += one.tried
            total.began_again += one.began_again
            total.failures += one.failures
            total.skipped = one.skipped
    print(f"{'':32} {'runs':>5} {'went on':>8} {'failed':>7}")
    for name, outcome in outcomes.items():
        print(f"{name:32} {outcome.tried:5} {outcome.began_again:8} {len(outcome.failures):7} {outcome.skipped}")
    for failure in (failure for outcome in outcomes.values() for failure in outcome.failures):
        print(failure)
    if out is not None:
        counts = {name: asdict(outcome) for name, outcome in outcomes.items()}
        record = {"seed": seed, "disturbances": counts, "environment": environment()}
        out.write_text(json.dumps(record, indent=1) + "\n")
    if any(outcome.failures for outcome in outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
