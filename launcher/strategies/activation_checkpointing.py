"""Activation checkpointing, and the repeated blocks of a model that it and FSDP sharding work on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher.errors import UsageError
from launcher.strategies.buffers import BufferSnapshot, replay_buffers

__all__ = ["BlocksFn", "apply_activation_checkpointing", "find_blocks"]

#: The type of a recipe's optional `blocks(model)`.
BlocksFn = Callable[[nn.Module], Iterable[nn.Module]]


def find_blocks(model: nn.Module, blocks: BlocksFn | None = None) -> list[nn.Module]:
    """The recipe's blocks, else the elements with parameters of the outermost ModuleList and Sequential modules.

    Raises:
        UsageError: the recipe's `blocks` returns something that is not a submodule of the model.
    """
    if blocks is None:
        return list(_iter_listed_modules(model))
    submodules, chosen = set(model.modules()), list(blocks(model))
    if others := [type(block).__name__ for block in chosen if block not in submodules or block is model]:
        raise UsageError(
            f"the recipe's blocks(model) has {others[0]}, which is not a submodule of the model: "
            "return submodules of the model only"
        )
    return chosen


def _iter_listed_modules(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.ModuleList | nn.Sequential):
        yield from (child for child in module if any(True for _ in child.parameters()))
    else:
        for child in module.children():
            yield from _iter_listed_modules(child)


def apply_activation_checkpointing(blocks: Iterable[nn.Module]) -> None:
    """Apply activation checkpointing: each block keeps only its input and recomputes in the backward pass.

    Modules are not wrapped, so the names in the state_dict do not change. The recomputation sees the same random
    generator state as the first pass, and running statistics are updated only once.
    """
    for block in blocks:
        block.forward = _CheckpointedForward(block)  # type: ignore[method-assign, assignment]


class _CheckpointedForward:
    def __init__(self, block: nn.Module) -> None:
        self._forward = block.forward
        self._block = block

    # A trace of it would change buffers twice. What the block computes is compiled all the same.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, context_fn=self._make_contexts, **kwargs)

    def _make_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of the first pass and of the recomputation, which sees the buffers as the first pass did."""
        start = BufferSnapshot(self._block)
        return remember_changed_buffers(start), replay_buffers(self._block, start)


@contextmanager
def remember_changed_buffers(start: BufferSnapshot) -> Iterator[None]:
    """Copy the buffers that the block changes, as they were before it."""
    start.take()
    try:
        yield
    finally:
        start.drop_unchanged()
