"""A recipe with a mean loss gets a warning at the start of training; a summed loss gets none."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from launcher.distributed.store_gather import StoreGather
from launcher.recipe import Loss
from launcher.strategies.ddp import DdpReplica
from launcher.strategies.fsdp import FsdpReplica
from launcher.topology import Topology
from launcher.train import loss_scaling
from launcher.train.loss_check import RecipeWithLossCheck, describe_mean_loss
from tests.train import test_loss_scaling as one_rank

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


def test_recipe_may_change_its_loss_in_training() -> None:
    first, later = Loss(torch.zeros(()), 1), Loss(torch.ones(()), 1)
    recipe = SimpleNamespace(loss=lambda model, batch: first)
    checked = RecipeWithLossCheck(recipe, print)
    assert checked.loss(None, [0]) is first
    recipe.loss = lambda model, batch: later
    assert checked.loss(None, [0]) is later


def test_other_attributes_come_from_recipe() -> None:
    assert RecipeWithLossCheck(Own("sum", []), print).reduction == "sum"


# On two ranks
def fail_on_rank_1(*_: Any) -> None:
    if dist.get_rank() == 1:
        raise ValueError("only here")


class Unreadable(one_rank.Texts):
    def __getitem__(self, index: int) -> Any:
        fail_on_rank_1()
        return super().__getitem__(index)


class Failing(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fail_on_rank_1()
        return super().forward(x)


def make_model(layer: type[nn.Linear] = nn.Linear) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), layer(4, 4), nn.Linear(4, one_rank.CLASSES))


def average_count(model: nn.Module, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Loss:
    count = torch.tensor(float(len(x)))
    dist.all_reduce(count)
    return Loss(one_rank.squares(model, x, z).sum(), count / dist.get_world_size())


def fail_before_collective(model: nn.Module, *batch: torch.Tensor) -> Loss:
    fail_on_rank_1()
    return average_count(model, *batch)


def fail_after_forward(model: nn.Module, *batch: torch.Tensor) -> Loss:
    loss = one_rank.SUMS["sum"](model, *batch)
    fail_on_rank_1()
    return loss


SKIPPED, CHECKED = "(None, False)", "(None, True)"
#: Loss, model, data, strategy, and what the comparison gives on both ranks; after it, they are at the same point.
TOGETHER: dict[str, tuple[Any, Any, Any, type, str]] = {
    "a loss that communicates": (average_count, nn.Linear, one_rank.Texts, DdpReplica, CHECKED),
    "data that one rank cannot read": (average_count, nn.Linear, Unreadable, DdpReplica, SKIPPED),
    "such data with a sharded model": (one_rank.SUMS["sum"], nn.Linear, Unreadable, FsdpReplica, SKIPPED),
    "a loss that fails on one rank": (fail_after_forward, nn.Linear, one_rank.Texts, DdpReplica, SKIPPED),
    "a model that fails on one rank": (one_rank.SUMS["sum"], Failing, one_rank.Texts, DdpReplica, SKIPPED),
    "a sharded model": (one_rank.SUMS["sum"], nn.Linear, one_rank.Texts, FsdpReplica, CHECKED),
    "one that fails alike": (one_rank.penalise_gradient, nn.Linear, one_rank.Texts, FsdpReplica, SKIPPED),
}
APART: dict[str, tuple[Any, Any, Any, type]] = {
    "before a collective of the loss": (fail_before_collective, nn.Linear, one_rank.Texts, DdpReplica),
    "within a sharded model": (one_rank.SUMS["sum"], Failing, one_rank.Texts, FsdpReplica),
    "after a sharded model": (fail_after_forward, nn.Linear, one_rank.Texts, FsdpReplica),
}


def compare_on_two_ranks(folder: Path, loss_fn: Any, layer: Any, data: Any, kind: type) -> list[str]:
    """What each rank's comparison gave, and the sum of an all-reduce after it; or the error."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def compare(rank: int) -> str:
        store = dist.FileStore(str(folder / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
        loss_scaling.FAILED_WAIT_S = 1.0
        run = one_rank.make_context(loss_fn, make_model(layer), kind, topology=Topology(rank=rank, world=2))
        found = loss_scaling.find_scaling_problem(run, data(), StoreGather(dist.PrefixStore("check", store), rank, 2))
        ranks = torch.ones(())
        dist.all_reduce(ranks)
        return f"{found} {int(ranks)}"

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            results.put((rank, compare(rank)))
        except Exception as error:
            results.put((rank, "".join(traceback.format_exception_only(error))))
        os._exit(0)  # without a wait for the other rank

    processes = [context.Process(target=run, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [value for _, value in sorted(results.get() for _ in processes)]


@pytest.mark.parametrize("case", TOGETHER)
def test_ranks_compare_the_loss_together_or_not_at_all(tmp_path: Path, case: str) -> None:
    *parts, expected = TOGETHER[case]
    assert compare_on_two_ranks(tmp_path, *parts) == [f"{expected} 2"] * 2


@pytest.mark.parametrize("case", APART)
def test_error_that_others_wait_behind_ends_the_job(tmp_path: Path, case: str) -> None:
    waiting, failed = compare_on_two_ranks(tmp_path, *APART[case])
    assert failed == "ValueError: only here\n"
    assert not waiting.startswith(CHECKED)
