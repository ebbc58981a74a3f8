"""Optimizers that look at more than one element are refused where they would see flat shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launcher.config.schema import LrConfig, RunConfig, StrategyConfig
from launcher.errors import UsageError
from launcher.strategies.elementwise import check_elementwise

CPU = torch.device("cpu")


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


class NeedsGpu(torch.optim.SGD):
    """As kernels for one kind of device."""

    def step(self, closure: Any = None) -> None:
        raise RuntimeError("CUDA only")


class Misspelt(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        if self.param_groups[0]["params"][0].ndim == 1:
            raise TypeError("rows and\ncolumns")
        super().step()


def make_config(name: str, **options: Any) -> RunConfig:
    return RunConfig(
        recipe={"trust": [__name__]},
        optimizer={"_target_": f"{__name__}.{name}", **options},
        lr=LrConfig(base=0.1),
        strategy=StrategyConfig(name="deepspeed", stage=2),
    )


def test_elementwise_optimizer_passes() -> None:
    check_elementwise(make_config("Elementwise", weight_decay=0.1), CPU)


def test_optimizer_that_cannot_step_the_whole_parameter_is_not_judged() -> None:
    check_elementwise(make_config("NeedsGpu"), CPU)


def test_error_on_pieces_is_named() -> None:
    with pytest.raises(UsageError, match=r"optimizer=Misspelt cannot step .* \(TypeError: rows and columns\), and"):
        check_elementwise(make_config("Misspelt"), CPU)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ScaledByNorm", "does not treat each element of a parameter by itself"),
        ("MatricesOnly", r"cannot step flat pieces of a parameter \(ValueError: only matrices\)"),
    ],
)
def test_optimizer_of_whole_parameters_is_refused(name: str, why: str) -> None:
    with pytest.raises(UsageError, match=rf"optimizer={name} {why}, and strategy\.stage=2"):
        check_elementwise(make_config(name), CPU)
