"""The repeated blocks of a model: the units of FSDP sharding and of activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher.errors import RequestError

__all__ = ["Blocks", "blocks_of", "recompute", "unchanged"]

#: The type of a recipe's optional `blocks(model)`.
Blocks = Callable[[nn.Module], Iterable[nn.Module]]


def blocks_of(model: nn.Module, blocks: Blocks | None = None) -> list[nn.Module]:
    """The recipe's blocks, else the elements with parameters of the outermost ModuleList and Sequential modules.

    Raises:
        UsageError: the recipe's `blocks` returns something that is not a submodule of the model.
    """
    if blocks is None:
        return list(_listed(model))
    parts, found = set(model.modules()), list(blocks(model))
    if strange := [type(block).__name__ for block in found if block not in parts or block is model]:
        raise RequestError(
            f"the recipe's blocks(model) has {strange[0]}, which is not a submodule of the model: "
            "return submodules of the model only"
        )
    return found


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.ModuleList | nn.Sequential):
        yield from (child for child in module if any(True for _ in child.parameters()))
    else:
        for child in module.children():
            yield from _listed(child)


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Apply activation checkpointing: each block keeps only its input and recomputes in the backward pass.

    Modules are not wrapped, so the names in the state_dict do not change. The recomputation sees the same random
    generator state as the first pass, and running statistics are updated only once.
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
    """Restore the buffers to their previous values after the block."""
    with torch.no_grad():
        before = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in before:
                buffer.copy_(old)
