"""What loss() may return in training: checked, and made to take part in the reduction."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from launcher.config.schema import RunConfig
from launcher.errors import TrainingFailed
from launcher.recipe import Loss
from launcher.strategies.ddp import DdpReplica
from launcher.strategies.interface import ReplicaArgs
from launcher.strategies.loss_module import LossModule, run_loss
from launcher.strategies.precision import Precision
from launcher.strategies.training_loss import (
    contribute_nothing,
    contribute_zeros,
    reaches_parameter,
    read_training_loss,
)
from launcher.telemetry.stage_clock import HostTimer, StageClock

WEIGHT = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("count", [3, 3.0, True + 2, torch.tensor(3), torch.tensor([3.0])])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_is_a_scalar_tensor(count: Any, shape: tuple[int, ...]) -> None:
    loss = read_training_loss(Loss(WEIGHT.sum().view(shape), count))
    assert (loss.total.shape, loss.count, type(loss.count) in (int, float)) == ((), 3.0, True)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (WEIGHT.sum(), "recipe.loss returned a Tensor: return Loss(total, count) of launcher.recipe"),
        (Loss(2 * WEIGHT, 2), "a total with the shape [2] and dtype torch.float32: return one real number"),
        (Loss(WEIGHT.sum().detach(), 2), "counted 2 but returned a total without a gradient: compute it from"),
        (Loss(torch.zeros((), requires_grad=True), 2), "counted 2 but returned a total without a gradient"),
        (Loss(1.5, 2), "counted 2 but returned a total without a gradient"),
        (Loss("1.5", 0), "a str ('1.5') as total"),
        (Loss(WEIGHT.sum(), None), "a NoneType (None) as count: return the number of samples or tokens"),
        (Loss(WEIGHT.sum(), torch.ones(3)), "a Tensor of the shape [3] as count"),
        (Loss(WEIGHT.sum(), -1), "count=-1: return the number of samples or tokens"),
        (Loss(WEIGHT.sum(), math.nan), "count=nan"),
        (Loss(WEIGHT.sum(), math.inf), "count=inf"),
        (Loss(WEIGHT.sum() * 1j, 2), "dtype torch.complex64: return one real number"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(loss: Any, message: str) -> None:
    with pytest.raises(TrainingFailed) as refused:
        read_training_loss(loss)
    assert message in str(refused.value)
    assert "recipe.loss" in str(refused.value)


class NamedLoss(NamedTuple):
    total: Any
    count: Any


@pytest.mark.parametrize("metrics", [{}, {"metrics": {"hits": 2}}])
@pytest.mark.parametrize("training", [True, False])
def test_other_objects_with_the_same_attributes_are_losses(metrics: dict[str, Any], training: bool) -> None:
    precision = Precision.from_name("fp32", torch.device("cpu"))
    config = RunConfig(optimizer={"_target_": "torch.optim.SGD"})
    replica = DdpReplica(ReplicaArgs(nn.Linear(2, 1), config, 1, precision, StageClock(HostTimer())))

    def compute(model: nn.Module, batch: torch.Tensor) -> Any:
        total = model(batch).sum()
        return SimpleNamespace(total=total, count=3, **metrics) if metrics else NamedLoss(total, 3)

    with torch.set_grad_enabled(training):
        loss = replica.compute_loss(compute, torch.ones(3, 2))
    assert (type(loss), loss.count, loss.metrics) == (Loss, 3, metrics.get("metrics", {}))
    assert loss.total.requires_grad == training


@pytest.mark.parametrize("wrong", [torch.ones(()), (torch.ones(()), 3), None])
def test_validation_refuses_what_is_no_loss(wrong: Any) -> None:
    with (
        torch.no_grad(),
        pytest.raises(TrainingFailed, match=r"recipe\.loss returned a .*: return Loss\(total, count\)"),
    ):
        run_loss(LossModule(nn.Linear(2, 1)), lambda model, batch: wrong, None)


def test_graph_that_reaches_no_parameter_is_found() -> None:
    assert reaches_parameter((WEIGHT * 2).sum())
    assert not reaches_parameter(2 * torch.zeros((), requires_grad=True))
    assert not reaches_parameter(torch.zeros(()))


def test_contributions_have_the_value_and_no_gradient() -> None:
    """A NaN, also one that the graph would multiply by 0, becomes 0."""
    weight = nn.Parameter(torch.full((2,), math.inf))
    contribute_zeros(torch.tensor(math.nan), [weight]).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0, 0.0]
    other = nn.Parameter(torch.ones(2))
    total = contribute_nothing(torch.tensor(3.0), [other])
    total.backward()
    assert (float(total.detach()), other.grad) == (3.0, None)


def test_dropped_update_changes_no_parameter_but_keeps_buffers() -> None:
    """As a plain loop, whose forward pass changes running statistics before it finds that it has nothing to step on."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    config = RunConfig(optimizer={"_target_": "torch.optim.AdamW", "weight_decay": 0.1})
    precision = Precision.from_name("fp32", torch.device("cpu"))
    replica = DdpReplica(ReplicaArgs(model, config, 1, precision, StageClock(HostTimer())))

    def run_update(kind: str) -> None:
        def compute(net: nn.Module, batch: torch.Tensor) -> Loss:
            out = net(batch).square()
            totals = {"sum": out.sum(), "nan": out[:0].mean(), "constant": torch.zeros(()), "graph": out.sum() * 0}
            return Loss(totals[kind], 4 if kind == "sum" else 0)

        with replica.micro_batch(last=True, is_padding=False, shard=0):
            loss = replica.compute_loss(compute, torch.randn(4, 2))
            replica.backward(loss.total, 4)

    run_update("sum")
    replica.step(0.1, None, 1.0, None)
    for kind in ("nan", "constant", "graph"):
        before = {name: tensor.clone() for name, tensor in replica.full_state().model.items()}
        moments = {name: tensor.clone() for name, tensor in replica.full_state().optimizer.items()}
        run_update(kind)
        step = replica.discard_update()
        assert bool(step.finite)
        after = replica.full_state()
        changed = {name for name, tensor in after.model.items() if not torch.equal(tensor, before[name])}
        assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}, kind
        assert all(torch.equal(tensor, moments[name]) for name, tensor in after.optimizer.items())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_loss_scale_starts_lower_for_a_loss_that_counts_many_items() -> None:
    precision = Precision.from_name("fp16", torch.device("cpu"))
    precision.scale_loss(torch.ones(()))
    precision.lower_scale(1.0)
    assert precision.scale() == 65536
    precision.lower_scale(1000.0)
    assert precision.scale() == 64
    precision.lower_scale(10.0)  # never raised
    assert precision.scale() == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda model, total: model.zero_grad(),
        lambda model, total: model.weight.grad.clamp_(-1, 1),
        lambda model, total: total.backward(retain_graph=True),
    ],
)
def test_loss_that_changes_gradients_is_refused(change: Any) -> None:
    """The gradients of earlier micro-batches would be lost, so the result would depend on how the batch is split."""
    precision = Precision.from_name("fp32", torch.device("cpu"))
    config = RunConfig(optimizer={"_target_": "torch.optim.SGD"})
    replica = DdpReplica(ReplicaArgs(nn.Linear(2, 3), config, 1, precision, StageClock(HostTimer())))

    def compute(model: nn.Module, batch: torch.Tensor, *, changes: bool) -> Loss:
        total = model(batch).sum()
        if changes:
            change(model, total)
        return Loss(total, len(batch))

    for last in (False, True):
        with replica.micro_batch(last=last, is_padding=False, shard=0):
            if last:
                with pytest.raises(TrainingFailed, match=r"^recipe\.loss changes the gradients"):
                    replica.compute_loss(partial(compute, changes=True), torch.randn(4, 2))
            else:
                loss = replica.compute_loss(partial(compute, changes=False), torch.randn(4, 2))
                replica.backward(loss.total, 8, 4.0)
