"""FSDP's collectives for a micro-batch whose loss has no gradient to go through the model with.

Each call of a sharded block gathers its parameters, and its backward pass reduces their gradients, on all ranks
together. A rank whose loss() calls no block, or whose total is NaN, must make the same calls as the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from launcher.errors import TrainingFailed
from launcher.strategies.training_loss import contribute_zeros

__all__ = ["BlockCalls"]


class BlockCalls:
    """Records the calls of the blocks in one computation of a loss, and repeats those of an earlier one with zeros."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._usual = list(blocks)  # until a forward pass shows their order
        self._is_learned = False
        self._is_recording = False
        self._called: list[nn.Module] = []
        self._outputs: list[torch.Tensor] = []
        for block in blocks:
            block.register_forward_hook(self._on_call)

    def _on_call(self, block: nn.Module, _: Any, output: Any) -> None:
        if self._is_recording:
            self._called.append(block)
            leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
            self._outputs += [leaf for leaf in leaves if leaf.requires_grad]

    @contextmanager
    def record(self) -> Iterator[None]:
        self._called, self._outputs, self._is_recording = [], [], True
        try:
            yield
        finally:
            self._is_recording = False
            if self._called and not self._is_learned:
                self._usual, self._is_learned = self._called, True
            self._outputs = []

    def contribute(self, total: torch.Tensor, model: nn.Module) -> torch.Tensor:
        """The value of `total`; its backward pass goes through every block with zeros.

        Raises:
            TrainingFailed: loss() called some of the blocks but not others.
        """
        if self._called and self._is_learned and self._called != self._usual:
            raise TrainingFailed(
                "strategy=fsdp: recipe.loss counted 0 and called only a part of the model's blocks, which the other "
                "ranks wait for: call the model as for other batches, or type strategy=ddp"
            )
        gathered = list_gathered(model)
        if self._called:
            return contribute_zeros(total, [*self._outputs, *gathered])
        self._is_recording = False
        zero = contribute_zeros(torch.zeros_like(total), gathered)
        for block in self._usual:
            zero = call_with_zeros(block, zero)
        return contribute_zeros(total, [zero])


def list_gathered(model: nn.Module) -> list[torch.Tensor]:
    """The trained parameters of `model` that are gathered now."""
    return [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]


def call_with_zeros(block: nn.Module, zero: torch.Tensor) -> torch.Tensor:
    """Call a block with its gathering, but a forward pass that returns a zero which depends on all its parameters."""

    def forward(given: torch.Tensor) -> torch.Tensor:
        return contribute_zeros(given, [given, *list_gathered(block)])

    replaced = {"forward": forward, "_compiled_call_impl": None}
    before = {name: block.__dict__[name] for name in replaced if name in block.__dict__}
    block.__dict__.update(replaced)
    try:
        output: torch.Tensor = block(zero)
    finally:
        for name in replaced:
            del block.__dict__[name]
        block.__dict__.update(before)
    return output
