"""Keys that contradict each other, whatever the world size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.config.consistency import validate_for_plan
from launcher.config.schema import LrConfig, RunConfig
from launcher.errors import UsageError

SGD = {"_target_": "torch.optim.SGD", "momentum": 0.9, "dampening": 0, "nesterov": True}


def make_config(**optimizer: Any) -> RunConfig:
    return replace(RunConfig(), lr=LrConfig(base=0.1, base_batch=8), optimizer=optimizer)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({**SGD, "momentum": 0}, "optimizer.momentum=0 does not work with optimizer.nesterov=true: type"),
        ({**SGD, "dampening": 0.1}, "optimizer.dampening=0.1 does not work with optimizer.nesterov=true: type"),
        ({**SGD, "lr": 0.5}, "optimizer.lr=0.5 is not used: type lr.base=0.5 instead"),
        ({"_target_": "torch.optim.LBFGS", "max_iter": 4}, "LBFGS needs a closure .*: type optimizer=sgd"),
    ],
)
def test_optimizer_is_refused_with_what_to_type(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate_for_plan(make_config(**optimizer))


@pytest.mark.parametrize(
    "optimizer", [SGD, {**SGD, "momentum": 0, "nesterov": False}, {"_target_": "torch.optim.Adam"}]
)
def test_other_optimizers_pass(optimizer: dict[str, Any]) -> None:
    validate_for_plan(make_config(**optimizer))
