"""Measure the size of a recipe's model and of its optimizer state on the meta device, without allocating either."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from launcher.footprint import Weights
from launcher.optim import make_optimizer
from launcher.settings import Run

__all__ = ["weigh"]


def weigh(recipe: Any, run: Run) -> Weights:
    """Count the parameters of the recipe's model and the optimizer state per parameter.

    Raises:
        UsageError: the optimizer cannot be built as configured.
    """
    with torch.device("meta"):
        model = recipe.model()
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Weights(
        trainable=sum(numel for numel, trained in sizes if trained),
        frozen=sum(numel for numel, trained in sizes if not trained),
        element_bytes=8 if run.train.precision == "fp64" else 4,
        slots=slots(run),
    )


def slots(run: Run) -> int:
    """Elements of optimizer state per trainable element, determined by a step on a small layer."""
    small = nn.Linear(7, 3, bias=False)
    optimizer = make_optimizer(small, run)
    small.weight.grad = torch.ones_like(small.weight)
    optimizer.step()
    state = optimizer.state[small.weight].values()
    return sum(isinstance(value, torch.Tensor) and value.shape == small.weight.shape for value in state)
