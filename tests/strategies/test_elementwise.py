"""Optimizers that look at more than one element are refused where they would see flat shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launcher.config.schema import LrConfig, RunConfig, StrategyConfig
from launcher.errors import UsageError
from launcher.strategies.elementwise import check_elementwise


class Elementwise(torch.optim.AdamW):
    pass


class ScaledByNorm(torch.optim.SGD):
    """As LARS and LAMB."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad *= parameter.norm() / parameter.grad.norm()
        super().step()


class MatricesOnly(torch.optim.SGD):
    """As Muon."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        if any(parameter.ndim != 2 for group in self.param_groups for parameter in group["params"]):
            raise ValueError("only matrices")


def make_config(name: str, **options: Any) -> RunConfig:
    return RunConfig(
        recipe={"trust": [__name__]},
        optimizer={"_target_": f"{__name__}.{name}", **options},
        lr=LrConfig(base=0.1),
        strategy=StrategyConfig(name="deepspeed", stage=2),
    )


def test_elementwise_optimizer_passes() -> None:
    check_elementwise(make_config("Elementwise", weight_decay=0.1))


@pytest.mark.parametrize("name", ["ScaledByNorm", "MatricesOnly"])
def test_optimizer_of_whole_parameters_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"optimizer={name} does not treat each element .*strategy\.stage=2"):
        check_elementwise(make_config(name))
