"""A recipe whose loss is a mean says so where training begins, and a look at it leaves no trace."""

from __future__ import annotations

import copy
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from launcher.recipe import Loss
from launcher.summed import Watched, doubt


@dataclass(frozen=True)
class Own:
    kind: str = "sum"

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        losses = cross_entropy(model(x), y, reduction="none")
        if self.kind == "mean":
            return Loss(losses.mean(), len(y))
        if self.kind == "tokens":
            return Loss((losses * (1 + y)).sum(), (1 + y).sum())
        if self.kind == "pairs":
            return Loss((model(x) @ model(x).T).square().sum(), len(y))
        if self.kind == "needs four":
            return Loss(losses.reshape(4, -1).mean(), 1)
        return Loss(losses.sum(), len(y))


Pair = namedtuple("Pair", "x y")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).train()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


def test_a_mean_is_told_with_the_figures_that_show_it(model: nn.Module, batch: Any) -> None:
    why = doubt(Own("mean"), model, batch)
    assert why is not None
    assert why.startswith("loss() of Own is no sum over samples: two have ")
    assert "return sums, not means" in why
    assert doubt(Own("mean"), model, {"x": batch[0], "y": batch[1]}) is not None
    assert doubt(Own("mean"), model, Pair(*batch)) is not None


@pytest.mark.parametrize("kind", ["sum", "tokens", "pairs"])
def test_what_is_no_mean_is_not_doubted(model: nn.Module, batch: Any, kind: str) -> None:
    assert doubt(Own(kind), model, batch) is None


def test_half_precision_hides_no_mean_and_makes_none(model: nn.Module, batch: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert doubt(Own("mean"), model, batch) is not None
        assert doubt(Own(), model, batch) is None


@pytest.mark.parametrize("rows", [(slice(0, 1), slice(0, 1)), (slice(0, 8), slice(0, 4))])
def test_nothing_is_said_of_a_single_sample_or_of_tensors_that_disagree(
    model: nn.Module, batch: Any, rows: tuple[slice, slice]
) -> None:
    assert doubt(Own("mean"), model, tuple(part[cut] for part, cut in zip(batch, rows, strict=True))) is None


def test_a_loss_that_cannot_be_had_of_two_samples_ends_nothing(model: nn.Module, batch: Any) -> None:
    assert doubt(Own("needs four"), model, batch) is None
    assert model.training


@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_a_look_leaves_no_trace_in_what_is_trained(model: nn.Module, batch: Any, kind: str) -> None:
    """Parameters, running statistics and gradients of three updates with dropout: bitwise those without a look."""
    told: list[str] = []
    other = copy.deepcopy(model)
    for recipe, trained in ((Own(kind), model), (Watched(Own(kind), other, told.append), other)):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
        for update in range(3):
            torch.manual_seed(update)
            recipe.loss(trained, batch).total.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert len(told) == (kind == "mean"), "looked at once"


def test_all_else_is_the_recipes_own() -> None:
    assert Watched(Own("mean"), nn.Linear(1, 1), print).kind == "mean"
