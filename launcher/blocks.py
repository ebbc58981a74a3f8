"""The repeated parts of a model: what is gathered, and computed anew, as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher.errors import RequestError

__all__ = ["Blocks", "blocks_of", "recompute", "unchanged"]

#: What a recipe may offer as `blocks(model)`.
Blocks = Callable[[nn.Module], Iterable[nn.Module]]


def blocks_of(model: nn.Module, blocks: Blocks | None = None) -> list[nn.Module]:
    """What the recipe says, else the elements of the outermost lists and sequences that have parameters.

    Raises:
        RequestError: the recipe names what is no part of the model.
    """
    if blocks is None:
        return list(_listed(model))
    parts, found = set(model.modules()), list(blocks(model))
    if strange := [type(block).__name__ for block in found if block not in parts or block is model]:
        raise RequestError(f"the recipe's blocks(model) has {strange[0]}, no part of the model: name its parts")
    return found


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.ModuleList | nn.Sequential):
        yield from (child for child in module if any(True for _ in child.parameters()))
    else:
        for child in module.children():
            yield from _listed(child)


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Let each block keep its input alone and compute its activations anew in the backward pass.

    The module stays what it is, so that names in its state do not change. Generators are as they were the first time;
    running statistics are moved once.
    """
    for block in blocks:
        block.forward = _Recomputed(block)  # type: ignore[method-assign, assignment]


class _Recomputed:
    def __init__(self, block: nn.Module) -> None:
        self._forward = block.forward
        self._block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), unchanged(list(self._block.buffers()))


@contextmanager
def unchanged(buffers: Iterable[torch.Tensor]) -> Iterator[None]:
    """Whatever happens to the buffers within is undone."""
    with torch.no_grad():
        before = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in before:
                buffer.copy_(old)
