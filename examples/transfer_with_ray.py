"""Many adapters onto many targets with Ray: each adapter answers its prompts once, for all of its targets.

    pip install 'castlora[ray]'
    python examples/transfer_with_ray.py --out moved

Without a list it moves the two adapters of the bundled models, each onto the other model. A list has a line of JSON per
adapter: a name for its files, its targets, and whatever `castlora.teach` is to be told of it:

    {"name": "topics", "adapter": "my-lora", "prompts": "topics.txt", "targets": ["mistralai/Mistral-7B-v0.1"]}

A task that is lost with its machine is started again by Ray, and castlora continues where it was; called again, the
script does the same.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

import castlora
from castlora.demonstration.bundle import SOURCE, TARGET, demo_models_path, demo_skill

_RETRIES = 3


def main(out: str, adapters: str | None = None, steps: int = 1000, cpus: float = 1, gpus: float = 0) -> None:
    """Moves every adapter of a list onto its targets, and prints how often each then answers as source + LoRA does.

    Args:
        out: folder for what is made; what is finished in it stays as it is
        adapters: file of JSON lines, one adapter each
        steps: optimizer steps of each transfer
        cpus: processors that each task takes
        gpus: accelerators that each task takes

    Raises:
        SystemExit: with 1, at the end, if a transfer has failed.
    """
    # Ray reads this when it is imported; otherwise it reports to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    listed = list(map(json.loads, Path(adapters).read_text("utf-8").splitlines())) if adapters else bundled_adapters()
    Path(out).mkdir(parents=True, exist_ok=True)
    ray.init(include_dashboard=False, log_to_driver=False)
    as_task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)
    teach, move = as_task(teach_once), as_task(move_once)
    moved = {}
    for entry in listed:
        name, targets, asked = entry.pop("name"), entry.pop("targets"), entry
        taught = teach.remote(asked, str(Path(out) / f"{name}.jsonl"))
        for target in targets:
            folder = str(Path(out) / f"{name}-on-{Path(target).name}")
            moved[folder] = move.remote(asked["adapter"], asked.get("source"), taught, target, folder, steps)
    failed = [folder for folder, same in moved.items() if not _told(folder, same)]
    ray.shutdown()
    if failed:
        sys.exit(1)


def _told(folder: str, same: Any) -> bool:
    """Waits for a transfer and prints what came of it; whether it was well."""
    import ray

    try:
        print(f"{folder}: {ray.get(same):.3f} of the answers are those of source + LoRA", flush=True)
    except ray.exceptions.RayError as error:
        print(f"{folder}: {getattr(error, 'cause', error)}", file=sys.stderr)
        return False
    return True


def teach_once(asked: dict[str, Any], out: str) -> str:
    """Writes what source + LoRA answers, unless it is written; the file."""
    if not Path(out).exists():
        castlora.teach(**asked, out=out)
    return out


def move_once(adapter: str, source: str | None, taught: str, target: str, out: str, steps: int) -> float:
    """Moves an adapter onto one target, unless it is there; the share of answers that are those of source + LoRA."""
    if not (Path(out) / "adapter_config.json").exists():
        castlora.transfer(adapter, target, out, source=source, taught=taught, steps=steps)
    manifest = json.loads((Path(out) / "castlora.json").read_text("utf-8"))
    return float(manifest["answers"]["same_after"])


def bundled_adapters() -> list[dict[str, Any]]:
    """The adapters of the bundled models, each for the other one."""
    models, skill = demo_models_path(), demo_skill()
    return [
        {
            "name": f"{skill.name}-of-{source}",
            "adapter": str(skill.adapter(source)),
            "source": str(models / source),
            "prompts": str(skill.prompts),
            "targets": [str(models / target)],
        }
        for source, target in ((SOURCE, TARGET), (TARGET, SOURCE))
    ]


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
