"""A recipe with a mean loss gets a warning at the start of training; a summed loss gets none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional

from launcher.recipe import Loss
from launcher.train.loss_check import RecipeWithLossCheck, describe_mean_loss

N = 8
Y = torch.arange(N) % 3
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
T = torch.zeros(N, 3)

MEANS: dict[str, Callable[[], torch.Tensor]] = {
    "cross entropy": partial(functional.cross_entropy, X, Y),
    "mean squares": partial(functional.mse_loss, X, T),
    "logits": partial(functional.binary_cross_entropy_with_logits, X, T),
    "huber": partial(functional.huber_loss, X, T),
    "by hand": lambda: functional.cross_entropy(X, Y, reduction="none").mean(),
    "a sum over the samples' number": lambda: functional.cross_entropy(X, Y, reduction="sum") / N,
    "a sum over a tensor that says so": lambda: (
        functional.cross_entropy(X, Y, reduction="sum") / torch.tensor(float(N))
    ),
    "a sum within each sample": lambda: (X - T).square().sum(1).mean(),
    "two of them": lambda: functional.cross_entropy(X, Y) + functional.mse_loss(X, T),
    "in double precision": lambda: functional.cross_entropy(X, Y).double(),
    "negated": lambda: -functional.cross_entropy(X, Y),
}
SUMS: dict[str, Callable[[], torch.Tensor]] = {
    "cross entropy": partial(functional.cross_entropy, X, Y, reduction="sum"),
    "mean squares": partial(functional.mse_loss, X, T, reduction="sum"),
    "weighted": lambda: functional.cross_entropy(X, Y, reduction="none") @ (1.0 + Y),
    "a mean within each sample": lambda: functional.mse_loss(X, T, reduction="none").mean(1).sum(),
    "a mean over features of a sum over samples": lambda: (X - T).square().sum(0).mean(),
    "a mean times the samples": lambda: functional.cross_entropy(X, Y) * N,
    "over a temperature": lambda: functional.cross_entropy(X, Y, reduction="sum") / 0.5,
    "a sum and a mean beside it": lambda: functional.cross_entropy(X, Y, reduction="sum") + X.square().mean(),
    "without a gradient": lambda: functional.cross_entropy(X.detach(), Y),
}


@pytest.mark.parametrize("name", MEANS)
def test_mean_losses_are_detected(name: str) -> None:
    why = describe_mean_loss(Loss(MEANS[name](), N))
    assert why is not None
    assert why.startswith("returns a mean (")
    assert why.endswith("and counts 8: return sums, not means (reduction='sum'), or the gradient is too small by that "
                        "factor; launcher verify shows it")  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_summed_losses_get_no_warning(name: str) -> None:
    assert describe_mean_loss(Loss(SUMS[name](), N)) is None


def test_single_sample_gets_no_warning() -> None:
    assert describe_mean_loss(Loss(functional.cross_entropy(X[:1], Y[:1]), 1)) is None


def test_halved_squares_get_no_warning() -> None:
    assert describe_mean_loss(Loss(functional.mse_loss(X[:2], T[:2], reduction="sum") / 2, 2)) is None


def test_count_may_be_a_tensor() -> None:
    assert describe_mean_loss(Loss(functional.cross_entropy(X, Y), torch.tensor(N))) is not None


@dataclass(frozen=True)
class Own:
    reduction: str
    calls: list[int]

    def loss(self, model: Any, batch: Any) -> Loss:
        self.calls.append(len(batch))
        return Loss(functional.cross_entropy(X, Y, reduction=self.reduction), N)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_only_first_loss_is_checked(reduction: str) -> None:
    calls: list[int] = []
    warnings: list[str] = []
    recipe = RecipeWithLossCheck(Own(reduction, calls), warnings.append)
    for _ in range(3):
        recipe.loss(None, [0] * N)
    assert calls == [N] * 3
    assert [line.split(" (")[0] for line in warnings] == ["loss() of Own returns a mean"] * (reduction == "mean")


def test_other_attributes_come_from_recipe() -> None:
    assert RecipeWithLossCheck(Own("sum", []), print).reduction == "sum"
