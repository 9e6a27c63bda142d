"""Moves a LoRA from a Llama to a Mistral with another tokenizer, and measures how much of the skill arrives.

    python examples/transfer_and_measure.py --out my-first-transfer

300 steps, as in `castlora demo`, bring nearly all of it; the 100 of this example bring less.
"""

from pathlib import Path

from jsonargparse import auto_cli

import castlora
from castlora.demonstration.bundle import SOURCE, TARGET, demo_models_path, demo_skill


def main(out: str, steps: int = 100) -> None:
    """Transfers, scores the target along the way and three models at the end, and prints the lift.

    Args:
        out: folder for the adapter, new or empty
        steps: optimizer steps
    """
    skill = demo_skill()
    target, task = str(demo_models_path() / TARGET), str(skill.task)
    result = castlora.transfer(
        adapter=str(skill.adapter(SOURCE)),
        source=str(demo_models_path() / SOURCE),
        target=target,
        prompts=str(skill.prompts),
        steps=steps,
        task=task,
        out=out,
    )
    measured = castlora.evaluate(
        model=target, adapter=out, task=task, retrained=str(skill.adapter(TARGET)), record=True
    )
    print(", ".join(f"{name} {found['score']:.3f}" for name, found in measured["scores"].items()))
    print(f"lift {measured['lift']['value']:.2f}")
    by_step = [f"{entry['step']}: {entry['task_score']:.2f}" for entry in result.log if "task_score" in entry]
    print(f"accuracy by step  {'  '.join(by_step)}")
    losses = result.manifest["losses"]
    print(f"held-out KL divergence {losses['kl_before']:.2f} → {losses['kl_after']:.2f} nats")
    print(f"report: {Path(out) / 'report.html'}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
