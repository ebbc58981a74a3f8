"""A model's buffers (running statistics) over an update: undone with it, untouched by a pad, rank 0's in the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["Buffers"]


class Buffers:
    """The buffers of `model`, which every rank holds whole."""

    def __init__(self, model: nn.Module, world: int) -> None:
        self._world = world
        self._buffers = [b for b in model.buffers() if b is not None]
        self._kept = [torch.empty_like(buffer) for buffer in self._buffers]
        self._norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember them as they are before an update, so that a skipped one can be undone."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    @torch.no_grad()
    def undo(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """A pad leaves no trace in running statistics, and is not refused for being a single sample."""
        before = [buffer.clone() for buffer in self._buffers]
        training = [norm for norm in self._norms if norm.training]
        for norm in training:
            norm.training = False
        try:
            yield
        finally:
            for norm in training:
                norm.training = True
            for buffer, old in zip(self._buffers, before, strict=True):
                buffer.copy_(old)

    @torch.no_grad()
    def spread(self, *, floating_only: bool) -> None:
        """Give every rank rank 0's."""
        if self._world == 1:
            return
        for buffer in self._buffers:
            if buffer.is_floating_point() or not floating_only:
                dist.broadcast(buffer, src=0)
