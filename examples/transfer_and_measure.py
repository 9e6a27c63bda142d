"""Moves a LoRA from a Llama to a Mistral with another tokenizer, and measures how much of the skill arrives.

    python examples/transfer_and_measure.py --out my-first-transfer

300 steps, as in `castlora demo`, bring nearly all of it; the 100 of this example bring less.
"""

from pathlib import Path

from jsonargparse import auto_cli

import castlora
from castlora.demonstration.bundle import SOURCE, TARGET, demo_models_path, demo_skill


def main(out: str, steps: int = 100) -> None:
    """Transfers, scores three models, and prints the lift.

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
        out=out,
    )
    bare = castlora.evaluate(model=target, task=task)["score"]
    transferred = castlora.evaluate(model=target, adapter=out, task=task)["score"]
    retrained = castlora.evaluate(model=target, adapter=str(skill.adapter(TARGET)), task=task)["score"]
    print(f"bare target {bare:.3f}, transferred {transferred:.3f}, retrained {retrained:.3f}")
    print(f"lift {(transferred - bare) / (retrained - bare):.2f}")
    losses = result.manifest["losses"]
    print(f"held-out KL divergence {losses['kl_before']:.2f} → {losses['kl_after']:.2f} nats")
    print(f"report: {Path(out) / 'report.html'}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
