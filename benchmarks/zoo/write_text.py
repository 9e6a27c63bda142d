"""Lets a base model write the general text of the demo, so that the package carries nobody's corpus.

python -m benchmarks.zoo.write_text --model ZOO/models/llama-s --out src/castlora/demonstration/text.jsonl.gz
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from jsonargparse import auto_cli
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from castlora.models.loading import load_model

BATCH_SIZE = 64
LENGTH = 240
TEMPERATURE = 0.9


@torch.no_grad()
def write_documents(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, count: int) -> Iterator[str]:
    """Texts sampled from the beginning-of-text token on; the last, unfinished sentence is cut off."""
    written = 0
    while written < count:
        start = torch.full((BATCH_SIZE, 1), tokenizer.bos_token_id)
        sampled = model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            max_new_tokens=LENGTH,
            pad_token_id=tokenizer.eos_token_id,
        )
        for text in tokenizer.batch_decode(sampled, skip_special_tokens=True):
            whole = " ".join(text[: text.rfind(".") + 1].split())
            if len(whole) > LENGTH and written < count:
                written += 1
                yield whole


def main(model: Path, out: Path, documents: int = 500, seed: int = 0) -> None:
    """Writes JSON lines with `text`, gzipped without a time stamp, so that the same seed gives the same bytes.

    Args:
        model: folder of the base model
        out: file to write
        documents: how many texts
        seed: of the sampling
    """
    torch.manual_seed(seed)
    base, tokenizer = load_model(str(model))
    lines = [json.dumps({"text": text}) for text in write_documents(base, tokenizer, documents)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n", mtime=0))
    print(f"{out}: {len(lines)} texts, {out.stat().st_size} bytes")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
