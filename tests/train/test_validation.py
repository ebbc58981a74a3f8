"""Validation: the chunks of the data, and what it makes of losses and metrics."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from launcher.config.schema import BatchConfig, LrConfig, RunConfig
from launcher.errors import TrainingFailed
from launcher.plan.training_plan import DatasetSizes, make_training_plan
from launcher.recipe import Loss
from launcher.strategies.precision import Precision
from launcher.topology import Topology
from launcher.train.validation import ValidationResult, Validator


# The chunks
@pytest.mark.parametrize("size", [3, 8, 53])
def test_validation_chunks_are_independent_of_world_size(size: int) -> None:
    from launcher.train.validation import ValidationSampler

    def batches(world: int) -> list[Any]:
        slices = [ValidationSampler(size, rank, world, chunks=8, batch=5) for rank in range(world)]
        return [b for one in slices for b in zip(one.chunks, one, strict=True) if b[0] is not None]

    assert batches(1) == batches(2) == batches(3) == batches(11)
    assert sorted(sample for _, [(_, samples)] in batches(1) for sample in samples) == list(range(size))


# Losses and metrics
CONFIG = RunConfig(
    optimizer={"_target_": "torch.optim.SGD"}, lr=LrConfig(base=0.1, base_batch=2), batch=BatchConfig(per_device=2)
)


@dataclass(frozen=True)
class GivenLosses:
    """The loss of the batch that begins with sample i is `losses[i // 2]`."""

    losses: tuple[Loss, ...]

    def loss(self, model: nn.Module, batch: torch.Tensor) -> Loss:
        return self.losses[int(batch[0]) // 2]


def validate(*losses: Loss) -> ValidationResult:
    """Validate on one worker, in batches of two samples with these losses."""
    samples = list(range(2 * len(losses)))
    plan = make_training_plan(CONFIG, DatasetSizes(len(samples), len(samples)), 1)
    precision = Precision.from_name("fp32", torch.device("cpu"))
    config = replace(plan.config, data=replace(plan.config.data, num_workers=0))
    plan = replace(plan, config=config)
    validator = Validator(samples, GivenLosses(losses), plan, Topology(), precision)
    module = nn.Linear(1, 1)
    replica: Any = SimpleNamespace(
        module=module, broadcast_buffers=lambda: None, compute_loss=lambda loss, batch: loss(module, batch)
    )
    return validator.run(replica)


def test_metric_that_a_batch_lacks_is_zero_there() -> None:
    result = validate(Loss(1.0, 2, {"b": 1}), Loss(3.0, 2, {"a": 2.0, "b": 1}), Loss(2.0, 2))
    assert dict(result.metrics) == {"val/loss": 1.0, "val/a": pytest.approx(1 / 3), "val/b": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    "value", [3, 3.0, True + 2, torch.tensor(3), torch.tensor([3.0]), torch.tensor([[3.0]]).half(), torch.ones(3).sum()]
)
def test_metric_may_be_any_single_number(value: Any) -> None:
    assert validate(Loss(value, value, {"x": value})).metrics == {"val/loss": 1.0, "val/x": 1.0}


def test_metrics_may_be_named_like_other_values() -> None:
    """A metric named count does not replace the loss's count."""
    assert validate(Loss(4.0, 2, {"count": 6, "val/loss": 2})).metrics["val/count"] == 3


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": 1.0}, "a metric named 'loss', which is the name of the loss itself: name it otherwise"),
        ({1: 1.0}, "a metric named 1, a int: name it with text, e.g. {'metric1': ...}"),
        ({"": 1.0}, "a metric named '', a str: name it with text"),
        (
            {"per_class": torch.ones(3)},
            r"the metric 'per_class' with the shape [3] and dtype torch.float32",
        ),
        ({"x": torch.ones(0)}, r"the metric 'x' with the shape [0]"),
        ({"x": torch.tensor(1j)}, r"the metric 'x' with the shape [] and dtype torch.complex64"),
        ({"x": "3"}, "the metric 'x'='3', a str: return one real number, the sum over the samples"),
        ({"x": None}, "the metric 'x'=None, a NoneType"),
        ([("x", 1.0)], "metrics=[('x', 1.0)], a list: return a mapping of names to sums, or {} for none"),
        (None, "metrics=None, a NoneType"),
    ],
)
def test_unusable_metrics_are_refused_by_name(metrics: Any, message: str) -> None:
    with pytest.raises(TrainingFailed) as refused:
        validate(Loss(1.0, 2, metrics))
    assert message in str(refused.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, torch.tensor(-math.inf)])
def test_non_finite_metric_is_not_hidden_and_leaves_others_alone(bad: Any) -> None:
    result = validate(Loss(1.0, 2, {"x": bad, "y": 1}), Loss(1.0, 2, {"x": 1.0, "y": 1}))
    assert not math.isfinite(result.metrics["val/x"])
    assert (result.metrics["val/loss"], result.metrics["val/y"]) == (0.5, 0.5)


# Batches without a target
def test_nan_of_a_batch_that_counts_nothing_is_no_samples() -> None:
    """A mean over no targets is NaN; that of the other batches is not affected."""
    result = validate(Loss(torch.tensor(math.nan), 0, {"x": math.nan}), Loss(6.0, torch.tensor(3), {"x": 3}))
    assert result == ValidationResult({"val/loss": 2.0, "val/x": 1.0}, 3.0)


def test_validation_without_any_target_is_nan() -> None:
    result = validate(Loss(torch.tensor(math.nan), torch.tensor(0)), Loss(0.0, 0, {"x": 0}))
    assert result.count == 0
    assert all(math.isnan(result.metrics[name]) for name in ("val/loss", "val/x"))


@pytest.mark.parametrize("count", [-1, math.nan, math.inf])
def test_impossible_counts_are_refused(count: float) -> None:
    with pytest.raises(TrainingFailed, match=r"recipe\.loss counted"):
        validate(Loss(1.0, count))


# Random draws
@dataclass(frozen=True)
class DrawsInLoss:
    def loss(self, model: nn.Module, batch: torch.Tensor) -> Loss:
        return Loss(torch.rand(()) + random.random() + np.random.rand(), len(batch))


def test_draws_in_validation_are_the_same_each_time() -> None:
    losses = []
    for num_workers in (0, 0, 1):
        plan = make_training_plan(CONFIG, DatasetSizes(6, 6), 1)
        config = replace(plan.config, data=replace(plan.config.data, num_workers=num_workers))
        precision = Precision.from_name("fp32", torch.device("cpu"))
        validator = Validator(
            TensorDataset(torch.zeros(6)), DrawsInLoss(), replace(plan, config=config), Topology(), precision
        )
        replica = SimpleNamespace(
            module=nn.Linear(1, 1), broadcast_buffers=lambda: None, compute_loss=lambda loss, batch: loss(None, batch)
        )
        losses.append(validator.run(replica).metrics["val/loss"])
    assert losses[0] == losses[1] == losses[2]
