"""Scalars of an update that are read one update later, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from launcher.plan.timeline import Update

__all__ = ["DeferredScalars"]


class DeferredScalars:
    """The results of one update: device scalars (loss, grad norm, spread, finite) and what the host knows about it.

    `count` is the loss count, `groups` the number of gradient groups that the spread covers, `update` is None before
    the first update. The scalars are copied to the host asynchronously; `read` waits only for that copy and is called
    during the next update. Without scalars, the values default to zero loss and finite=1. The last scalar must be a
    tensor: its device is used for the copy.
    """

    def __init__(
        self, scalars: Sequence[Any] = (), count: float = 0.0, groups: int = 0, update: Update | None = None
    ) -> None:
        self.count = count
        self.groups = groups
        self.update = update
        self._event: torch.cuda.Event | None = None
        self._values: torch.Tensor | tuple[float, ...] = (0.0, 0.0, 0.0, 1.0)
        if scalars:
            device = scalars[-1].device
            together = torch.stack([torch.as_tensor(scalar, device=device).detach().double() for scalar in scalars])
            self._values = self._copy_to_host(together) if together.is_cuda else together

    def _copy_to_host(self, together: torch.Tensor) -> torch.Tensor:
        pinned = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
        pinned.copy_(together, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()
        return pinned

    def read(self) -> tuple[float, float, float, float]:
        if self._event is not None:
            self._event.synchronize()
        loss, norm, spread, finite = self._values.tolist() if isinstance(self._values, torch.Tensor) else self._values
        return loss, norm, spread, finite
