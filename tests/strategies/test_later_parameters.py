"""Parameters that need a gradient only after the start are named, and the optimizer never gets them by halves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from launcher.config.schema import RunConfig
from launcher.recipe import Loss
from launcher.strategies.ddp import DdpReplica
from launcher.strategies.interface import ReplicaArgs
from launcher.strategies.later_parameters import LaterParameters
from launcher.strategies.optimizer import make_optimizer
from launcher.strategies.precision import Precision
from launcher.telemetry.stage_clock import HostTimer, StageClock

CONFIG = replace(RunConfig(), optimizer={"_target_": "torch.optim.SGD"})


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.frozen = nn.Linear(3, 1), nn.Linear(3, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x) + self.frozen(x)


def train_update(replica: DdpReplica, change: Any) -> list[str]:
    def compute(model: nn.Module, x: torch.Tensor) -> Loss:
        change(model)
        return Loss(model(x).square().sum(), len(x))

    with replica.micro_batch(last=True, is_padding=False, shard=0):
        replica.backward(replica.compute_loss(compute, torch.ones(2, 3)).total, 2)
    replica.step(0.1, None, 1.0, None)
    return replica.pop_later_parameters()


def make_replica(model: nn.Module) -> DdpReplica:
    precision = Precision.from_name("fp32", torch.device("cpu"))
    return DdpReplica(ReplicaArgs(model, CONFIG, 1, precision, StageClock(HostTimer())))


def test_unfrozen_parameters_are_named_once() -> None:
    model = Heads()
    replica = make_replica(model)
    for _ in range(3):
        assert train_update(replica, lambda model: None) == []
    assert train_update(replica, lambda model: model.frozen.requires_grad_(True)) == ["frozen.weight", "frozen.bias"]
    before = model.frozen.weight.clone()
    assert train_update(replica, lambda model: None) == []
    assert torch.equal(model.frozen.weight, before)


def test_frozen_parameters_are_looked_at_once_per_update(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    find = LaterParameters.find
    monkeypatch.setattr(LaterParameters, "find", lambda self, model: (looked.append(1), find(self, model)))
    replica = make_replica(Heads())
    for number in range(3):
        unfrozen = number == 1  # after which it is found, though that micro-batch is not the last
        with replica.micro_batch(last=number == 2, is_padding=False, shard=0):
            loss = replica.compute_loss(lambda model, x: Loss(model(x).square().sum(), len(x)), torch.ones(2, 3))
            replica.backward(loss.total, 2)
        if unfrozen:
            replica.module.frozen.requires_grad_(True)
    assert looked == [1]
    assert replica.pop_later_parameters() == ["frozen.weight", "frozen.bias"]


def test_new_and_replaced_parameters_are_named() -> None:
    replica = make_replica(Heads())

    def add(model: nn.Module) -> None:
        model.extra = nn.Linear(3, 1)
        model.out.bias = nn.Parameter(torch.zeros(1))

    assert train_update(replica, add) == ["out.bias", "extra.weight", "extra.bias"]


def test_param_groups_of_the_recipe_leave_frozen_parameters_out() -> None:
    """In the optimizer, a parameter that is unfrozen later would move by each rank's own gradient."""
    model = Heads()
    optimizer = make_optimizer(model, CONFIG, lambda model: [{"params": model.parameters(), "lr": 0.5}])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
