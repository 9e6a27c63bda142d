"""Decoder layers of which each process holds a part, put together while they are read (FSDP2 of torch).

All processes must read the same layers in the same order. Where the main process works alone, it says which layer it is
about to read, and the others hand over their parts of it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.distributed import ProcessGroup, broadcast, get_world_size, new_group
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

_NO_MORE = -1


class _Sharded:
    """The layers in parts, by numbers that are the same in all processes, and how these hear of each other."""

    def __init__(self) -> None:
        self.layers: WeakValueDictionary[int, FSDPModule] = WeakValueDictionary()
        self.count = 0
        self.group: ProcessGroup | None = None
        """Between processors, where a number is said without waiting for an accelerator; None before `join`."""
        self.mesh: DeviceMesh | None = None
        """Between the devices that hold the parts."""
        self.is_led = False
        """Whether this is the main process, and works alone."""

    def say(self, number: int) -> int:
        """What the main process says to all."""
        said = torch.tensor(number)
        broadcast(said, src=0, group=self.group)
        return int(said)


_SHARDED = _Sharded()


def join(device: torch.device, longest_wait: timedelta) -> None:
    """Lets the processes hold layers together; all of them have to call this at once.

    Args:
        device: of this process, where layers are read
        longest_wait: between two layers that the main process reads alone
    """
    if _SHARDED.group is None:
        _SHARDED.group = new_group(backend="gloo", timeout=longest_wait)
        _SHARDED.mesh = init_device_mesh(device.type, (get_world_size(),))


def shard(model: nn.Module, layers: Iterable[str]) -> None:
    """Leaves this process its part of the weights of some layers; all processes have to call this, after `join`.

    What is trained later inside the layers, such as a LoRA, stays whole.

    Args:
        model: whole, in the machine's memory; changed in place
        layers: module paths of its decoder layers
    """
    for name in layers:
        # Each is the root of its own tree: PEFT calls models by their `forward`, past the hooks of a root of all. What
        # is a root would stay whole after a pass unless told otherwise.
        layer = fully_shard(model.get_submodule(name), mesh=_SHARDED.mesh, reshard_after_forward=True)
        _announce(layer, _SHARDED.count)
        _SHARDED.layers[_SHARDED.count] = layer
        _SHARDED.count += 1


def _announce(layer: FSDPModule, number: int) -> None:
    """Has a layer say its number before it is put together, where the main process works alone."""

    def say(*_arguments: object) -> None:
        if _SHARDED.is_led:
            _SHARDED.say(number)

    assert isinstance(layer, nn.Module)
    layer.register_forward_pre_hook(say, prepend=True)


@contextmanager
def leading() -> Iterator[None]:
    """Lets the main process read layers alone; the others `follow`."""
    if _SHARDED.group is None:
        yield
        return
    _SHARDED.is_led = True
    try:
        yield
    finally:
        _SHARDED.is_led = False
        _SHARDED.say(_NO_MORE)


def follow() -> None:
    """Hands over this process's parts of the layers that the main process reads, until it needs no more."""
    while _SHARDED.group is not None and (number := _SHARDED.say(_NO_MORE)) != _NO_MORE:
        layer = _SHARDED.layers[number]
        layer.unshard()
        layer.reshard()
