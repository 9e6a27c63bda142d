"""Proof that what was written is what was trained: a fresh process loads it and its logits are compared."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from castlora.adapters.files import WEIGHTS_FILE
from castlora.config import Bits
from castlora.errors import BAD_INPUT, UserError
from castlora.execution.launcher import environment_of_its_own
from castlora.models.loading import best_device, load_model, load_spread

_TOLERANCE, _ROUNDINGS = 1e-4, 4


def tolerance(dtype: torch.dtype, bits: Bits | None = None, roundings: float = 0.0) -> float:
    """Largest accepted difference of logits, relative to the largest logit: a few times what roundings make.

    Args:
        dtype: of the model; one rounding of a 16-bit number is already much
        bits: of a weight, where weights are quantized. Where they have 8 bits, so have the activations that they are
            multiplied with; those of 4 bits are unpacked
        roundings: what `rounding_difference` finds: in a deep model they add up
    """
    return max(_TOLERANCE, _ROUNDINGS * max(torch.finfo(dtype).eps if bits != 8 else 2**-7, roundings))


@torch.no_grad()
def live_logits(student: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the model in memory, shape (batch, tokens, vocabulary), zero where padded."""
    logits: Tensor = student(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits * mask.unsqueeze(-1)


def rounding_difference(student: nn.Module, ids: Tensor, mask: Tensor, live: Tensor) -> float:
    """How far logits of one model lie apart that is given passages one by one and together.

    Both are right: sums are taken in another order, and each is rounded.

    Args:
        student: the model in memory
        ids: token ids, shape (batch, tokens)
        mask: attention mask, shape (batch, tokens)
        live: its logits for the whole batch, shape (batch, tokens, vocabulary)

    Returns:
        the largest difference relative to the largest logit
    """
    alone = [live_logits(student, *one) for one in zip(ids.split(1), mask.split(1), strict=True)]
    return _relative(torch.cat(alone), live)


def check_written(
    adapter: Path,
    target: str,
    revision: str | None,
    ids: Tensor,
    mask: Tensor,
    live: Tensor,
    roundings: float = 0.0,
    bits: Bits | None = None,
    is_spread: bool = False,
) -> float:
    """Loads the adapter in a fresh process and compares its logits with the live model's.

    Args:
        adapter: the folder that was written
        target: the base model it is for
        revision: of the base model
        ids: token ids, shape (batch, tokens)
        mask: attention mask, shape (batch, tokens)
        live: logits of the model in memory for these ids, shape (batch, tokens, vocabulary), in its dtype
        roundings: how much they make, by `rounding_difference`
        bits: of a weight of the base model's layers, where they are quantized
        is_spread: whether the base model takes more than one accelerator

    Returns:
        the largest difference relative to the largest logit

    Raises:
        UserError: the base model cannot be read any more.
        RuntimeError: the difference is above `tolerance`, or the adapter could not be loaded.
    """
    loading = {"target": target, "revision": revision, "bits": bits, "is_spread": is_spread}
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.safetensors"
        save_file({"ids": ids, "mask": mask, "logits": live.float().contiguous()}, reference)
        arguments = json.dumps({"adapter": str(adapter), **loading})
        finished = subprocess.run(
            [sys.executable, "-m", "castlora.evaluation.verification", arguments, str(reference)],
            capture_output=True,
            text=True,
            check=False,
            env=environment_of_its_own(),
        )
    if finished.returncode == BAD_INPUT:
        raise UserError(finished.stderr.strip().splitlines()[-1])
    if finished.returncode != 0:
        raise RuntimeError(f"The written adapter cannot be loaded again: {finished.stderr.strip()[-500:]}")
    difference = float(json.loads(finished.stdout.strip().splitlines()[-1])["relative_difference"])
    accepted = tolerance(live.dtype, bits, roundings)
    if not difference <= accepted:
        raise RuntimeError(
            f"The written adapter's logits differ from the trained model's by {difference:.2e}, above {accepted:.0e}."
        )
    return difference


@torch.no_grad()
def _relative_difference(
    adapter: str, target: str, revision: str | None, bits: Bits | None, is_spread: bool, reference: Path
) -> float:
    expected = load_file(reference)
    device = best_device()
    base = load_spread(target, revision) if is_spread else load_model(target, revision, device, bits)[0]
    model = PeftModel.from_pretrained(base, adapter)
    written = load_file(Path(adapter) / WEIGHTS_FILE)
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    differing = written.keys() ^ loaded.keys() or {
        key for key, weights in written.items() if not torch.equal(loaded[key].cpu(), weights)
    }
    if differing:
        raise RuntimeError(f"{WEIGHTS_FILE} and the model disagree on {min(differing)!r}.")
    logits = live_logits(model, expected["ids"].to(device), expected["mask"].to(device)).cpu()
    return _relative(logits, expected["logits"])


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.abs().max())


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    try:
        print(json.dumps({"relative_difference": _relative_difference(**request, reference=Path(sys.argv[2]))}))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(BAD_INPUT)
