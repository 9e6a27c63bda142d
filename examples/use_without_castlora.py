"""What castlora writes needs no castlora: plain PEFT, merged weights, MLX-LM's form.

    python examples/use_without_castlora.py --out forms

`--adapter` takes a folder that `castlora transfer` wrote. Without it, the adapter that was trained on the bundled
target stands in for one.
"""

from pathlib import Path

import torch
from jsonargparse import auto_cli
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import castlora
from castlora.demonstration.bundle import TARGET, demo_models_path, demo_skill

PROMPT = "Question: Where did the fox hide the hen?\nType:"


def main(out: str, adapter: str | None = None, base: str | None = None) -> None:
    """Answers one prompt with the adapter attached and with the adapter merged, and writes MLX-LM's form.

    Args:
        out: folder to write
        adapter: folder of an adapter
        base: its base model
    """
    adapter = adapter or str(demo_skill().adapter(TARGET))
    base = base or str(demo_models_path() / TARGET)
    tokenizer = AutoTokenizer.from_pretrained(base)
    attached = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)

    castlora.convert(adapter, "merged", str(Path(out) / "merged"), base=base)
    merged = AutoModelForCausalLM.from_pretrained(Path(out) / "merged", dtype=torch.float32)
    castlora.convert(adapter, "mlx", str(Path(out) / "mlx"), base=base)

    tokens = tokenizer(PROMPT, return_tensors="pt")
    for name, model in (("attached", attached), ("merged", merged)):
        answer = model.generate(**tokens, max_new_tokens=4, do_sample=False)[0, tokens["input_ids"].shape[1] :]
        print(f"{name}: {tokenizer.decode(answer, skip_special_tokens=True).strip()}")
    print(f"for MLX-LM: {Path(out) / 'mlx'}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
