"""Building the optimizer: parameter groups with weight decay and learning rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from launcher.config.schema import LrConfig, RunConfig
from launcher.errors import UsageError
from launcher.strategies.optimizer import make_optimizer, set_lr_and_momentum


def make_config(**optimizer: Any) -> RunConfig:
    return RunConfig(
        recipe={"_target_": "launcher.recipes.mlp.Mlp"},
        optimizer={"_target_": "torch.optim.SGD", **optimizer},
        lr=LrConfig(base=0.1, base_batch=64),
    )


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_norms_and_biases_have_no_weight_decay() -> None:
    decayed, bare = make_optimizer(model(), make_config(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], [p.ndim for p in decayed["params"]]) == (0.1, [2, 2])
    assert (bare["weight_decay"], {p.ndim for p in bare["params"]}) == (0.0, {1})


def test_lr_is_zero_until_set() -> None:
    optimizer = make_optimizer(model(), make_config())
    assert [group["lr"] for group in optimizer.param_groups] == [0.0]
    set_lr_and_momentum(optimizer, 0.25, momentum=None)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]


def heads(net: nn.Module) -> list[dict[str, Any]]:
    """The last layer at a tenth of lr.base, as in plain torch."""
    return [{"params": [*net[0].parameters(), *net[1].parameters()]}, {"params": net[2].parameters(), "lr": 0.01}]


def test_recipe_groups_keep_relative_lr() -> None:
    optimizer = make_optimizer(model(), make_config(momentum=0.9), heads)
    set_lr_and_momentum(optimizer, 0.4, momentum=None)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4, 0.04])
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_parameter_missing_from_groups_is_named() -> None:
    with pytest.raises(UsageError, match=r"2\.weight in none of its groups"):
        make_optimizer(model(), make_config(), lambda net: heads(net)[:1])
    with pytest.raises(UsageError, match=r"0\.weight in more than one of its groups"):
        make_optimizer(model(), make_config(), lambda net: [*heads(net), {"params": [net[0].weight]}])


def test_unknown_optimizer_argument_is_refused() -> None:
    with pytest.raises(UsageError, match="optimizer=SGD does not take these arguments"):
        make_optimizer(model(), make_config(beta=0.5))


def test_frozen_parameters_are_left_out() -> None:
    net = model()
    net[0].requires_grad_(False)
    (group,) = make_optimizer(net, make_config()).param_groups
    assert not {id(p) for p in net[0].parameters()} & {id(p) for p in group["params"]}
    assert all(isinstance(p, torch.Tensor) for p in group["params"])
