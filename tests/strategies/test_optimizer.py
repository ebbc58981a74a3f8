"""Building the optimizer: parameter groups with weight decay and learning rates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from launcher.config.schema import LrConfig, RunConfig
from launcher.errors import UsageError
from launcher.strategies.optimizer import drop_gradients, make_optimizer, set_lr_and_momentum, take_optimizer_step


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


class PositiveRate(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        assert lr > 0.0
        super().__init__(params, lr)


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        super().step(closure)


class ExchangesParameters(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


def make_own_config(name: str) -> RunConfig:
    config = make_config()
    own = {"_target_": f"{__name__}.{name}"}
    return replace(config, recipe={**config.recipe, "trust": [__name__]}, optimizer=own)


def test_optimizer_that_asserts_a_positive_rate_is_made_with_the_base_rate() -> None:
    optimizer = make_optimizer(model(), make_own_config("PositiveRate"))
    assert optimizer.defaults["lr"] == 0.1
    assert [group["lr"] for group in optimizer.param_groups] == [0.0]


@pytest.mark.parametrize(
    ("name", "why"), [("NeedsClosure", "needs a closure"), ("ExchangesParameters", r"has train\(\) and eval\(\)")]
)
def test_optimizer_that_the_loop_cannot_run_is_refused(name: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"optimizer={name} {why}"):
        make_optimizer(model(), make_own_config(name))


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        (lambda net: [*heads(net), {"params": [torch.zeros(5, 2, requires_grad=True)]}], r"shape \[5, 2\] that is not"),
        (lambda net: list(net.parameters()), "a Parameter among its groups"),
        (lambda net: [{"lr": 0.1}], "a dict among its groups"),
        (lambda net: [{"params": set(net.parameters())}], "a set as params among its groups"),
    ],
)
def test_wrong_recipe_groups_are_named(groups: Any, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        make_optimizer(model(), make_config(), groups)


def test_recipe_groups_may_hold_named_parameters() -> None:
    (group,) = make_optimizer(model(), make_config(), lambda net: [{"params": net.named_parameters()}]).param_groups
    assert [p.ndim for p in group["params"]] == [2, 1, 1, 1, 2, 1]


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("nesterov", [True, False])
def test_gradients_that_start_late_train_as_without_fusing(momentum: float, dampening: float, nesterov: bool) -> None:
    if nesterov and (dampening or not momentum):
        pytest.skip("torch refuses it")
    options = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": 0.1}
    torch.manual_seed(0)
    nets = [model(), model()]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [
        make_optimizer(nets[0], make_config(**options)),
        make_optimizer(nets[1], make_config(**options, fused=False)),
    ]
    assert optimizers[0].param_groups[0]["fused"] is not bool(dampening)
    for update in range(4):
        for net, optimizer in zip(nets, optimizers, strict=True):
            net.zero_grad()
            for number, parameter in enumerate(net.parameters()):
                if number <= update:  # one more parameter in each update has a gradient
                    parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
            set_lr_and_momentum(optimizer, 0.1, momentum=None)
            take_optimizer_step(optimizer)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_late_gradient_with_dampening_and_a_requested_fused_kernel_is_refused() -> None:
    net = model()
    optimizer = make_optimizer(net, make_config(momentum=0.9, dampening=0.5, fused=True))
    net[0].weight.grad = torch.ones_like(net[0].weight)
    take_optimizer_step(optimizer)
    net[0].bias.grad = torch.ones_like(net[0].bias)
    with pytest.raises(UsageError, match=r"optimizer\.dampening=0\.5 with optimizer\.fused=true: some parameters"):
        take_optimizer_step(optimizer)


class InPlace(torch.optim.Optimizer):
    """Leaves it to its caller to turn gradients off; its own zero_grad counts its calls and changes the parameters."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.calls = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad * group["lr"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.calls += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.clamp_(-9.0, 9.0)
        super().zero_grad(set_to_none)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, InPlace])
def test_step_is_taken_without_a_graph_and_gradients_are_dropped(optimizer_class: Any) -> None:
    net = nn.Linear(3, 1)
    optimizer = optimizer_class(net.parameters(), lr=0.5)
    before = net.bias.detach().clone()
    net(torch.ones(1, 3)).sum().backward()
    take_optimizer_step(optimizer)
    drop_gradients(optimizer)
    assert torch.equal(net.bias, before - 0.5)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert getattr(optimizer, "calls", 1) == 1
