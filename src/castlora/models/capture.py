"""Watching and changing what flows through modules during forward passes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass
class Activations:
    """The last input and output of one module, or what is kept of them."""

    inputs: Tensor
    outputs: Tensor


@contextmanager
def capture(
    model: nn.Module, names: Iterable[str], kept: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[dict[str, Activations]]:
    """Keeps the latest activations of the named modules while the context is open.

    Args:
        model: the model whose forward passes are watched
        names: module paths inside it
        kept: activations (batch, positions, width) → what is kept of them, by default all

    Yields:
        module path → activations, filled by each forward pass
    """
    captured: dict[str, Activations] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            captured[name] = Activations(kept(arguments[0]), kept(output))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def change_output(model: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Passes the output of one module through a function while the context is open.

    Args:
        model: the model whose forward passes are changed
        name: module path inside it
        change: output (batch, positions, width) → output of the same shape
    """

    def hook(_module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return change(output)

    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def final_norm(model: PreTrainedModel, ids: Tensor) -> str | None:
    """The module whose output the output head reads, or None where the head reads no module's output as it is.

    Args:
        model: a causal language model
        ids: tokens to try it with, shape (batch, tokens)

    Returns:
        module path
    """
    outputs: dict[str, object] = {}
    read: list[Tensor] = []

    def keep(name: str) -> object:
        return lambda _module, _inputs, output: outputs.__setitem__(name, output)

    head = model.get_output_embeddings()
    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(keep(name)) for name, module in leaves if module is not head]
    handles.append(head.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0])))
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    # What the head reads is a view, cut to the tokens whose logits are asked for.
    tensors = ((name, output) for name, output in outputs.items() if isinstance(output, Tensor))
    return next((name for name, output in tensors if output.data_ptr() == read[0].data_ptr()), None)
