"""Whether all ranks called the parts of a sharded model in the same order: their collectives follow that order.

FSDP gathers a block's parameters when it is called, and DeepSpeed reduces gradients in the order of the backward pass.
Ranks that call different parts, as with random layer drop, would exchange the tensors of different parts: without an
error if they have the same size. So each rank sends a number for its order with its statistics of the update, and a
difference ends training before the step.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["CallOrder"]


class CallOrder:
    """A number for the order in which modules were called in the forward passes of an update.

    `repeated`: whether each call counts, not only the first one of each module in a micro-batch.
    """

    def __init__(self, modules: Sequence[nn.Module], *, repeated: bool) -> None:
        self._numbers = {module: number.to_bytes(4, "little") for number, module in enumerate(modules)}
        self._repeated = repeated
        self._called: set[nn.Module] = set()
        self._checksum = 0
        for module in modules:
            module.register_forward_pre_hook(self._on_call)

    def _on_call(self, module: nn.Module, _: object) -> None:
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() >= 0:  # validation, recomputation
            return
        if self._repeated or module not in self._called:
            self._called.add(module)
            self._checksum = zlib.crc32(self._numbers[module], self._checksum)

    def begin_micro_batch(self) -> None:
        self._called.clear()

    def pop(self) -> float:
        """The number for the calls since the last time: equal on two ranks if their orders are; exact in a float64."""
        checksum, self._checksum = self._checksum, 0
        return float(checksum)
