"""Reads the values of a recipe's Loss; what cannot be used is refused in the recipe's own words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from launcher.errors import TrainingFailed
from launcher.recipe import Loss

__all__ = ["get_metrics", "read_scalar"]

#: `val/loss` is the loss itself.
RESERVED_METRICS = frozenset({"loss"})


def get_metrics(loss: Loss) -> Mapping[str, Any]:
    """The metrics of a loss by name.

    Raises:
        TrainingFailed: they are not a mapping, or a name is not text or is taken by the loss itself.
    """
    if not isinstance(loss.metrics, Mapping):
        raise TrainingFailed(
            f"recipe.loss returned metrics={loss.metrics!r:.80}, a {type(loss.metrics).__name__}: "
            "return a mapping of names to sums, or {} for none"
        )
    for name in loss.metrics:
        if not isinstance(name, str) or not name:
            raise TrainingFailed(
                f"recipe.loss returned a metric named {name!r:.80}, a {type(name).__name__}: "
                f"name it with text, e.g. {{'metric{name!s:.40}': ...}}"
            )
        if name in RESERVED_METRICS:
            raise TrainingFailed(
                f"recipe.loss returned a metric named {name!r}, which is the name of the loss itself: "
                f"name it otherwise, e.g. {{'other_{name}': ...}}"
            )
    return loss.metrics


def read_scalar(value: Any, what: str, device: torch.device) -> torch.Tensor:
    """A number, or a tensor with one element on any device, as a double-precision scalar on `device`.

    Raises:
        TrainingFailed: it is not a single real number; `what` names it.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            raise TrainingFailed(
                f"recipe.loss returned {what} with the shape {list(value.shape)} and dtype {value.dtype}: "
                "return one real number, the sum over the samples"
            )
        return value.detach().reshape(()).to(device, torch.float64)
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return torch.tensor(float(value), dtype=torch.float64, device=device)
    except (TypeError, ValueError):
        raise TrainingFailed(
            f"recipe.loss returned {what}={value!r:.80}, a {type(value).__name__}: "
            "return one real number, the sum over the samples"
        ) from None
