"""The computation of a recipe's loss as a module, which is what a strategy wraps or shards.

A wrapper around the model itself would hide its methods and attributes, and a recipe that reaches past it would train
each rank by itself. Around the whole computation, `loss()` gets the recipe's own model, and may use any part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from launcher.recipe import Loss
from launcher.strategies.training_loss import make_loss

__all__ = ["LossFn", "LossModule", "run_loss"]

#: A recipe's `loss(model, batch)`.
LossFn = Callable[[nn.Module, Any], Loss]


class LossModule(nn.Module):
    """Holds the recipe's model; its forward pass calls what it is given with that model.

    It takes no batch as an argument, since wrappers copy, cast or walk through the arguments of a forward pass. It
    returns the total only: a wrapper searches the result for what backward will start from.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[nn.Module], Any]) -> Any:
        return compute(self.model)


def run_loss(wrapped: nn.Module, loss_fn: LossFn, batch: Any) -> Loss:
    """The loss of `batch`, computed within the forward pass of `wrapped`, a `LossModule` or a wrapper around one."""
    losses: list[Loss] = []

    def compute(model: nn.Module) -> torch.Tensor:
        losses[:] = [make_loss(loss_fn(model, batch))]
        total: torch.Tensor = losses[0].total
        return total

    total, loss = wrapped(compute), losses[0]
    return loss if total is loss.total else replace(loss, total=total)
