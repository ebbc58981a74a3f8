"""The results of one update that are computed on the device, and are read later than that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["UpdateScalars"]


@dataclass(frozen=True)
class UpdateScalars:
    """One rank's results of one update, from the optimizer step to the row; the defaults are those before the first.

    `loss` is the sum over this rank's samples and `loss_count` their count (samples or tokens). `grad_norm` is the norm
    of the update's mean gradient before clipping, `finite` whether the update was applied. `group_sq_norm_sum` is the
    sum of |h|²/c over the `groups` parts of the batch whose gradients this rank measured separately. The loss, `finite`
    and both norms are tensors on the device: the ranks exchange them in the next update without reading them.
    """

    loss: Any = 0.0
    loss_count: float = 0.0
    finite: Any = 1.0
    grad_norm: Any = 0.0
    group_sq_norm_sum: Any = 0.0
    groups: float = 0
