"""Models that take turns on an accelerator, while the others wait in the machine's memory."""

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary


class Offloading:
    """Moves models, and copies weights that no training changes to the machine's memory once at most."""

    def __init__(self) -> None:
        self._in_memory: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def move(self, model: nn.Module, device: torch.device) -> None:
        """Has all tensors of a model on a device.

        Weights without gradients must not have changed since they were moved before.
        """
        for weight in model.parameters():
            # Quantized weights are of other types, and hold more than their own numbers.
            if weight.requires_grad or type(weight) is not nn.Parameter or weight.device.type == device.type:
                continue
            if device.type != "cpu":
                self._in_memory[weight] = weight.data
            elif weight in self._in_memory:
                weight.data = self._in_memory[weight]
        model.to(device)
