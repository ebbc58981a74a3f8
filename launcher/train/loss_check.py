"""Check once, at the start of training, that a recipe's loss is a sum, as required.

A mean would be divided by the number of samples a second time: training would continue silently with gradients that are
too small by that factor. A micro-batch is compared with its halves (`loss_scaling`), and the autograd graph of the
first loss names the operation of a plain mean. `launcher verify` is more thorough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from launcher.distributed.store_gather import StoreGather
from launcher.recipe import Loss
from launcher.train.context import TrainContext
from launcher.train.loss_scaling import find_scaling_problem
from launcher.train.state import TrainState

__all__ = ["RecipeWithLossCheck", "check_loss", "describe_mean_loss"]

#: Operations that leave a mean a mean: they may lie between it and the loss.
PASSTHROUGH_OPS = ("AddBackward", "ToCopyBackward", "AliasBackward", "ViewBackward", "SqueezeBackward", "NegBackward")
MEAN_REDUCTION = 1  # torch numbers the reductions of its losses: none 0, mean 1, sum 2


def check_loss(context: TrainContext, state: TrainState, items: Any, store: dist.Store) -> TrainContext:
    """At the first start of a run, check the loss on its training data `items`. Every rank must call this.

    Returns the context with a recipe that raises an alarm with the first training loss if there is something to say.
    """
    if state.position.samples or context.topology.generation > 1:
        return context
    topology = context.topology
    store_gather = StoreGather(dist.PrefixStore("loss_check", store), topology.rank, topology.world)
    problem, is_known = find_scaling_problem(context, items, store_gather)
    if context.logger is None or (is_known and problem is None):
        return context

    def warn(detail: str) -> None:
        context.log_event("alarm", kind="loss", detail=detail)

    return replace(context, recipe=RecipeWithLossCheck(context.recipe, warn, problem))


class RecipeWithLossCheck:
    """Wraps a recipe and checks its first training loss; everything else is passed through unchanged.

    `warn` is called with the problem, if there is one: that the loss is a plain mean, else `known_problem`.
    """

    def __init__(self, recipe: Any, warn: Callable[[str], None], known_problem: str | None = None) -> None:
        self._recipe = recipe
        self._known_problem = known_problem
        self._warn: Callable[[str], None] | None = warn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recipe, name)

    def loss(self, model: Any, batch: Any) -> Loss:
        loss: Loss = self._recipe.loss(model, batch)  # looked up in every call: a recipe may change its loss
        if self._warn is not None:
            warn, self._warn = self._warn, None
            problem = describe_mean_loss(loss) or self._known_problem
            if problem is not None:
                warn(f"loss() of {type(self._recipe).__name__} {problem}")
        return loss


def describe_mean_loss(loss: Loss) -> str | None:
    """Describe why the loss is a mean, to complete a sentence; None if it is a sum, or counts a single sample.

    A mean times the number of samples is a sum, and so is a sum over samples of means within each sample.
    """
    count = float(loss.count)
    by = find_mean_op(getattr(loss.total, "grad_fn", None), count) if count > 1 else None
    if by is None:
        return None
    return (
        f"returns a mean ({by}) and counts {count:g}: return sums, not means (reduction='sum'), or the gradient is "
        "too small by that factor; launcher verify shows it"
    )


def find_mean_op(node: Any, count: float) -> str | None:
    """The name of the operation that takes the final mean; None if there is none, or other operations follow it."""
    if node is None:
        return None
    name, before = node.name(), [part for part, _ in node.next_functions if part is not None]
    if name.startswith("MeanBackward"):  # a mean over the rest after summing over samples is not a mean over samples
        return None if any(map(is_sum_over_samples, before)) else str(name)
    if getattr(node, "_saved_reduction", None) == MEAN_REDUCTION:
        return str(name)
    if name.startswith("DivBackward"):
        divisor = getattr(node, "_saved_other", None)
        alike = divisor is not None and divisor.numel() == 1 and float(divisor) == count
        alike = alike and count > 2  # half the squared error of two samples is a common sum, not a mean
        return f"{name} by {count:g}" if alike else None
    if not name.startswith(PASSTHROUGH_OPS):
        return None
    parts = [find_mean_op(part, count) for part in before]
    return parts[0] if parts and all(parts) else None


def is_sum_over_samples(node: Any) -> bool:
    """Return whether the operation sums over all elements or over the first dimension."""
    return bool(node.name() == "SumBackward0" or 0 in getattr(node, "_saved_dim", ()))
