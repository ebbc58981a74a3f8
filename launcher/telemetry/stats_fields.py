"""The fields of a rank's row of statistics, in their order: what the ranks exchange in every update."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, Union

from launcher.telemetry.stages import STAGES

if TYPE_CHECKING:
    import torch

__all__ = ["DEVICE_FIELDS", "HOST_FIELDS", "NUM_STATS", "StatsRow"]

#: Numbers that the host has.
HOST_FIELDS = ("count", "stop", "save", "call_order", "loss_count", "groups", *STAGES)
#: Fields of `UpdateScalars` that are tensors on the device.
DEVICE_FIELDS = ("loss", "finite", "grad_norm", "group_sq_norm_sum")
NUM_STATS = len(HOST_FIELDS) + len(DEVICE_FIELDS)

#: One rank's numbers: a list on a CPU, else a float64 tensor on the device.
StatsRow: TypeAlias = Union["torch.Tensor", list[float]]
