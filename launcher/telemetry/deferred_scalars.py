"""Scalars of an update that are read one update later, without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from launcher.plan.timeline import Update

__all__ = ["DeferredScalars", "UpdateScalars"]


@dataclass(frozen=True)
class UpdateScalars:
    """One rank's results of one update, from the optimizer step to the row; the defaults are those before the first.

    `loss` is the sum over this rank's samples and `loss_count` their count (samples or tokens). `grad_norm` is the norm
    of the update's mean gradient before clipping, `finite` whether the update was applied. `group_sq_norm_sum` is the
    sum of |h|²/c over the `groups` parts of the batch whose gradients this rank measured separately. The loss, `finite`
    and both norms are tensors on the device until `DeferredScalars.read` returns them as numbers.
    """

    loss: Any = 0.0
    loss_count: float = 0.0
    finite: Any = 1.0
    grad_norm: Any = 0.0
    group_sq_norm_sum: Any = 0.0
    groups: float = 0


class DeferredScalars:
    """The scalars of one update on their way to the host; `update` is None before the first update.

    They are copied asynchronously; `read` waits only for that copy and is called during the next update.
    """

    def __init__(self, scalars: UpdateScalars = UpdateScalars(), update: Update | None = None) -> None:
        self.update = update
        self._scalars = scalars
        self._event: torch.cuda.Event | None = None
        self._values: torch.Tensor | None = None
        if isinstance(scalars.finite, torch.Tensor):
            device = scalars.finite.device
            on_device = (scalars.loss, scalars.grad_norm, scalars.group_sq_norm_sum, scalars.finite)
            together = torch.stack([torch.as_tensor(scalar, device=device).detach().double() for scalar in on_device])
            self._values = self._copy_to_host(together) if together.is_cuda else together

    def _copy_to_host(self, together: torch.Tensor) -> torch.Tensor:
        pinned = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
        pinned.copy_(together, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()
        return pinned

    def read(self) -> UpdateScalars:
        """Return the scalars as numbers."""
        if self._event is not None:
            self._event.synchronize()
        if self._values is None:
            return self._scalars
        loss, grad_norm, group_sq_norm_sum, finite = self._values.tolist()
        return replace(
            self._scalars, loss=loss, grad_norm=grad_norm, group_sq_norm_sum=group_sq_norm_sum, finite=finite
        )
