"""Loads an adapter into vLLM or SGLang and compares what the engine predicts with PEFT. Needs a GPU and the engine.

    python tests/gpu_engines.py --engine vllm --base mistralai/Mistral-7B-v0.1 --adapter my-lora-mistral

For each prompt the engine gives the likeliest next tokens with their log-probabilities. PEFT, in the same precision,
must give each of them the same one, up to a tolerance far below what the adapter changes. Exit code 1 otherwise.
"""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from castlora.adapters.portable import check_portable, describe

Engine = Literal["vllm", "sglang"]
Precision = Literal["float32", "bfloat16", "float16"]
NextTokens = dict[int, float]
"""Token id → log-probability, in nats, for the likeliest tokens after one prompt."""
TOP = 20
PROMPTS = (
    "Question: Where does the river run?\nAnswer:",
    "The capital of France is",
    "def add(a, b):\n    return",
    "Once upon a time there was a fox who",
)


def from_vllm(
    base: str, adapter: str, rank: int, prompts: Sequence[list[int]], precision: Precision
) -> list[NextTokens]:
    """What vLLM predicts with the adapter."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        base, dtype=precision, enable_lora=True, max_lora_rank=rank, max_logprobs=TOP, max_model_len=512,
        enforce_eager=True, gpu_memory_utilization=0.5,
    )  # fmt: skip
    answers = engine.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        SamplingParams(temperature=0.0, max_tokens=1, logprobs=TOP),
        lora_request=LoRARequest("transferred", 1, str(Path(adapter).absolute())),
    )
    return [{token: entry.logprob for token, entry in answer.outputs[0].logprobs[0].items()} for answer in answers]


def from_sglang(
    base: str, adapter: str, rank: int, prompts: Sequence[list[int]], precision: Precision
) -> list[NextTokens]:
    """What SGLang predicts with the adapter."""
    import sglang

    engine = sglang.Engine(
        model_path=base, dtype=precision, lora_paths={"transferred": str(Path(adapter).absolute())},
        max_loras_per_batch=1, max_lora_rank=rank, disable_cuda_graph=True, context_length=512, mem_fraction_static=0.5,
    )  # fmt: skip
    answers = engine.generate(
        input_ids=[list(ids) for ids in prompts],
        sampling_params={"temperature": 0.0, "max_new_tokens": 1},
        lora_path=["transferred"] * len(prompts),
        return_logprob=True,
        top_logprobs_num=TOP,
    )
    engine.shutdown()
    return [
        {token: log_probability for log_probability, token, *_ in answer["meta_info"]["output_top_logprobs"][0]}
        for answer in answers
    ]


ENGINES: dict[Engine, Callable[..., list[NextTokens]]] = {"vllm": from_vllm, "sglang": from_sglang}


@torch.no_grad()
def from_peft(
    base: str, adapter: str, prompts: Sequence[list[int]], precision: Precision
) -> tuple[torch.Tensor, torch.Tensor]:
    """What PEFT predicts with the adapter, and without it: two tensors of shape (prompts, vocabulary), in nats."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, precision)).to(device)
    adapted = PeftModel.from_pretrained(model, adapter).eval()

    with_adapter = _predict(adapted, prompts)
    with adapted.disable_adapter():
        without = _predict(adapted, prompts)
    # The engine wants the memory.
    del model, adapted
    gc.collect()
    torch.cuda.empty_cache()
    return with_adapter, without


def _predict(model: PeftModel, prompts: Sequence[list[int]]) -> torch.Tensor:
    rows = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1] for ids in prompts]
    return torch.stack(rows).float().log_softmax(-1).cpu()


def largest_difference(found: Sequence[NextTokens], expected: torch.Tensor) -> float:
    """Largest difference of log-probabilities over the tokens that the engine reports, in nats.

    Raises:
        ValueError: the engine reports nothing for a prompt.
    """
    if len(found) != len(expected) or not all(found):
        raise ValueError("The engine reports no log-probabilities for some prompt.")
    return max(
        abs(log_probability - float(row[token]))
        for tokens, row in zip(found, expected, strict=True)
        for token, log_probability in tokens.items()
    )


def main(
    engine: Engine, base: str, adapter: str, precision: Precision = "bfloat16", tolerance: float | None = None
) -> None:
    """Compares an engine with PEFT.

    Args:
        engine: vllm or sglang
        base: base model of the adapter, a folder or a hub id
        adapter: folder that castlora wrote
        precision: of the weights and of the arithmetic
        tolerance: largest difference accepted, in nats; by default 0.01 in float32 and 0.25 in half precision
    """
    tolerance = tolerance or (0.01 if precision == "float32" else 0.25)
    broken = check_portable(adapter)
    if broken:
        raise SystemExit(describe(broken))
    rank = PeftConfig.from_pretrained(adapter).r
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    with_adapter, without = from_peft(base, adapter, prompts, precision)
    found = ENGINES[engine](base, adapter, rank, prompts, precision)
    difference = largest_difference(found, with_adapter)
    effect = largest_difference(found, without)
    print(f"{engine} and PEFT differ by {difference:.4f} nats at most; without the adapter by {effect:.4f}.")
    if difference > tolerance or effect < 4 * tolerance:
        raise SystemExit("The engine does not compute what PEFT computes, or the adapter changes too little to tell.")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
