"""Measure the size of a recipe's model and of its optimizer state on the meta device, without allocating either."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from launcher.config.schema import RunConfig
from launcher.plan.memory_model import ModelSize
from launcher.strategies.model_checks import check_is_built
from launcher.strategies.optimizer import make_optimizer

__all__ = ["measure_model_size"]


def measure_model_size(recipe: Any, config: RunConfig) -> ModelSize:
    """Count the parameters of the recipe's model and the optimizer state per parameter.

    Raises:
        UsageError: the optimizer cannot be built as configured.
    """
    with torch.device("meta"):
        model = recipe.model()
    check_is_built(model)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ModelSize(
        trainable=sum(numel for numel, trained in sizes if trained),
        frozen=sum(numel for numel, trained in sizes if not trained),
        element_bytes=8 if config.train.precision == "fp64" else 4,
        slots=count_optimizer_slots(config),
    )


def count_optimizer_slots(config: RunConfig) -> int:
    """Elements of optimizer state per trainable element, determined by a step on a small layer."""
    small = nn.Linear(7, 3, bias=False)
    optimizer = make_optimizer(small, config)
    small.weight.grad = torch.ones_like(small.weight)
    optimizer.step()
    state = optimizer.state[small.weight].values()
    return sum(isinstance(value, torch.Tensor) and value.shape == small.weight.shape for value in state)
