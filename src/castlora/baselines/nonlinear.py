"""Nonlinear maps, which the abstract of CAST, arXiv 2510.17902, speaks of while its equations are linear.

Each map gets a small network beside it. The result folds into no LoRA: it runs live, inside PEFT's layers.
"""

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn

from castlora.adapters.factors import LowRank
from castlora.adapters.live import ADAPTER_NAME, lora_layer
from castlora.maps.starts import Maps
from castlora.models.modules import Rows
from castlora.models.pairing import Pairing

NETWORK_WIDTH = 32
"""Hidden units of each network; the paper names no size."""


class ResidualMap(nn.Module):
    """x → M x + W₂ gelu(W₁ x); W₂ starts at zero, so that training starts from the linear map M."""

    def __init__(self, linear: Tensor, width: int) -> None:
        super().__init__()
        d_out, d_in = linear.shape
        self.linear = nn.Parameter(linear.clone())
        self.widen = nn.Linear(d_in, width)
        self.narrow = nn.Linear(width, d_out)
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, activations: Tensor) -> Tensor:
        """Shape (..., d_in) → (..., d_out)."""
        correction: Tensor = self.narrow(nn.functional.gelu(self.widen(activations)))
        return activations @ self.linear.T + correction


class NonlinearA(nn.Module):
    """Stands for a target's `lora_A`: target activations, mapped to the source's, then the frozen A of every branch."""

    weight: Tensor

    def __init__(self, lora_as: Sequence[Tensor], maps: Sequence[Tensor], width: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(ResidualMap(one_map, width) for one_map in maps)
        # PEFT reads the type of `weight`, so the branches' matrices lie in one tensor of that name.
        self.register_buffer("weight", torch.block_diag(*lora_as), persistent=False)

    def forward(self, activations: Tensor) -> Tensor:
        """Shape (..., d_target_in) → (..., Σ r_i)."""
        in_source_space = torch.cat([one_map(activations) for one_map in self.maps], dim=-1)
        return in_source_space @ self.weight.T


class NonlinearB(nn.Module):
    """Stands for a target's `lora_B`: the frozen B of every branch, and its update mapped to rows of the target."""

    weight: Tensor

    def __init__(
        self, lora_bs: Sequence[Tensor], maps: Sequence[Tensor], target_rows: Sequence[Rows], d_out: int, width: int
    ) -> None:
        super().__init__()
        self.maps = nn.ModuleList(ResidualMap(one_map, width) for one_map in maps)
        self.outputs = [b.shape[0] for b in lora_bs]
        self.target_rows = tuple(target_rows)
        self.d_out = d_out
        self.register_buffer("weight", torch.block_diag(*lora_bs), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """Shape (..., Σ r_i) → (..., d_target_out)."""
        update = codes.new_zeros(*codes.shape[:-1], self.d_out)
        source_updates = (codes @ self.weight.T).split(self.outputs, dim=-1)
        for one_map, source_update, rows in zip(self.maps, source_updates, self.target_rows, strict=True):
            update[..., rows] = one_map(source_update)
        return update


def attach_networks(
    student: PeftModel, pairing: Pairing, factors: Mapping[str, LowRank], maps: Maps, width: int = NETWORK_WIDTH
) -> None:
    """Puts nonlinear maps around the frozen source factors into the student's LoRA layers.

    Args:
        student: the target with a fresh LoRA on the paired modules
        pairing: which modules belong together
        factors: the source adapter, by module
        maps: the linear maps to start from
        width: hidden units of each network
    """
    device = next(student.parameters()).device
    for pair in pairing.mapped:
        layer = lora_layer(student, pair.target.name)
        of_pair = [maps[pair.target.name, index] for index in range(len(pair.branches))]
        source_as = [factors[branch.source_module].a for branch in pair.branches]
        source_bs = [factors[branch.source_module].b[branch.source_rows] for branch in pair.branches]
        rows = [branch.target_rows for branch in pair.branches]
        to_source = NonlinearA(source_as, [one.to_source for one in of_pair], width)
        from_source = NonlinearB(source_bs, [one.from_source for one in of_pair], rows, pair.target.d_out, width)
        layer.lora_A[ADAPTER_NAME] = to_source.to(device)
        layer.lora_B[ADAPTER_NAME] = from_source.to(device)
