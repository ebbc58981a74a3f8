"""Metrics that keys name: a name that validation does not give is refused before training, by as little as it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from launcher.config.consistency import validate_dataset_sizes
from launcher.config.schema import BatchConfig, LrConfig, RunConfig, TargetConfig
from launcher.errors import UsageError
from launcher.plan.training_plan import DatasetSizes, make_training_plan
from launcher.recipe import Loss
from launcher.strategies.precision import Precision
from launcher.topology import Topology
from launcher.train.state import TrainState
from launcher.train.validation import Validator
from launcher.train.watched_metrics import check_watched_metrics, report_missing_metrics

CONFIG = RunConfig(
    optimizer={"_target_": "torch.optim.SGD"}, lr=LrConfig(base=0.1, base_batch=2), batch=BatchConfig(per_device=2)
)
BEST = ("checkpoint.best", lambda name: replace(CONFIG, checkpoint=replace(CONFIG.checkpoint, best=name)))
PLATEAU = (
    "schedule.metric",
    lambda name: replace(CONFIG, schedule=replace(CONFIG.schedule, decay="plateau", metric=name)),
)
TARGET = (
    "train.target.metric",
    lambda name: replace(CONFIG, train=replace(CONFIG.train, target=TargetConfig(name, at_least=0.5))),
)


class CountingModel(nn.Linear):
    """Changes a buffer in every forward pass, also in evaluation mode."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        result: torch.Tensor = super().forward(batch)
        return result


@dataclass
class SometimesMinority:
    """Ten samples in batches of two; only the batch of the last two has the metric `minority`."""

    batches: list[int] = field(default_factory=list)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> Loss:
        self.batches.append(int(batch[0]))
        assert not model.training
        metrics: dict[str, Any] = {"accuracy": 1}
        if int(batch[0]) == 8:
            metrics["minority"] = 2
        return Loss(model(batch[:, None].float()).sum(), len(batch), metrics)


def make_context(config: RunConfig, recipe: Any, metrics: Mapping[str, float] | None = None) -> tuple[Any, TrainState]:
    """The context of one worker, as far as the checks read it, and a state with the metrics of earlier validations."""
    plan = make_training_plan(config, DatasetSizes(10, 10), 1)
    module = CountingModel().train()
    replica = SimpleNamespace(
        module=module, broadcast_buffers=lambda: None, compute_loss=lambda loss, batch: loss(module, batch)
    )
    precision = Precision.from_name("fp32", torch.device("cpu"))
    events: list[dict[str, Any]] = []
    context = SimpleNamespace(
        config=plan.config,
        replica=replica,
        validator=Validator(list(range(10)), recipe, plan, Topology(), precision),
        watchdog=None,
        events=events,
        log_event=lambda name, **facts: events.append({"event": name, **facts}),
    )
    return context, replace(TrainState.initial(plan), metrics=metrics or {})


@pytest.mark.parametrize(("key", "configure"), [BEST, PLATEAU, TARGET], ids=["best", "plateau", "target"])
def test_unknown_metric_is_refused(key: str, configure: Any) -> None:
    recipe = SometimesMinority()
    context, state = make_context(configure("val/acuracy"), recipe)
    with pytest.raises(UsageError) as error:
        check_watched_metrics(context, state)
    assert str(error.value).startswith(
        f"{key}=val/acuracy is not measured in validation: did you mean {key}=val/accuracy? Choose from val/accuracy, "
        "val/loss, val/minority, "
    )
    assert recipe.batches == [0, 0, 2, 4, 6, 8], "one batch, and all of them since it lacks the metric"


@pytest.mark.parametrize(("key", "configure"), [BEST, PLATEAU, TARGET], ids=["best", "plateau", "target"])
@pytest.mark.parametrize(
    ("metric", "batches"), [("val/loss", []), ("val/accuracy", [0]), ("val/minority", [0, 0, 2, 4, 6, 8])]
)
def test_known_metric_costs_as_little_as_it_takes(key: str, configure: Any, metric: str, batches: list[int]) -> None:
    recipe = SometimesMinority()
    context, state = make_context(configure(metric), recipe)
    check_watched_metrics(context, state)
    assert recipe.batches == batches
    assert context.replica.module.calls == 0, "the buffers are as they were"
    assert context.replica.module.training


def test_metric_of_an_earlier_validation_is_known() -> None:
    recipe = SometimesMinority()
    context, state = make_context(TARGET[1]("val/older"), recipe, {"val/loss": 1.0, "val/older": math.nan})
    check_watched_metrics(context, state)
    assert recipe.batches == []


def test_metric_that_is_missing_later_is_an_alarm() -> None:
    """One alarm where it goes missing, not one for each validation."""
    context, state = make_context(TARGET[1]("val/accuracy"), SometimesMinority())
    for measured in ({"val/loss": 1.0, "val/accuracy": 0.1}, {"val/loss": 1.0}, {"val/loss": 0.5}):
        report_missing_metrics(context, state, measured)
        state = state.with_validation(measured, 10, "val/loss")
    [alarm] = context.events
    assert (alarm["event"], alarm["kind"]) == ("alarm", "metric")
    assert alarm["detail"] == "this validation has no train.target.metric=val/accuracy: it has val/loss"


@pytest.mark.parametrize(("key", "configure"), [BEST, PLATEAU, TARGET], ids=["best", "plateau", "target"])
def test_metric_without_validation_data_is_refused(key: str, configure: Any) -> None:
    config = configure("val/loss")
    config = replace(config, train=replace(config.train, validate_every=None))
    validate_dataset_sizes(config, 10, 1)
    with pytest.raises(UsageError, match=f"{key}=val/loss but the recipe's validation data are empty"):
        validate_dataset_sizes(config, 10, 0)
