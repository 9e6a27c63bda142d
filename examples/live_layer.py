"""The layer of the paper, live and folded: the same numbers, at the cost of a plain LoRA.

    python examples/live_layer.py

CAST, arXiv 2510.17902, eq. 1-3: delta = map_from_source · B · A · map_to_source · h_target.
"""

import torch

from castlora import CastLayer
from castlora.adapters.factors import LowRank

SOURCE_WIDTH, TARGET_WIDTH, RANK, TOKENS = 128, 160, 8, 5


def main() -> None:
    """Compares the update that a layer adds with that of the LoRA that it folds into."""
    torch.manual_seed(0)
    source_lora = LowRank(a=torch.randn(RANK, SOURCE_WIDTH), b=torch.randn(SOURCE_WIDTH, RANK))
    layer = CastLayer(
        source_lora,
        map_to_source=torch.randn(SOURCE_WIDTH, TARGET_WIDTH) / TARGET_WIDTH**0.5,
        map_from_source=torch.randn(TARGET_WIDTH, SOURCE_WIDTH) / SOURCE_WIDTH**0.5,
    )
    target_activations = torch.randn(TOKENS, TARGET_WIDTH)
    live = layer(target_activations).detach()
    folded = layer.fold()
    plain = target_activations @ folded.a.T @ folded.b.T
    print(f"trained numbers: {sum(parameter.numel() for parameter in layer.parameters()):,}")
    print(f"numbers of the LoRA: {folded.a.numel() + folded.b.numel():,}, rank {folded.rank}")
    print(f"largest difference: {(live - plain).abs().max() / live.abs().max():.1e} of the largest update")
    torch.testing.assert_close(live, plain, rtol=1e-4, atol=1e-3)


if __name__ == "__main__":
    main()
