"""The loss of a training micro-batch: what loss() returned, checked, and made to take part in the backward pass.

A micro-batch without any target, whose loss count is 0, contributes nothing. Its total may be a number without a graph,
or NaN, the mean over no targets. The rank must take part in the reduction of gradients all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import nn

from launcher.errors import TrainingFailed
from launcher.recipe import Loss

__all__ = [
    "contribute_nothing",
    "contribute_zeros",
    "get_finite_value",
    "make_loss",
    "reaches_parameter",
    "read_training_loss",
]


def read_training_loss(loss: Any) -> Loss:
    """The loss with a scalar tensor as its total and a number as its count.

    Raises:
        TrainingFailed: the total or the count is not a number, or there is no gradient though something was counted.
    """
    if is_usual(loss):
        return loss
    loss = make_loss(loss)
    count = read_count(loss.count)
    total = loss.total
    if not isinstance(total, torch.Tensor):
        total = torch.tensor(read_number(total, "total", "the sum over the samples, a scalar tensor"))
    if total.numel() != 1 or total.is_complex():
        raise TrainingFailed(
            f"recipe.loss returned a total with the shape {list(total.shape)} and dtype {total.dtype}: "
            "return one real number, the sum over the samples, e.g. total.sum()"
        )
    trained = total.grad_fn is not None or isinstance(total, nn.Parameter)  # a leaf, as zeros(()), reaches nothing
    if count and not trained:
        raise TrainingFailed(
            f"recipe.loss counted {count:g} but returned a total without a gradient: compute it from the model's "
            "output, without detach(), item() or no_grad(); count 0 where a batch has no target"
        )
    if not trained:
        total = total.detach()
    return replace(loss, total=total.sum() if total.dim() else total, count=count)


def is_usual(loss: Any) -> TypeGuard[Loss]:
    """Whether it is what nearly every loss() returns: a scalar with a graph, and a count above 0, as a number.

    It then passes all other checks as it is, which take longer.
    """
    if type(loss) is not Loss:
        return False
    total, count = loss.total, loss.count
    return (
        (type(count) is int or type(count) is float)
        and 0 < count < math.inf
        and isinstance(total, torch.Tensor)
        and total.dim() == 0
        and total.grad_fn is not None
        and not total.is_complex()
    )


def make_loss(loss: Any) -> Loss:
    """What loss() returned as a `Loss`; another object, as a named tuple, may have the same attributes.

    Raises:
        TrainingFailed: it has no total or no count.
    """
    if isinstance(loss, Loss):
        return loss
    if not hasattr(loss, "total") or not hasattr(loss, "count") or callable(loss.count):
        raise TrainingFailed(
            f"recipe.loss returned a {type(loss).__name__}: return Loss(total, count) of launcher.recipe"
        )
    return Loss(loss.total, loss.count, getattr(loss, "metrics", {}))


def read_count(count: Any) -> float:
    """The loss count as a number.

    Raises:
        TrainingFailed: it is not a number of samples or tokens.
    """
    number = read_number(count, "count", "the number of samples or tokens that total sums over")
    if not 0 <= number < float("inf"):
        raise TrainingFailed(
            f"recipe.loss returned count={number:g}: return the number of samples or tokens that total sums over"
        )
    return number


def read_number(value: Any, name: str, meaning: str) -> float:
    """A number, or a tensor with one element, as a Python number.

    Raises:
        TrainingFailed: it is neither.
    """
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of the shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f" ({value!r:.60})"
        raise TrainingFailed(
            f"recipe.loss returned a {type(value).__name__}{shape} as {name}: return {meaning}"
        ) from None


def reaches_parameter(total: torch.Tensor) -> bool:
    """Whether a backward pass from `total` may reach a parameter; 2 * zeros(requires_grad=True) has a graph too."""
    pending, seen = [total.grad_fn], {None, total.grad_fn}
    if total.grad_fn is None:
        return isinstance(total, nn.Parameter)
    while pending:
        node = pending.pop()
        if isinstance(getattr(node, "variable", None), nn.Parameter) or "Checkpoint" in type(node).__name__:
            return True  # a reentrant checkpoint hides the graph of what it recomputes
        following = [other for other, _ in getattr(node, "next_functions", ()) if other not in seen]
        seen.update(following)
        pending += following
    return False


def contribute_nothing(total: torch.Tensor, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A scalar with the value of `total` whose backward pass reaches `tensors`, and gives none of them a gradient.

    DDP counts a parameter as ready, and one without a gradient elsewhere keeps none. Hooks of a tensor are given None.
    """
    return make_contribution(total, list(tensors), zeros=False)


def contribute_zeros(total: torch.Tensor, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A scalar with the value of `total` whose backward pass gives `tensors` zeros as their gradients."""
    return make_contribution(total, list(tensors), zeros=True)


def make_contribution(total: torch.Tensor, tensors: list[torch.Tensor], *, zeros: bool) -> torch.Tensor:
    scalar: torch.Tensor = Contribution.apply(get_finite_value(total), zeros, *tensors)
    return scalar


def get_finite_value(total: torch.Tensor) -> torch.Tensor:
    """The value of a total without its graph; 0 if it is not finite, since it belongs to no sample."""
    dtype = total.dtype if total.is_floating_point() else torch.float32
    return torch.nan_to_num(total.detach().to(dtype), nan=0.0, posinf=0.0, neginf=0.0)


class Contribution(torch.autograd.Function):
    """A constant that depends on tensors in the graph alone: their gradient is zeros, or undefined.

    A product with 0 would not do, since 0 · NaN is NaN.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, zeros: bool, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.like = [torch.empty_like(tensor, device="meta") for tensor in tensors] if zeros else []
        ctx.devices = [tensor.device for tensor in tensors]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if not ctx.like:
            return (None, None, *(None for _ in ctx.devices))
        zeros = (torch.zeros_like(like, device=at) for like, at in zip(ctx.like, ctx.devices, strict=True))
        return (None, None, *zeros)
